// What the planner expects of a unit, launch by launch; printed by fif_ops.explain and compared with measured times.
#pragma once

#include <string>
#include <vector>

#include "calls.h"

namespace fif::gpu {

struct Prediction {
  const char* kernel;
  int tile_h, tile_w;  // pixels of a block's tile; of a share of all pixels, 1 by its length
  int channels;        // of a block
  int64_t blocks;
  int64_t bytes_read, bytes_written;  // to and from the second-level cache, halos included
};

// In evaluation (one launch), or in training with batch statistics (three forward, four backward). The pointers of a
// call are null: all is taken to be aligned.
inline std::vector<Prediction> predict(const Problem& p, const Device& device, bool trains) {
  const int64_t element = element_bytes(p.dtype), pixels = p.batch * p.pixels();
  const int64_t run = p.channels_last ? p.in_channels : p.in_pixels();
  const Input x{nullptr, p.in_channels * p.in_pixels(), run};
  const auto cheap = [&](const char* kernel, const CheapPlan& plan, int reach, int64_t repeats, int64_t others,
                         int64_t written) {
    const int halo = reach * (p.kernel / 2);
    const int64_t places = int64_t(plan.tile_h + 2 * halo) * (plan.tile_w + 2 * halo);
    return Prediction{kernel,
                      plan.tile_h,
                      plan.tile_w,
                      plan.channels,
                      plan.blocks_x * plan.blocks_y * repeats,
                      (plan.tiles * places * p.primary * repeats + others) * element,
                      written * element};
  };
  if (!trains && p.has_primary) {
    InferCall call{};
    call.p = p;
    call.x = x;
    if (!plan_inference(call, device)) return {};
    const Plan& plan = call.plan;
    return {{"infer_kernel", plan.tile_h, plan.tile_w, plan.channels, plan.blocks_x * plan.blocks_y, plan.bytes_read,
             plan.bytes_written}};
  }
  TrainCall train{};
  train.p = p;
  train.x = x;
  train.primary.batch = train.cheap.batch = trains;
  if (!plan_training(train, device)) return {};
  const Prediction apply = cheap("apply_kernel", train.plan, 1, 1, 0, pixels * p.out_channels);
  if (!trains) return {apply};

  BackwardCall back{};
  back.p = p;
  back.x = x;
  back.grad_x.data = back.grad_primary_weight = &back;  // wanted
  if (!plan_backward(back, device)) return {};
  const GradientPlan& g = back.gradient;
  const int64_t maps = pixels * p.primary, cheap_maps = pixels * p.cheap();
  std::vector<Prediction> all;
  if (p.has_primary) {
    const ProductPlan& product = train.product;
    all.push_back({"raw_kernel", 1, kPositions, product.channels, int64_t(product.blocks_x) * product.blocks_y,
                   pixels * p.in_channels * product.blocks_per_group * element, maps * element});
  } else {
    all.push_back(cheap("moments_kernel (primary)", train.plan, 0, 1, 0, 0));
  }
  all.push_back(cheap("moments_kernel", train.plan, 1, p.multiplier, 0, 0));
  all.push_back(apply);
  all.push_back(cheap("sums_kernel", back.sums_plan, 1, p.multiplier, cheap_maps, 0));
  all.push_back(cheap("gradient_kernel", back.plan, 2, 1, cheap_maps + 2 * maps, maps));
  if (p.has_primary) {
    const int64_t read = 2 * maps * g.channel_tiles + pixels * p.in_channels * g.map_tiles;
    all.push_back({"weight_kernel", 1, 64, 64, int64_t(g.splits) * g.map_tiles * g.channel_tiles * p.groups,
                   read * element, int64_t(g.splits) * p.primary * (p.in_channels / p.groups) * 4});
    all.push_back({"input_kernel", 1, kPositions, g.channels, g.input_blocks + g.sum_blocks,
                   2 * maps * g.blocks_per_group * element, p.batch * p.in_pixels() * p.in_channels * element});
  } else {
    all.push_back({"weight_kernel", 0, 0, 64, g.map_tiles, 0, 0});
    all.push_back(cheap("draw_kernel", back.plan, 0, 1, maps, maps));
    all.back().blocks += back.plan.blocks_x;  // those that sum up weights
  }
  return all;
}

// One line a launch: kernel, tile_h, tile_w, channels, blocks, bytes read, bytes written, with tabs between.
inline std::string predict_text(const Problem& p, const Device& device, bool trains) {
  std::string text;
  for (const Prediction& l : predict(p, device, trains)) {
    text += l.kernel;
    const int64_t numbers[] = {l.tile_h, l.tile_w, l.channels, l.blocks, l.bytes_read, l.bytes_written};
    for (int64_t number : numbers) text += "\t" + std::to_string(number);
    text += "\n";
  }
  return text;
}

}  // namespace fif::gpu

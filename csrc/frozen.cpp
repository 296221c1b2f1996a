// Frozen networks on the CPU: constants packed once, and a chain of stages that one operator runs.
//
// A program is a table of stages, one line of kFields numbers each (struct Stage). Stages hand maps to each other
// through numbered slots of scratch memory, as channels_last maps; -1 stands for the operator's input and for its
// result. Every number of a program is checked at every run, before anything is computed, so that no
// program reads or writes outside its memory: at the first run with an input of some size it becomes a plan, and later
// runs check that the same numbers would make the same plan.
#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <utility>
#include <vector>

#include "operators.h"

namespace fif {
namespace {

enum Kind : int64_t { kUnit, kPool };
constexpr int64_t kNone = -2, kEnds = -1;  // no slot; the input of the operator, or its result
constexpr int64_t kAlignment = 64;

struct Stage {
  int64_t kind;
  int64_t in, out, add;  // slots
  int64_t channels, primary, multiplier, out_channels, kernel, activation, splice, primary_kernel, stride;
  int64_t depthwise_kernel, depthwise_stride;
  int64_t offset;  // of its constants
};
constexpr int64_t kFields = sizeof(Stage) / sizeof(int64_t);

// What lies before a stage's constants: who packed what.
struct Header {
  char instruction_set[16];
  int64_t channels, primary, kernels, dtype, bytes, plain_bytes;
};
static_assert(sizeof(Header) == kAlignment);

// Of packed constants (csrc/cpu/packed.h): raised whenever they lie otherwise, so that a network that was frozen before
// and kept in a file is refused.
constexpr int64_t kLayout = 3;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t element_size(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

int64_t after(int64_t size, int64_t stride) { return (size - 1) / stride + 1; }

struct Size {
  int64_t channels, height, width;
  int64_t count() const { return channels * height * width; }
};

Problem problem_of(const Stage& s, Dtype dtype, int64_t batch, Size in, bool channels_last) {
  auto odd = [](int64_t k) { return k == 1 || k == 3 || k == 5 || k == 7; };
  STD_TORCH_CHECK(s.channels == in.channels, "a stage takes ", s.channels, " channels and gets ", in.channels);
  STD_TORCH_CHECK(
      0 < s.channels && s.channels < (1 << 24) && 0 < s.primary && s.primary < (1 << 24) && 0 <= s.multiplier &&
          s.multiplier < (1 << 16) && odd(s.kernel) && odd(s.primary_kernel) && 0 <= s.activation &&
          s.activation <= static_cast<int64_t>(Activation::gelu) && 0 < s.stride && s.stride < (1 << 24) &&
          (s.splice || s.multiplier > 0) && 0 < s.out_channels && (!s.splice || s.primary <= s.out_channels) &&
          s.out_channels <= s.primary * (s.multiplier + (s.splice ? 1 : 0)) &&
          (s.depthwise_kernel == 0 || (odd(s.depthwise_kernel) && s.depthwise_kernel > 1)) && 0 < s.depthwise_stride &&
          s.depthwise_stride < (1 << 24) && (s.depthwise_kernel > 0 || s.depthwise_stride == 1),
      "a stage of the program is not one that fif_ops.freeze makes");
  return {.batch = batch,
          .in_channels = s.channels,
          .in_height = in.height,
          .in_width = in.width,
          .height = after(in.height, s.stride),
          .width = after(in.width, s.stride),
          .stride = s.stride,
          .groups = 1,
          .primary = s.primary,
          .multiplier = s.multiplier,
          .out_channels = s.out_channels,
          .kernel = static_cast<int>(s.kernel),
          .activation = static_cast<Activation>(s.activation),
          .splice = s.splice != 0,
          .channels_last = channels_last,
          .has_primary = true,
          .tf32 = false,
          .dtype = dtype,
          .primary_kernel = static_cast<int>(s.primary_kernel),
          .depthwise_kernel = static_cast<int>(s.depthwise_kernel),
          .depthwise_stride = s.depthwise_stride};
}

// The parameters as they were, which kernels with lanes along the pixels of a plane use, each at an aligned offset:
// weights of both convolutions, then factor and addend of both normalisations.
struct Plain {
  enum { kWeight, kCheapWeight, kScale, kShift, kCheapScale, kCheapShift, kParts };
  int64_t at[kParts + 1], bytes[kParts];  // at[kParts]: of all

  explicit Plain(const Problem& p) {
    const int64_t size = element_size(p.dtype), compute = std::max<int64_t>(size, 4);
    const int64_t sizes[kParts] = {p.primary * p.depth() * size, p.cheap() * p.kernel * p.kernel * size,
                                   p.primary * compute,          p.primary * compute,
                                   p.cheap() * compute,          p.cheap() * compute};
    at[0] = 0;
    for (int i = 0; i < kParts; ++i) {
      bytes[i] = sizes[i];
      at[i + 1] = at[i] + aligned(sizes[i]);
    }
  }
};

Header header_of(const Problem& p, bool plain) {
  Header header{};
  std::strncpy(header.instruction_set, cpu_kernels().name, sizeof header.instruction_set - 1);
  header.channels = p.in_channels;
  header.primary = p.primary;
  header.kernels = ((p.multiplier << 8 | p.kernel) << 8 | p.primary_kernel) << 8 | p.depthwise_kernel;
  header.dtype = (kLayout << 8 | static_cast<int64_t>(p.dtype)) << 1 | p.channels_last;
  header.bytes = aligned(cpu_kernels().packed_bytes(p));
  header.plain_bytes = plain ? Plain(p).at[Plain::kParts] : 0;
  return header;
}

// Whether a program is one unit alone, which runs in either memory format; all others run in channels_last.
bool is_unit(const Stage& s) {
  return s.kind == kUnit && s.in == kEnds && s.out == kEnds && s.add == kNone && s.depthwise_kernel == 0;
}

Stage stage_of(const int64_t* program, int64_t line) {
  Stage stage;
  std::memcpy(&stage, program + line * kFields, sizeof stage);
  return stage;
}

void check_program(const Tensor& program) {
  STD_TORCH_CHECK(program.is_cpu() && program.scalar_type() == ScalarType::Long && program.dim() == 2 &&
                      program.size(0) > 0 && program.size(1) == kFields && program.is_contiguous(),
                  "program must be what fif_ops.freeze made");
}

// The constants of a program of one stage, for x's dtype; both memory formats where `unit` says that it stands alone.
Tensor pack(const Tensor& program, const Tensor& primary_weight, const OptionalTensor& cheap_weight,
            const OptionalTensor& depthwise_weight, const Tensor& scale, const Tensor& shift,
            const OptionalTensor& cheap_scale, const OptionalTensor& cheap_shift, const OptionalTensor& depthwise_scale,
            const OptionalTensor& depthwise_shift) {
  check_program(program);
  const Stage stage = stage_of(static_cast<const int64_t*>(program.const_data_ptr()), 0);
  const Tensor& w = primary_weight;
  STD_TORCH_CHECK(w.dim() == 4, "primary_weight must have 4 dimensions");
  const Dtype dtype = dtype_of(w, "primary_weight");
  const ScalarType type = compute_type(w);
  auto get = [&](const OptionalTensor& t, std::vector<int64_t> sizes, ScalarType wanted, const char* name) {
    const bool there = t.has_value() && sizes[0] > 0;
    STD_TORCH_CHECK(t.has_value() == (sizes[0] > 0), name, there ? " must be None" : " is missing");
    if (!there) return static_cast<const void*>(nullptr);
    bool fits = t->dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; fits && i < sizes.size(); ++i) fits = t->size(static_cast<int64_t>(i)) == sizes[i];
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == wanted && t->is_contiguous() && fits, name,
                    " must be dense, on the CPU, and of the stage's sizes and dtype");
    return t->const_data_ptr();
  };
  const bool alone = is_unit(stage);
  auto problem = [&](bool last) { return problem_of(stage, dtype, 1, {stage.channels, 1, 1}, last); };
  const Problem p = problem(true);
  const int64_t depthwise = p.depthwise_kernel ? p.out_channels : 0;
  const InferArgs args{
      .x = {},
      .primary_weight = get(primary_weight, {p.primary, p.in_channels, p.primary_kernel, p.primary_kernel},
                            w.scalar_type(), "primary_weight"),
      .cheap_weight = get(cheap_weight, {p.cheap(), 1, p.kernel, p.kernel}, w.scalar_type(), "cheap_weight"),
      .primary = {nullptr, nullptr, get(scale, {p.primary}, type, "scale"), get(shift, {p.primary}, type, "shift")},
      .cheap = {nullptr, nullptr, get(cheap_scale, {p.cheap()}, type, "cheap_scale"),
                get(cheap_shift, {p.cheap()}, type, "cheap_shift")},
      .out = {},
      .depthwise_weight = get(depthwise_weight, {depthwise, 1, p.depthwise_kernel, p.depthwise_kernel}, w.scalar_type(),
                              "depthwise_weight"),
      .depthwise = {nullptr, nullptr, get(depthwise_scale, {depthwise}, type, "depthwise_scale"),
                    get(depthwise_shift, {depthwise}, type, "depthwise_shift")}};
  // For channels_last; where the unit stands alone for NCHW too, whose constants differ with pairs of bf16, and as they
  // were.
  const Header last = header_of(p, false), planar = header_of(problem(false), true);
  const int64_t bytes = kAlignment + last.bytes + (alone ? kAlignment + planar.bytes + planar.plain_bytes : 0);
  Tensor packed = new_tensor(w, {bytes}, ScalarType::Byte);
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  auto write = [&](const Header& header, const Problem& problem) {
    std::memcpy(to, &header, sizeof header);
    to += kAlignment;
    std::memset(to, 0, header.bytes);
    cpu_kernels().pack(problem, args, to);
    to += header.bytes;
  };
  write(last, p);
  if (!alone) return packed;
  write(planar, problem(false));
  std::memset(to, 0, planar.plain_bytes);
  const Plain plain(p);
  const void* const parts[] = {args.primary_weight, args.cheap_weight, args.primary.weight,
                               args.primary.bias,   args.cheap.weight, args.cheap.bias};
  for (int i = 0; i < Plain::kParts; ++i)
    if (parts[i]) std::memcpy(to + plain.at[i], parts[i], plain.bytes[i]);
  return packed;
}

// Where `packed` has the constants of one stage, and the headers that say so.
struct Constants {
  int64_t data = kNone, plain = kNone;  // offsets

  Constants() = default;  // of a stage that has none

  Constants(const char* packed, int64_t bytes, int64_t offset, const Problem& p, bool alone,
            std::vector<std::pair<int64_t, Header>>& headers) {
    auto read = [&](const Problem& problem, bool has_plain) {
      const Header wanted = header_of(problem, has_plain);
      STD_TORCH_CHECK(0 <= offset && offset <= bytes - kAlignment && offset % kAlignment == 0,
                      "the constants do not belong to the program");
      Header found;
      std::memcpy(&found, packed + offset, sizeof found);
      found.instruction_set[sizeof found.instruction_set - 1] = 0;
      for (char& c : found.instruction_set)
        if (c && !std::isalnum(static_cast<unsigned char>(c))) c = '?';
      STD_TORCH_CHECK(std::strcmp(found.instruction_set, wanted.instruction_set) == 0, "the network was frozen for ",
                      found.instruction_set, " and this process uses ", wanted.instruction_set,
                      ": freeze it here, or set FIF_OPS_CPU_ISA");
      STD_TORCH_CHECK(
          std::memcmp(&found, &wanted, sizeof found) == 0 &&
              wanted.bytes + wanted.plain_bytes <= bytes - kAlignment - offset,
          "the constants do not belong to the program, or not to x's dtype, or another version packed them");
      headers.emplace_back(offset, wanted);
      data = offset + kAlignment;
      plain = has_plain ? data + wanted.bytes : kNone;
      offset += kAlignment + wanted.bytes + wanted.plain_bytes;
    };
    Problem last = p;
    last.channels_last = true;
    read(last, false);
    if (alone && !p.channels_last) read(p, true);
  }
};

// Fresh memory for x's dtype, without the dispatcher: a call on small maps is a matter of microseconds.
Tensor fresh_maps(const Tensor& x, int64_t batch, Size size, bool channels_last) {
  const auto [c, h, w] = size;
  const int64_t sizes[] = {batch, c, h, w}, planar[] = {c * h * w, h * w, w, 1}, last[] = {c * h * w, 1, w * c, c};
  AtenTensorHandle handle = nullptr;
  const auto error =
      aoti_torch_empty_strided(4, sizes, channels_last ? last : planar, static_cast<int32_t>(x.scalar_type()),
                               aoti_torch_device_type_cpu(), 0, &handle);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "no memory for a result of ", batch * size.count(), " values");
  return Tensor(handle);
}

// A stage after all checks. Where it pools, the problem has the input's sizes alone.
struct Step {
  Stage stage;
  Problem problem;
  Size in, out;
  Constants constants;
};

// The constants themselves, or a copy where they do not lie as the kernels' numbers must, as in a slice of a file.
Tensor aligned(const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 &&
                      packed.is_contiguous() && packed.const_data_ptr() != nullptr,  // null if its storage was emptied
                  "packed must be what fif_ops.freeze made");
  if (reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % sizeof(double) == 0) return packed;
  Tensor copy = new_tensor(packed, {packed.numel()}, ScalarType::Byte);
  std::memcpy(copy.mutable_data_ptr(), packed.const_data_ptr(), packed.numel());
  return copy;
}

// What a plan depends on, beside the numbers of the program and the headers of the constants.
struct Call {
  int64_t batch, channels, height, width;  // of x
  Dtype dtype;
  bool given_last;  // whether x is in channels_last
  int64_t out_channels, stride, packed_bytes;

  bool operator==(const Call&) const = default;
};

// A program after all checks, for inputs of one size: everything is checked before anything is computed.
class Plan {
 public:
  Plan(const Call& call, const int64_t* program, int64_t stages, const char* packed);

  // Whether a plan made now would be this one.
  bool holds(const Call& call, const int64_t* program, int64_t stages, const char* packed) const {
    if (call_ != call || static_cast<int64_t>(program_.size()) != stages * kFields ||
        std::memcmp(program_.data(), program, program_.size() * sizeof *program) != 0)
      return false;
    for (const auto& [offset, header] : headers_)
      if (std::memcmp(packed + offset, &header, sizeof header) != 0) return false;
    return true;
  }
  Tensor run(const Tensor& x, const char* packed) const;

 private:
  Call call_;
  std::vector<int64_t> program_;
  std::vector<std::pair<int64_t, Header>> headers_;  // and their offsets
  std::vector<Step> steps_;
  std::vector<int64_t> places_;  // of the slots in scratch memory
  int64_t scratch_bytes_ = 0;
  Size result_{};
  bool last_;  // whether the stages' maps are channels_last
};

Plan::Plan(const Call& call, const int64_t* program, int64_t stages, const char* packed)
    : call_(call), program_(program, program + stages * kFields) {
  struct Slot {
    Size size{};
    int64_t most = 0;  // elements of one image that it ever holds
    bool written = false;
  };
  const bool alone = stages == 1 && is_unit(stage_of(program, 0));
  last_ = call.given_last || !alone;
  const Size whole{call.channels, call.height, call.width};
  std::vector<Slot> slots(stages);
  steps_.reserve(stages);
  auto size_of = [&](int64_t slot) {
    STD_TORCH_CHECK(kEnds <= slot && slot < stages && (slot == kEnds || slots[slot].written),
                    "a stage reads what none before it wrote");
    return slot == kEnds ? whole : slots[slot].size;
  };
  for (int64_t i = 0; i < stages; ++i) {
    const Stage s = stage_of(program, i);
    const Size in = size_of(s.in);
    Size out{s.channels, 1, 1};
    Problem p{};
    Constants constants;
    if (s.kind == kPool) {
      STD_TORCH_CHECK(s.channels == in.channels && s.add == kNone, "pooling takes ", s.channels, " channels and gets ",
                      in.channels);
      p.batch = call.batch;
      p.in_channels = s.channels;
      p.in_height = in.height;
      p.in_width = in.width;
      p.dtype = call.dtype;
    } else {
      STD_TORCH_CHECK(s.kind == kUnit, "a stage of unknown kind ", s.kind);
      p = problem_of(s, call.dtype, call.batch, in, last_);
      constants = Constants(packed, call.packed_bytes, s.offset, p, alone, headers_);
      out = {p.out_channels, after(p.height, p.depthwise_stride), after(p.width, p.depthwise_stride)};
    }
    STD_TORCH_CHECK(double(out.channels) * double(out.height) * double(out.width) * double(call.batch) < 1e14,
                    "x is too large: a stage would make maps of more than 10^14 values");
    if (s.add != kNone) {
      const Size add = size_of(s.add);
      STD_TORCH_CHECK(
          add.channels == out.channels && add.height == out.height && add.width == out.width && s.depthwise_kernel == 0,
          "a stage adds maps of another size");
    }
    STD_TORCH_CHECK(s.out == kEnds ? i == stages - 1 : 0 <= s.out && s.out < stages && s.out != s.in && s.out != s.add,
                    "a stage writes where it reads, or not to a slot");
    steps_.push_back({s, p, in, out, constants});
    if (s.out != kEnds) {
      slots[s.out].size = out;
      slots[s.out].most = std::max(slots[s.out].most, out.count());
      slots[s.out].written = true;
    }
  }
  result_ = steps_.back().out;
  const int64_t stride = call.stride;
  const Size wanted{call.out_channels, stride ? after(whole.height, stride) : 1,
                    stride ? after(whole.width, stride) : 1};
  STD_TORCH_CHECK(steps_.back().stage.out == kEnds && result_.channels == wanted.channels &&
                      result_.height == wanted.height && result_.width == wanted.width,
                  "the program's result has other sizes than out_channels and stride say");
  places_.reserve(stages);
  for (const Slot& slot : slots) {
    places_.push_back(scratch_bytes_);
    scratch_bytes_ += aligned(slot.most * call.batch * element_size(call.dtype));
  }
}

Tensor Plan::run(const Tensor& x, const char* packed) const {
  const bool one_pixel = result_.height == 1 && result_.width == 1;  // where the formats are one
  Tensor out = fresh_maps(x, call_.batch, result_, one_pixel ? call_.given_last : last_);
  if (call_.batch == 0) return out;
  const Tensor input_map = regular(x, last_);
  void* memory = nullptr;
  if (scratch_bytes_ > 0 && posix_memalign(&memory, kAlignment, static_cast<size_t>(scratch_bytes_)) != 0)
    throw std::bad_alloc();
  const std::unique_ptr<void, decltype(&std::free)> owner(memory, &std::free);
  char* const scratch = static_cast<char*>(memory);
  auto slot_map = [&](int64_t slot, Size size) { return Output{scratch + places_[slot], size.count(), size.channels}; };
  auto map_of = [&](int64_t slot, Size size) {
    if (slot == kEnds) return input(input_map, last_);
    const Output map = slot_map(slot, size);
    return Input{map.data, map.batch, map.step};
  };
  // A result of one pixel is dense in either format, whichever its strides say.
  const Output ends =
      one_pixel ? Output{out.mutable_data_ptr(), result_.channels, last_ ? result_.channels : 1} : output(out, last_);
  for (const Step& step : steps_) {
    const Stage& s = step.stage;
    Problem p = step.problem;
    InferArgs args{};
    args.x = map_of(s.in, step.in);
    if (s.add != kNone) args.add = map_of(s.add, step.out);
    args.out = s.out == kEnds ? ends : slot_map(s.out, step.out);
    if (s.kind == kPool) {
      cpu_kernels().pool(p, args, cpu_threads(p));
      continue;
    }
    args.packed = packed + step.constants.data;
    if (step.constants.plain != kNone) {
      const char* found = packed + step.constants.plain;
      const auto [weight, cheap_weight, scale, shift, cheap_scale, cheap_shift, end] = Plain(p).at;
      args.primary_weight = found + weight;
      args.cheap_weight = found + cheap_weight;
      args.primary = {nullptr, nullptr, found + scale, found + shift};
      args.cheap = {nullptr, nullptr, found + cheap_scale, found + cheap_shift};
    }
    // A product alone takes the pixels of all images as those of one.
    const bool pointwise =
        p.channels_last && p.primary_kernel == 1 && p.stride == 1 && p.multiplier == 0 && p.depthwise_kernel == 0;
    auto dense = [&](const auto& map) { return !map.data || map.batch == p.pixels() * map.step; };
    if (pointwise && dense(args.x) && dense(args.add) && dense(args.out)) {
      p.height *= p.batch;
      p.in_height *= p.batch;
      p.batch = 1;
    }
    cpu_kernels().infer(p, args, cpu_threads(p));
  }
  return last_ == call_.given_last || one_pixel ? out : torch::stable::contiguous(out);
}

// Plans of earlier calls, since on small maps making one takes longer than computing what it says.
class Plans {
 public:
  using Pointer = std::shared_ptr<const Plan>;

  // Never destroyed: a thread may still compute while the process ends.
  static Plans& get() {
    static Plans* const plans = new Plans;
    return *plans;
  }
  // `place` is where a call looks; any plan may lie there, or none. Who would have to wait (or, in a child of fork,
  // would wait forever) goes on without.
  Pointer find(uint64_t place) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    const auto found = plans_.find(place);
    return found == plans_.end() ? nullptr : found->second;
  }
  void keep(uint64_t place, Pointer plan) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    if (plans_.size() >= kMost) plans_.clear();
    plans_[place] = std::move(plan);
  }

 private:
  static constexpr size_t kMost = 256;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Pointer> plans_;
};

}  // namespace

Tensor run(const Tensor& x, const Tensor& program, const Tensor& given, int64_t out_channels, int64_t stride) {
  check_program(program);
  const Tensor packed = aligned(given);
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  STD_TORCH_CHECK(x.dim() == 4, "x must have 4 dimensions (B, C, H, W), got ", x.dim());
  const Call call{x.size(0),           x.size(1),    x.size(2), x.size(3),     dtype_of(x, "x"),
                  is_channels_last(x), out_channels, stride,    packed.numel()};
  STD_TORCH_CHECK(call.channels > 0 && call.height > 0 && call.width > 0, "x must have channels and pixels");
  STD_TORCH_CHECK(call.height < (1 << 24) && call.width < (1 << 24), "x's height and width must be below 2^24");
  const int64_t stages = program.size(0);
  const auto* table = static_cast<const int64_t*>(program.const_data_ptr());
  const auto* constants = static_cast<const char*>(packed.const_data_ptr());
  uint64_t place = reinterpret_cast<uintptr_t>(table);
  for (int64_t n : {call.batch, call.channels, call.height, call.width, int64_t(call.given_last)})
    place = (place ^ static_cast<uint64_t>(n)) * 0x9e3779b97f4a7c15;
  Plans::Pointer plan = Plans::get().find(place);
  if (!plan || !plan->holds(call, table, stages, constants)) {
    plan = std::make_shared<const Plan>(call, table, stages, constants);
    Plans::get().keep(place, plan);
  }
  return plan->run(x, constants);
}

}  // namespace fif

STABLE_TORCH_LIBRARY_FRAGMENT(fif_ops, m) {
  m.def(
      "pack(Tensor program, Tensor primary_weight, Tensor? cheap_weight, Tensor? depthwise_weight, Tensor scale, "
      "Tensor shift, Tensor? cheap_scale, Tensor? cheap_shift, Tensor? depthwise_scale, Tensor? depthwise_shift) "
      "-> Tensor");
  m.def("run(Tensor x, Tensor program, Tensor packed, int out_channels, int stride) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fif_ops, CPU, m) {
  m.impl("pack", TORCH_BOX(&fif::pack));
  m.impl("run", TORCH_BOX(&fif::run));
}

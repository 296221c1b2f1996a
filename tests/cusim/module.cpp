// Python's way to the CUDA kernels on the CPU: the sources of csrc/cuda over the simulator, called with raw pointers.
#include <pybind11/pybind11.h>

#include "cuda/infer.h"
#include "engine.h"

namespace py = pybind11;
using namespace fif;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }

gpu::NormPointers norm(py::dict d) {
  auto at = [&](const char* key) { return pointer(d[key].cast<uintptr_t>()); };
  return {at("conv_bias"),           at("weight"), at("bias"), at("mean"), at("variance"), d["eps"].cast<float>(),
          d["is_float"].cast<bool>()};
}

template <class M>
M map(py::dict d) {
  M m;
  m.data = reinterpret_cast<decltype(m.data)>(d["data"].cast<uintptr_t>());
  m.batch = d["batch"].cast<int64_t>();
  m.step = d["step"].cast<int64_t>();
  return m;
}

gpu::InferCall call_of(py::dict d) {
  auto number = [&](const char* key) { return d[key].cast<int64_t>(); };
  gpu::InferCall call{};
  call.p = Problem{.batch = number("batch"),
                   .in_channels = number("in_channels"),
                   .height = number("height"),
                   .width = number("width"),
                   .primary = number("primary"),
                   .multiplier = number("multiplier"),
                   .out_channels = number("out_channels"),
                   .kernel = int(number("kernel")),
                   .activation = static_cast<Activation>(number("activation")),
                   .splice = number("splice") != 0,
                   .channels_last = number("channels_last") != 0,
                   .dtype = static_cast<Dtype>(number("dtype"))};
  call.x = map<Input>(d["x"]);
  call.out = map<Output>(d["out"]);
  call.primary_weight = pointer(number("primary_weight"));
  call.cheap_weight = pointer(number("cheap_weight"));
  call.primary = norm(d["primary_norm"]);
  call.cheap = norm(d["cheap_norm"]);
  call.plan = gpu::plan_inference(call.p, call.x);
  return call;
}

}  // namespace

PYBIND11_MODULE(cuda_sim, m) {
  m.def("infer", [](py::dict d) {
    const gpu::InferCall call = call_of(d);
    const cudaError_t error = gpu::launch_inference(call, nullptr);
    if (error != cudaSuccess) throw std::runtime_error("launch: " + std::to_string(int(error)));
    py::dict plan;
    plan["tile"] = py::make_tuple(call.plan.tile_h, call.plan.tile_w);
    plan["vector"] = call.plan.vector;
    plan["channels"] = call.plan.channels;
    plan["shared"] = gpu::inference_shared_bytes(call);
    plan["blocks"] = py::make_tuple(call.plan.blocks_x, call.plan.blocks_y);
    return plan;
  });
}

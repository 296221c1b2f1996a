// The operators of csrc/cuda over the simulator, as torch.ops.fif_ops_simulated, and Python's hold on the simulator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "engine.h"
#include "operators.h"

namespace py = pybind11;

STABLE_TORCH_LIBRARY(fif_ops_simulated, m) { fif::define_operators(m); }

PYBIND11_MODULE(cuda_sim, m) {
  m.def("reset_launches", &cusim::reset_launches);
  m.def("launches", [] {
    std::vector<std::tuple<std::string, unsigned, unsigned>> all;  // kernel, blocks along x and y
    for (const cusim::Launch& launch : cusim::launches()) all.emplace_back(launch.name, launch.grid.x, launch.grid.y);
    return all;
  });
  m.def("set_dry_run", [](bool dry) { cusim::settings().dry_run = dry; });
  // Few multiprocessors make persistent blocks go round; little shared memory makes small tiles.
  m.def("set_device", [](int multiprocessors, int shared_per_block, int shared_per_multiprocessor) {
    cusim::Device& device = cusim::settings().device;
    device.sm_count = multiprocessors;
    device.shared_optin = shared_per_block;
    device.shared_per_sm = shared_per_multiprocessor;
  });
}

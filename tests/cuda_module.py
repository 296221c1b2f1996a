"""Builds the CUDA operators over the simulator, with ninja: torch.ops.fif_ops_simulated, which take CPU tensors."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from cusim import toolchain

from fif_ops import backends, ops

ROOT = Path(__file__).parents[1]
# What FIF_OPS_CUSIM_MODE may be. Without optimisation the sanitized modules compile in seconds, and nothing is optimised
# away before it is checked.
MODES = {
    "plain": "-O2",
    "address": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "thread": "-O0 -g1 -fsanitize=thread",
    "coverage": "-O0 --coverage",
}
MULTIPROCESSORS = 2  # so few that blocks go round
MODE = os.environ.get("FIF_OPS_CUSIM_MODE", "plain")


class Simulated(type(backends.BACKENDS["cuda"])):
    """The backend of GPUs, on CPU tensors."""

    device = "cpu"
    namespace = "fif_ops_simulated"

    def unavailable(self):
        return ""

    def device_reason(self, x):
        return ""

    def device_sizes(self, x):
        return MULTIPROCESSORS, 227 << 10, 228 << 10


def build(mode=MODE, root=ROOT):
    """The module of a mode, rebuilt as far as the sources in `root` have changed."""
    import pybind11
    from torch.utils.cpp_extension import include_paths, library_paths

    compiler, folder = os.environ.get("CXX", "g++"), f"build/cusim/{mode}"
    system = (toolchain.cuda_include(), sysconfig.get_path("include"), pybind11.get_include(), *include_paths())
    includes = " ".join(["-I tests/cusim/host -I csrc -I tests/cusim", *(f"-isystem {path}" for path in system)])
    torch_flags = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL -DTORCH_STABLE_ONLY"
    flags = f"-std=c++20 {MODES[mode]} -fno-strict-aliasing -w -fPIC -fvisibility=hidden {torch_flags} {includes}"
    libraries = " ".join([*(f"-L{path}" for path in library_paths()), "-ltorch_cpu -ltorch -lc10"])
    own = [*sorted((root / "csrc/cuda").glob("*.cu")), *sorted((root / "csrc/cuda").glob("*.cpp"))]
    sources = [*own, root / "csrc/operators.cpp", root / "tests/cusim/module.cpp"]
    lines = [
        f"rule compile\n  command = {compiler} {flags} -include tests/cusim/cusim.h -x c++ "
        "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} {MODES[mode]} -shared $in -o $out {libraries}",
        *(f"build {folder}/{s.stem}.o: compile {s.relative_to(root)}" for s in sources),
        f"build {folder}/cuda_sim.so: link {' '.join(f'{folder}/{s.stem}.o' for s in sources)}",
    ]
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / "build.ninja").write_text(f"builddir = {folder}\n" + "\n".join(lines) + "\n")
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    command = [ninja, "-f", f"{folder}/build.ninja", "-j2", "--quiet"]
    # The compiler is not to run under a sanitizer that this process may have been started with.
    subprocess.run(command, cwd=root, env={**os.environ, "LD_PRELOAD": ""}, check=True)
    return root / folder / "cuda_sim.so"


def load():
    """The module of the mode that FIF_OPS_CUSIM_MODE names, built first."""
    path = build()
    torch.ops.load_library(path)
    for name in ("infer", "train", "backward"):
        torch.library.register_fake(f"fif_ops_simulated::{name}", getattr(ops, f"fake_{name}"))
    spec = importlib.util.spec_from_file_location("cuda_sim", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

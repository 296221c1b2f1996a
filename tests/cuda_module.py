"""Builds the CUDA sources over the simulator as a Python module, with ninja, and calls its kernels on torch tensors."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from cusim import toolchain

from fif_ops.ops import ACTIVATION_CODES
from fif_ops.reference import memory_format_of

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build/cusim"
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}


def load():
    """The module, rebuilt as far as its sources have changed."""
    import pybind11

    includes = f"-I csrc -I tests/cusim -isystem {toolchain.cuda_include()} -isystem {sysconfig.get_path('include')}"
    flags = (
        f"-std=c++20 -O2 -fno-strict-aliasing -w -fPIC -fvisibility=hidden {includes} -isystem {pybind11.get_include()}"
    )
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), ROOT / "tests/cusim/module.cpp"]
    lines = [
        f"rule compile\n  command = {os.environ.get('CXX', 'g++')} {flags} -include tests/cusim/cusim.h -x c++ "
        "-MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {os.environ.get('CXX', 'g++')} -shared $in -o $out",
        *(f"build {FOLDER}/{s.stem}.o: compile {s.relative_to(ROOT)}" for s in sources),
        f"build {FOLDER}/cuda_sim.so: link {' '.join(f'{FOLDER}/{s.stem}.o' for s in sources)}",
    ]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "build.ninja").write_text(f"builddir = {FOLDER}\n" + "\n".join(lines) + "\n")
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    subprocess.run([ninja, "-f", FOLDER / "build.ninja", "-j2", "--quiet"], cwd=ROOT, check=True)
    spec = importlib.util.spec_from_file_location("cuda_sim", FOLDER / "cuda_sim.so")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def infer(module, x, primary_weight, cheap_weight, *, primary_norm, cheap_norm, out_channels, activation, splice):
    """One launch on the simulator: the output, NaN where the kernel wrote nothing, and the plan that it followed."""
    last = memory_format_of(x) == torch.channels_last
    layout = torch.channels_last if last else torch.contiguous_format
    size = (x.shape[0], out_channels, *x.shape[2:])
    out = torch.full(size, float("nan"), dtype=x.dtype).contiguous(memory_format=layout)

    def pointer(t):
        return 0 if t is None else t.data_ptr()

    def norm(n):
        return {
            "conv_bias": 0,
            "weight": pointer(n.weight),
            "bias": pointer(n.bias),
            "mean": pointer(n.running_mean),
            "variance": pointer(n.running_var),
            "eps": n.eps,
            "is_float": n.running_mean.dtype == torch.float32,
        }

    def tensor(t):
        step = t.stride(1)
        if last:
            step = t.stride(3) if t.shape[3] > 1 else t.stride(2) if t.shape[2] > 1 else t.shape[1]
        return {"data": t.data_ptr(), "batch": t.stride(0), "step": step}

    plan = module.infer(
        {
            "batch": x.shape[0],
            "in_channels": x.shape[1],
            "height": x.shape[2],
            "width": x.shape[3],
            "primary": primary_weight.shape[0],
            "multiplier": cheap_weight.shape[0] // primary_weight.shape[0],
            "out_channels": out_channels,
            "kernel": cheap_weight.shape[2],
            "activation": ACTIVATION_CODES[activation],
            "splice": splice,
            "channels_last": last,
            "dtype": DTYPES[x.dtype],
            "x": tensor(x),
            "out": tensor(out),
            "primary_weight": pointer(primary_weight),
            "cheap_weight": pointer(cheap_weight),
            "primary_norm": norm(primary_norm),
            "cheap_norm": norm(cheap_norm),
        }
    )
    return out, plan

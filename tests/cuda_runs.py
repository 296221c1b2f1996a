"""Runs the tests of the CUDA kernels on the CPU in processes of their own: under a sanitizer, in an order of threads, or
counting lines; and reads what such a run leaves."""

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import cuda_module
from cusim import toolchain

ROOT = cuda_module.ROOT
TESTS = "tests/test_cuda_kernels.py"
RUNTIMES = {"address": ["libasan.so", "libubsan.so"], "thread": ["libtsan.so"]}
TYPES = {"__half": "f16", "__nv_bfloat16": "bf16", "float": "f32"}


def run_tests(mode, order=0, root=ROOT, **environment):
    """The finished pytest, with what it printed; the module is built first, outside of the sanitizer."""
    cuda_module.build(mode, root)
    named = [f"-print-file-name={name}" for name in RUNTIMES.get(mode, [])]
    runtimes = [subprocess.check_output([toolchain.compiler(), name], text=True).strip() for name in named]
    variables = {
        "LD_PRELOAD": " ".join(runtimes),
        "FIF_OPS_CUSIM_MODE": mode,
        "CUSIM_ORDER": order,
        "OMP_NUM_THREADS": 1,
        **environment,
    }
    # By way of env, so that what comes before it (setarch) runs without the sanitizer.
    command = ["env", *(f"{name}={value}" for name, value in variables.items()), sys.executable, "-m", "pytest"]
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", root / TESTS]  # -s: or a report dies with the process
    done = toolchain.run(mode if mode in RUNTIMES else "plain", *command, *options, timeout=900)
    done.stdout = done.stdout.encode("latin-1").decode(errors="replace")
    return done


def instance(demangled):
    """What a kernel is called in tables, from the name that a compiler gives it; None for other functions.

    >>> instance("void fif::gpu::(anonymous namespace)::infer_kernel<__half, true, 3, 64>(fif::gpu::InferCall)")
    'infer_kernel<f16, nhwc, 3, 64>'
    """
    found = re.search(r"(\w+_kernel)(?:<([^<>]*)>)?\([^()]*\)$", demangled)
    if found is None or found[2] is None:
        return found and found[1]
    arguments = [re.sub(r"\((?:bool|int)\)", "", argument.strip()) for argument in found[2].split(",")]
    dtype, *others = [TYPES.get(argument, argument) for argument in arguments]
    if others and others[0] in ("true", "false"):  # by convention the layout stands behind the type
        others[0] = "nhwc" if others[0] == "true" else "nchw"
    return f"{found[1]}<{', '.join([dtype, *others])}>"


class Coverage(NamedTuple):
    lines: dict[str, dict[int, int]]  # of each source and header of kernels: how often each line with code ran
    kernels: dict[str, int]  # how often each kernel instance was entered, over all threads
    launches: dict[str, list[tuple[int, int]]]  # threads of a block and bytes of dynamic shared memory, per instance


def read_gcov(folder):
    """Lines and kernels that the objects in `folder` have counted."""
    lines, kernels = defaultdict(Counter), Counter()
    data = sorted(path.name for path in folder.glob("*.gcda"))
    gcov = str(toolchain.compiler()).replace("g++", "gcov")
    done = subprocess.run([gcov, "--json-format", "--stdout", *data], cwd=folder, capture_output=True, check=True)
    for line in done.stdout.splitlines():
        for file in json.loads(line)["files"]:
            path = Path(os.path.normpath(ROOT / file["file"]))
            if path.parent != ROOT / "csrc/cuda" or "FIF_DEVICE" not in path.read_text():
                continue  # the host's
            for entry in file["lines"]:
                lines[path.name][entry["line_number"]] += entry["count"]
            for function in file["functions"]:
                if name := instance(function["demangled_name"]):
                    kernels[name] += function["execution_count"]
    return lines, kernels


def read_launches(log, library):
    """The log of launches that CUSIM_LAUNCHES asks for (tests/cusim/engine.h), by kernel instance."""
    symbols = subprocess.check_output(["nm", "-C", "--defined-only", library], text=True).splitlines()
    names = {int(address, 16): instance(name) for address, _, name in (line.split(maxsplit=2) for line in symbols)}
    launches = defaultdict(set)
    for address, threads, shared in (line.split() for line in log.read_text().splitlines()):
        launches[names[int(address, 16)]].add((int(threads), int(shared)))
    return {name: sorted(found) for name, found in sorted(launches.items())}


@functools.cache
def coverage():
    """Lines, kernels and launches of the kernels' tests."""
    folder = cuda_module.build("coverage").parent
    for old in folder.glob("*.gcda"):
        old.unlink()
    log = folder / "launches.txt"
    log.write_text("")
    done = run_tests("coverage", CUSIM_LAUNCHES=log)
    assert done.returncode == 0, done.stdout + done.stderr
    return Coverage(*read_gcov(folder), read_launches(log, folder / "cuda_sim.so"))

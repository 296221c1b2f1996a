"""Puts the binary library into the package: that of a wheel, a given one, or one built here for the GPU at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from . import budget
from .supervisor import ROOT, start, wait

FILES = ("_C.so", "_build_info.json")


def take(source: Path, package: Path) -> None:
    """Copies library and build record from a wheel, or from the folder of a library, into the package.

    Raises FileNotFoundError, naming what is missing.
    """
    with tempfile.TemporaryDirectory() as unpacked:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                held = {f"fif_ops/{name}" for name in FILES} & set(wheel.namelist())
                wheel.extractall(unpacked, held)
            folder = Path(unpacked, "fif_ops")
        else:
            folder = source if source.is_dir() else source.parent
        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{source} has no {name}; build one with python setup.py build_kernels")
        if folder.resolve() == package.resolve():
            return
        for name in FILES:
            # A process may have the old library mapped: replace the file, never write into it.
            shutil.copyfile(folder / name, package / f"{name}.new")
            os.replace(package / f"{name}.new", package / name)


def build(deadline: float, logs: Path) -> None:
    """Builds for the GPUs at hand and takes the result. Raises RuntimeError if that fails or takes too long."""
    archs = os.environ.get("FIF_OPS_CUDA_ARCHS", "").strip() or _capabilities()
    begun = time.time()
    lib = ROOT / "build/gpu/lib"
    command = [sys.executable, "setup.py", "-q", "build", f"--build-lib={lib}"]
    log = logs / "build.log"
    with log.open("w") as output:
        process = start(command, output, FIF_OPS_CUDA_ARCHS=archs, FIF_OPS_REQUIRE_KERNELS="1")
        why = wait(process, deadline)
    if why or process.returncode:
        last = "\n".join(log.read_text().splitlines()[-15:])
        raise RuntimeError(f"the library was not built ({why or process.returncode}):\n{last}")
    take(lib / "fif_ops", ROOT / "fif_ops")
    found = json.loads((ROOT / "fif_ops" / FILES[1]).read_text())["cuda_archs"]
    if not found and not os.environ.get("FIF_OPS_SKIP_CUDA"):
        raise RuntimeError(f"the library was built without kernels for GPUs: no nvcc; see {log}")
    budget.say(f"  built in {time.time() - begun:.0f} s, for GPUs of {', '.join(found) or 'no kind'}")


def _capabilities() -> str:
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return " ".join(sorted(set(found)))

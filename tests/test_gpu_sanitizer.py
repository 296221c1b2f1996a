"""Small shapes under NVIDIA's compute-sanitizer: accesses outside of memory, and races on shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_support import gpu_only, needs_device

pytest_plugins = ["gpu_support"]
pytestmark = [needs_device, gpu_only]
FOUND = 86  # exit status where the sanitizer reports something


def sanitizer():
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = [os.environ.get("PATH", os.defpath), *(f"{home}/bin" for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_nothing_is_reported(gpu_backend, tool):
    command = sanitizer()
    if command is None:
        pytest.skip("no compute-sanitizer on the path")
    program = [sys.executable, Path(__file__).with_name("gpu_program.py"), "small", gpu_backend]
    done = subprocess.run(
        [command, "--tool", tool, f"--error-exitcode={FOUND}", "--print-limit=5", *program],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that every tensor has bounds of its own
    )
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this device here")
    assert done.returncode == 0 and "done" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]

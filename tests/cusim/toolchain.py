"""Compile CUDA sources for the CPU over the simulator, plain or sanitized, and run the result."""

from __future__ import annotations

import functools
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MODES = {
    "plain": ["-O2"],
    "address": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}
ENVIRONMENT = {
    "plain": {},
    "address": {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    "thread": {"TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0"},
}
UNMAPPABLE = "unexpected memory mapping"  # what older ThreadSanitizers say where addresses are very random


@functools.cache
def compiler() -> str | None:
    """The GCC in CXX or on the path: its sanitizers announce themselves by macros."""
    for name in (os.environ.get("CXX", "g++"), "g++"):
        path = shutil.which(name)
        if path is None:
            continue
        macros = subprocess.run(
            [path, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False
        )
        if "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout:
            return path
    return None


@functools.cache
def cuda_include() -> Path | None:
    """The folder of the CUDA toolkit's headers, from CUDA_HOME, CUDA_PATH, or where nvcc says that it is at home."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        homes += [Path(top) for top in re.findall(r"^#\$ TOP=(.*)$", said, re.MULTILINE)]
        homes.append(Path(nvcc).resolve().parent.parent)
    homes.append(Path("/usr/local/cuda"))
    found = [home / "include" for home in homes if (home / "include" / "cuda_fp16.h").is_file()]
    return found[0].resolve() if found else None


@functools.cache
def missing(mode: str = "plain") -> str | None:
    """Why nothing can be built in this mode here, or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the simulator of CUDA threads is made for Linux on x86-64"
    if compiler() is None:
        return "no GCC: install g++ 11 or newer, or set CXX"
    if cuda_include() is None:
        return "no CUDA headers (cuda_fp16.h): install the CUDA toolkit, and set CUDA_HOME if nvcc is not on the path"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "probe.cpp"), Path(folder, "probe")
        source.write_text("int main() {}\n")
        done = subprocess.run(
            [str(compiler()), "-std=c++20", *MODES[mode], str(source), "-o", str(program)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            done = run(mode, program)
        return f"{mode}: {done.stderr.strip()[:300]}" if done.returncode != 0 else None


def compile_command(mode: str, *arguments: str | Path) -> list[str]:
    """The compiler's command line for CUDA sources; the rest of it (sources, -o, -c, -shared) is in `arguments`."""
    return [
        str(compiler()),
        "-std=c++20",
        *MODES[mode],
        "-fno-strict-aliasing",
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'tests' / 'cusim'}",
        "-isystem",
        str(cuda_include()),
        "-include",
        "cusim.h",
        "-x",
        "c++",
        *map(str, arguments),
    ]


def run(
    mode: str, program: str | Path, *arguments: object, data: bytes | None = None, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """The finished process; with `data` on its standard input, standard output is bytes (latin-1 text)."""
    command = [str(program), *map(str, arguments)]
    for prefix in ([], ["setarch", "-R"]):
        done = subprocess.run(
            prefix + command,
            input=data,
            capture_output=True,
            env={**os.environ, **ENVIRONMENT[mode]},
            timeout=timeout,
            check=False,
        )
        said = done.stderr.decode(errors="replace")
        if UNMAPPABLE not in said or shutil.which("setarch") is None:
            break
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode("latin-1"), said)

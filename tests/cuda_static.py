"""What nvcc makes of the CUDA kernels: registers, shared memory, local memory and instructions of every instance, for
several architectures, without a GPU.

`python tests/cuda_static.py` prints the table of registers and occupancy, with --write into csrc/cuda/registers.md.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_runs

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/static"
TABLE = ROOT / "csrc/cuda/registers.md"
REWRITE = "make registers"
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
# Bytes of shared memory of a multiprocessor, and at most of a block (CUDA C++ Programming Guide, technical
# specifications per compute capability). A multiprocessor of all of them has 64 warps, 32 blocks, 64 Ki registers.
SHARED = {"80": (164 << 10, 163 << 10), "90": (228 << 10, 227 << 10), "100": (228 << 10, 227 << 10)}
RESERVED = 1024  # bytes of a block's shared memory that the system takes


class Kernel(NamedTuple):
    """One instance in one cubin; sizes in bytes."""

    registers: int
    shared: int  # static
    stack: int
    spills: int  # stores and loads together
    instructions: Mapping[str, int]  # how often each stands there; empty without a disassembler


@functools.cache
def tools() -> tuple[str, str, str, str]:
    """nvcc with the flags of the build, its version as major.minor, and a disassembler; each empty if missing."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    found = build["find_cuda"]()
    if found is None:
        return "", "", "", ""
    nvcc = found[0]
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release (\d+\.\d+)", said)
    places = [Path(nvcc).parent, *Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    command = f"{nvcc} -ccbin {build['find_compiler']()} {build['NVCC_FLAGS']}"
    return command, version[1] if version else "", shutil.which("nvdisasm", path=path) or "", said


def known(arch: str) -> bool:
    nvcc = shlex.split(tools()[0])[0]
    return f"sm_{arch}" in subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout.split()


def with_includes(source: Path) -> set[Path]:
    """The file, and all that it includes by a path of its own."""
    files, left = set(), [source]
    while left:
        file = left.pop().resolve()
        if file not in files and file.is_file():
            files.add(file)
            left += [file.parent / name for name in re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(), re.M)]
    return files


def resources(log: str) -> dict[str, tuple[int, int, int, int]]:
    """Registers, static shared memory, stack and spills of each mangled kernel, from what `ptxas -v` says."""
    found = {}
    for block in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        registers, shared = re.search(r"Used (\d+) registers", block), re.search(r"(\d+) bytes smem", block)
        sizes = int(registers[1]), int(shared[1]) if shared else 0, int(stack), int(stores) + int(loads)
        found[block.split("'")[0]] = sizes
    return found


def instructions(cubin: Path) -> dict[str, Counter[str]]:
    """How often each instruction, with its modifiers, stands in each mangled kernel."""
    found: dict[str, Counter[str]] = {}
    # The disassembler warns of the jump tables, which it cannot follow.
    command = [tools()[2], "-c", "-ndf", cubin]
    text = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True).stdout
    for section in text.split("\t.section\t.text.")[1:]:
        named = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", section, re.M)
        found[re.split(r"[,\s]", section, maxsplit=1)[0]] = Counter(named)
    return found


def compile_one(source: Path, arch: str) -> dict[str, Kernel]:
    """The kernels of a source by their names; compiled only if it, its headers, the flags or the tools have changed."""
    command, _, disassembler, version = tools()
    flags = [*shlex.split(command), f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", str(source.relative_to(ROOT))]
    digest = hashlib.sha256(f"{flags} {version}".encode())
    for file in sorted(with_includes(source)):
        digest.update(file.read_bytes())
    record = FOLDER / f"{source.stem}.sm_{arch}.{digest.hexdigest()[:16]}.json"
    found = json.loads(record.read_text()) if record.is_file() else {}
    if not found or (disassembler and not any(counts for *_, counts in found.values())):
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernels.cubin")
            done = subprocess.run([*flags, "-o", cubin], cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr}")
            counts = instructions(cubin) if disassembler else {}
        sizes = resources(done.stderr)
        names = subprocess.check_output(["c++filt", *sizes], text=True).splitlines()
        found = {name: (*sizes[key], counts.get(key, {})) for name, key in zip(names, sizes, strict=True)}
        FOLDER.mkdir(parents=True, exist_ok=True)
        for old in FOLDER.glob(f"{source.stem}.sm_{arch}.*.json"):
            old.unlink()
        record.write_text(json.dumps(found))
    kernels = {cuda_runs.instance(name) or name: Kernel(*row) for name, row in found.items()}
    return dict(sorted(kernels.items()))


@functools.cache
def compile_all() -> dict[str, dict[str, dict[str, Kernel]]]:
    """The kernels of every architecture that this nvcc knows, and of every source, by their names."""
    jobs = [(arch, source) for arch in SHARED if known(arch) for source in SOURCES]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        done = list(pool.map(lambda job: compile_one(job[1], job[0]), jobs))
    kernels: dict[str, dict[str, dict[str, Kernel]]] = {}
    for (arch, source), found in zip(jobs, done, strict=True):
        kernels.setdefault(arch, {})[source.name] = found
    return kernels


def blocks_per_multiprocessor(arch: str, kernel: Kernel, threads: int, dynamic_shared: int) -> int:
    """As many blocks as warps, registers (dealt out to whole warps, 256 at a time, in four quarters) and shared memory
    (in pieces of 128 bytes) allow; 0 if a block does not fit at all."""
    per_multiprocessor, per_block = SHARED[arch]
    warps = -(-threads // 32)
    registers = -(-kernel.registers * 32 // 256) * 256
    shared = -(-(kernel.shared + dynamic_shared + RESERVED) // 128) * 128
    if kernel.shared + dynamic_shared > per_block:
        return 0
    return min(32, 64 // warps, (1 << 14) // registers * 4 // warps, per_multiprocessor // shared)


def spread(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}-{max(values)}"


def table() -> str:
    """The committed table: of each instance registers / blocks per multiprocessor."""
    launches = cuda_runs.coverage().launches
    archs = list(compile_all())
    lines = [
        "# Registers and occupancy of the CUDA kernels",
        "",
        f"Compiled by nvcc {tools()[1]}. `{REWRITE}` rewrites this file; `tests/test_cuda_static.py` compares it.",
        "Shared memory is that of the launches in `tests/test_cuda_kernels.py`, from the least to the most; per",
        "architecture: registers of a thread / blocks that fit a multiprocessor with it.",
    ]
    for source in SOURCES:
        heads = " | ".join(f"sm_{arch}" for arch in archs)
        lines += ["", f"## {source.name}", "", f"| kernel | threads | shared, KiB | {heads} |"]
        lines += ["|---|---|---|" + "---|" * len(archs)]
        for name in sorted({name for arch in archs for name in compile_all()[arch][source.name]}):
            seen, cells = launches.get(name, []), []
            for arch in archs:
                kernel = compile_all()[arch][source.name].get(name)
                blocks = [blocks_per_multiprocessor(arch, kernel, *launch) for launch in seen] if kernel else []
                cells.append(f"{kernel.registers} / {spread(blocks) if blocks else '?'}" if kernel else "")
            threads = spread([threads for threads, _ in seen]) if seen else "?"
            shared = spread([round(shared / 1024) for _, shared in seen]) if seen else "?"
            lines.append(f"| {name} | {threads} | {shared} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def read_table(text: str) -> tuple[str, dict[tuple[str, str], tuple[int, int]]]:
    """nvcc's version, and of every kernel and architecture the registers and the least number of blocks."""
    version = re.search(r"nvcc (\d+\.\d+)", text)
    figures, archs = {}, []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "kernel":
            archs = [cell.removeprefix("sm_") for cell in cells[3:]]
        elif archs and len(cells) == 3 + len(archs) and not cells[0].startswith("---"):
            for arch, cell in zip(archs, cells[3:], strict=True):
                if found := re.match(r"(\d+) / (\d+|\?)", cell):
                    figures[cells[0], arch] = int(found[1]), 0 if found[2] == "?" else int(found[2])
    return version[1] if version else "", figures


if __name__ == "__main__":
    if "--write" in sys.argv:
        TABLE.write_text(table())
    else:
        print(table())

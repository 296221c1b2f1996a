"""Builds fif_ops/_C.so with ninja: one library for every CPython and every torch from 2.10 on (LibTorch Stable ABI).

Environment:
    CXX                        the C++ compiler; otherwise the first of c++, g++, clang++
    MAX_JOBS                   parallel compiler processes; otherwise one per core and per GiB of free memory
    FIF_OPS_CUDA_ARCHS         GPU architectures, as in "80;90"; otherwise 80 to 120 as far as nvcc knows them
    FIF_OPS_SKIP_CUDA=1        leave out the CUDA kernels although there is an nvcc (CUDA_HOME or the one on the path)
    FIF_OPS_SKIP_KERNELS=1     build the pure-Python package on purpose
    FIF_OPS_REQUIRE_KERNELS=1  fail where the kernels cannot be built, rather than install without them
    FIF_OPS_SANITIZE           sanitizers of `python setup.py build_sanitized` (default: address,undefined)
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NoReturn

import setuptools
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
# No -ffast-math: NaN and infinity must pass through the kernels.
CXX_FLAGS = (
    "-std=c++20 -O2 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra -Icsrc "
    # GCC 12 and 13 warn about their own vector headers.
    "-Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi -Wno-ignored-attributes "
    "-fno-math-errno -fno-trapping-math -ffp-contract=fast"
)
TORCH_FLAGS = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL -DTORCH_STABLE_ONLY"
# Torch's CUDA symbols are weak references, which stay null unless libtorch itself is recorded as needed.
LINK_FLAGS = "-shared -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -Wl,--as-needed -Wl,--exclude-libs,ALL"
X86_ISAS = {
    "baseline": "-march=x86-64-v2",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4",
    "avx512bf16": "-march=x86-64-v4 -mavx512bf16",
    "amx": "-march=x86-64-v4 -mavx512bf16 -mamx-tile -mamx-bf16",
}
# What trains with avx512's kernels, where those are built (csrc/dispatch.cpp), and what it therefore lacks.
INFERS_ONLY = ("avx512bf16", "amx")
TRAINING = ("backward", "depthwise", "strided", "train")
# What sanitizers see: the code of the others, which is the same but for its vectors, would take as long again.
SANITIZED_ISAS = ("baseline", "amx")
NVCC_FLAGS = "-std=c++20 -O3 -Icsrc --compress-mode=size -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_ARCHS = ("80", "86", "89", "90", "100", "120")
ISAS = X86_ISAS if platform.machine() == "x86_64" else {"baseline": ""}


def stop(message: str) -> NoReturn:
    raise SystemExit(f"fif_ops: {message}")


if int(setuptools.__version__.split(".")[0]) < 77:
    stop(f"setuptools {setuptools.__version__} is too old: run `pip install 'setuptools>=77'`")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402  (older setuptools have no such module)


def switched_on(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def find_compiler() -> str:
    """The compiler's command, empty where there is none."""
    named = os.environ.get("CXX", "").strip()
    commands = [named] if named else ["c++", "g++", "clang++"]
    return next((command for command in commands if shutil.which(shlex.split(command)[0])), "")


def why_no_kernels() -> str:
    """The reason for a pure-Python package, empty where the kernels can be built."""
    if switched_on("FIF_OPS_SKIP_KERNELS"):
        return "FIF_OPS_SKIP_KERNELS is set"
    if sys.platform != "linux":
        return f"they are built on Linux only, and this is {sys.platform}"
    if not find_compiler():
        wanted = os.environ.get("CXX", "").strip() or "any of c++, g++, clang++"
        return f"no C++ compiler (looked for {wanted}): install g++ 11 or newer, or set CXX, and install again"
    return ""


def torch_build() -> tuple[str, str, str]:
    """Version, include flags and library flags of the torch to build against."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 10):
        stop(f"torch {torch.__version__} is too old: run `pip install 'torch>=2.10'`, or drop --no-build-isolation")
    includes = " ".join(f"-isystem {shlex.quote(path)}" for path in include_paths())
    return torch.__version__, includes, " ".join(f"-L{shlex.quote(path)}" for path in library_paths())


def find_ninja() -> str:
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which("ninja", path=places)
    return found or stop("ninja is missing: run `pip install ninja`, or drop --no-build-isolation")


def lines_of(*command: str) -> list[str]:
    """The lines that a command prints, none where it fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def first_line(*command: str) -> str:
    return next(iter(lines_of(*command)), "")


def find_cuda() -> tuple[str, Path] | None:
    """nvcc and the toolkit's folder, or None where there is none or FIF_OPS_SKIP_CUDA is set."""
    if switched_on("FIF_OPS_SKIP_CUDA") or not list((ROOT / "csrc/cuda").glob("*.cu")):
        return None
    named = os.environ.get("CUDA_HOME", "").strip()
    nvcc = shutil.which("nvcc", path=f"{named}/bin") if named else shutil.which("nvcc")
    homes = [named, str(Path(nvcc).resolve().parents[1]) if nvcc else "", "/usr/local/cuda"]
    home = next((Path(home) for home in homes if home and Path(home, "include/cuda_runtime.h").is_file()), None)
    if home and not nvcc:
        nvcc = shutil.which("nvcc", path=str(home / "bin"))
    return (nvcc, home) if nvcc and home else None


def check_cuda(nvcc: str) -> None:
    """A driver that torch's CUDA is content with may be too old for kernels of a newer one."""
    import torch

    ours = re.search(r"release (\d+)\.(\d+)", " ".join(lines_of(nvcc, "--version")))
    torchs = torch.version.cuda
    if ours and torchs and int(ours[1]) > int(torchs.split(".")[0]):
        stop(
            f"{nvcc} is of CUDA {ours[1]}.{ours[2]} and torch {torch.__version__} of CUDA {torchs}: set CUDA_HOME to a "
            f"toolkit of CUDA {torchs.split('.')[0]}, or FIF_OPS_SKIP_CUDA=1 to install without kernels for GPUs"
        )


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to build for: FIF_OPS_CUDA_ARCHS, or those of CUDA_ARCHS that this nvcc knows."""
    known = {line[8:] for line in lines_of(nvcc, "--list-gpu-arch")}
    named = os.environ.get("FIF_OPS_CUDA_ARCHS", "").replace(";", " ").replace(",", " ").split()
    wanted = [arch.replace(".", "") for arch in named]
    unknown = [arch for arch in wanted if arch not in known]
    if unknown:
        choice = ", ".join(sorted(known, key=int))
        stop(f"FIF_OPS_CUDA_ARCHS names {', '.join(unknown)}, which {nvcc} does not know: choose from {choice}")
    return wanted or [arch for arch in CUDA_ARCHS if arch in known]


def units(torch_includes: str, isas: list[str]) -> list[tuple[Path, str, str]]:
    """Translation units in link order: source, object, flags.

    The linker keeps the first copy of an inline function that several objects define (templates of the standard
    library, for example). Objects therefore come with the smallest instruction set first, so that no copy with
    AVX-512 instructions is left for a processor without them.
    """
    operators = sorted((ROOT / "csrc").glob("*.cpp"))
    kernels = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
    operator_flags = f"{ISAS['baseline']} {TORCH_FLAGS} {torch_includes}"
    return [
        *((source, f"{source.stem}.o", operator_flags) for source in operators),
        *(
            (source, f"{isa}/{source.stem}.o", f"{ISAS[isa]} -DFIF_ISA={isa}")
            for isa in isas
            for source in kernels
            if isa not in INFERS_ONLY or "avx512" not in isas or source.stem not in TRAINING
        ),
    ]


def cuda_part(folder: str, torch_includes: str) -> tuple[list[str], list[str], str, list[str]]:
    """Lines of build.ninja, objects, link flags and architectures of the CUDA kernels; all empty without an nvcc."""
    found = find_cuda()
    if found is None:
        return [], [], "", []
    nvcc, home = found
    check_cuda(nvcc)
    archs = cuda_archs(nvcc)
    codes = " ".join(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs)
    newest = max(archs, key=int)  # embedded as PTX too, for GPUs to come
    flags = f"{NVCC_FLAGS} {codes} -gencode=arch=compute_{newest},code=compute_{newest}"
    lines = [
        f"rule nvcc\n  command = {nvcc} -ccbin {find_compiler()} {flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = nvcc $out",
    ]
    objects = []
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        objects.append(f"{folder}/cuda/{source.stem}.o")
        lines.append(f"build {objects[-1]}: nvcc {source.relative_to(ROOT)}")
    for source in sorted((ROOT / "csrc/cuda").glob("*.cpp")):
        objects.append(f"{folder}/cuda/{source.stem}.o")
        # What the library says of itself: it may lie elsewhere than the record of its build.
        built_for = f"-D'FIF_CUDA_ARCHS={' '.join(archs)}'"
        unit_flags = f"{ISAS['baseline']} {TORCH_FLAGS} {built_for} {torch_includes} -isystem {home}/include"
        lines.append(f"build {objects[-1]}: compile {source.relative_to(ROOT)}\n  unit_flags = {unit_flags}")
    folders = [path for path in (home / "lib64", home / "lib") if (path / "libcudart_static.a").is_file()]
    return lines, objects, f"-L{folders[0]} -lcudart_static -ldl -lrt -lpthread" if folders else "-lcudart", archs


def ninja_file(
    folder: str, isas: list[str], flags: str, link_flags: str, torch_includes: str, cuda: bool
) -> tuple[str, list[str]]:
    """Text of build.ninja, and the CUDA architectures in it. Sources are relative to the root, so that no path of this
    machine gets into the library."""
    cxx = find_compiler()
    lines = [
        f"rule compile\n  command = {cxx} {CXX_FLAGS} {flags} $unit_flags -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = compile $out",
    ]
    objects = []
    for source, name, unit_flags in units(torch_includes, isas):
        objects.append(f"{folder}/{name}")
        lines.append(f"build {objects[-1]}: compile {source.relative_to(ROOT)}\n  unit_flags = {unit_flags}")
    cuda_lines, cuda_objects, cuda_link, archs = cuda_part(folder, torch_includes) if cuda else ([], [], "", [])
    lines += [
        *cuda_lines,
        f"rule link\n  command = {cxx} -o $out $in {LINK_FLAGS} {link_flags} {cuda_link}\n  description = link $out",
        f"build {folder}/_C.so: link {' '.join([*objects, *cuda_objects])}",
    ]
    return "\n".join([f"builddir = {folder}", *lines, ""]), archs


def job_count() -> int:
    """MAX_JOBS, or one compiler per core and per GiB of memory that is free."""
    named = os.environ.get("MAX_JOBS", "").strip()
    if named:
        return int(named) if named.isdigit() and int(named) else stop(f"MAX_JOBS={named} should be a positive number")
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free_gib = int(memory["MemAvailable"].split()[0]) // 2**20
    return max(1, min(len(os.sched_getaffinity(0)), free_gib))


def build_library(folder: str, isas: list[str], flags: str, link_flags: str, cuda: bool) -> dict[str, object]:
    """Build `folder`/_C.so as far as it is out of date and return the record of what it was built with."""
    version, includes, libraries = torch_build()
    (ROOT / folder).mkdir(parents=True, exist_ok=True)
    text, archs = ninja_file(folder, isas, flags, f"{libraries} {link_flags}", includes, cuda)
    (ROOT / folder / "build.ninja").write_text(text)
    command = [find_ninja(), "-f", f"{folder}/build.ninja", f"-j{job_count()}"]
    if subprocess.run(command, cwd=ROOT, check=False).returncode != 0:
        stop("the kernels did not compile, see above; FIF_OPS_SKIP_KERNELS=1 installs the package without them")
    compiler = first_line(*shlex.split(find_compiler()), "--version")
    return {
        "torch": version,
        "compiler": compiler,
        "machine": platform.machine(),
        "isas": isas,
        "cuda_archs": archs,
    }


NO_KERNELS = why_no_kernels()
if NO_KERNELS and switched_on("FIF_OPS_REQUIRE_KERNELS"):
    stop(f"FIF_OPS_REQUIRE_KERNELS is set but the kernels cannot be built: {NO_KERNELS}")
if not NO_KERNELS and importlib.util.find_spec("torch") is None:
    stop("torch is needed to build the kernels: run `pip install 'torch>=2.10'` first, or drop --no-build-isolation")


class BuildKernels(setuptools.Command):
    """Put _C.so, where it can be built, and the record of the build into the package."""

    description = "compile the kernels and write the record of the build"
    user_options: ClassVar[list[tuple[str, str, str]]] = []
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib = ""

    def finalize_options(self) -> None:
        self.build_lib = self.get_finalized_command("build").build_lib

    def run(self) -> None:
        package = Path(ROOT if self.editable_mode else self.build_lib, "fif_ops")
        package.mkdir(parents=True, exist_ok=True)
        git = first_line("git", "describe", "--always", "--dirty", "--tags") if (ROOT / ".git").exists() else ""
        record: dict[str, object] = {"version": self.distribution.get_version(), "git": git}
        if NO_KERNELS:
            print(f"fif_ops: kernels not built, the reference runs instead: {NO_KERNELS}", file=sys.stderr)
            (package / "_C.so").unlink(missing_ok=True)
            record.update(isas=[], cuda_archs=[], no_kernels=NO_KERNELS)
        else:
            record.update(build_library("build/kernels", list(ISAS), "", "-Wl,-z,defs", cuda=True))
            # A process may have the old library mapped: replace the file, never write into it.
            shutil.copyfile(ROOT / "build/kernels/_C.so", package / "_C.so.new")
            os.replace(package / "_C.so.new", package / "_C.so")
        (package / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]

    def get_outputs(self) -> list[str]:
        names = ["_build_info.json"] if NO_KERNELS else ["_build_info.json", "_C.so"]
        return [f"{self.build_lib}/fif_ops/{name}" for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {path: f"fif_ops/{Path(path).name}" for path in self.get_outputs()} if self.editable_mode else {}


class BuildSanitized(BuildKernels):
    """Build build/sanitize/_C.so for the tests, instrumented; nothing is installed."""

    description = "compile the kernels with sanitizers into build/sanitize"

    def run(self) -> None:
        if NO_KERNELS:
            stop(f"nothing to sanitize: {NO_KERNELS}")
        checks = f"-fsanitize={os.environ.get('FIF_OPS_SANITIZE') or 'address,undefined'} -fno-sanitize-recover"
        # What comes of bad pointers is found without these checks, which would take a third of the build's time.
        fewer = "-fno-sanitize=null,object-size,pointer-overflow"
        flags = f"-O1 -g1 -fno-omit-frame-pointer -DFIF_SANITIZED {checks} {fewer}"
        isas = [isa for isa in ISAS if isa in SANITIZED_ISAS]
        build_library("build/sanitize", isas, flags, checks, cuda=False)


class Build(build):
    """The usual build, from an empty folder and with the kernels."""

    sub_commands: ClassVar = [*build.sub_commands, ("build_kernels", None)]

    def run(self) -> None:
        if Path(self.build_lib).resolve().is_relative_to(ROOT / "build"):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """The library uses no Python symbol: its wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Distribution(setuptools.Distribution):
    """Tells setuptools whether the wheel is bound to a platform."""

    def has_ext_modules(self) -> bool:
        return not NO_KERNELS


if __name__ == "__main__":
    commands = {"build": Build, "build_kernels": BuildKernels, "build_sanitized": BuildSanitized, "bdist_wheel": Wheel}
    setuptools.setup(distclass=Distribution, cmdclass=commands)

"""Triton kernels compiled for GPUs that are not here: registers, spills, shared memory and instructions of each launch.

A launcher runs on meta tensors with a recorder in place of the launch; what it would have launched is then compiled,
specialised as Triton's own launch would, by the compiler and assembler that Triton brings along.
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from fif_ops import ops
from fif_ops.backends.triton import backward, forward
from fif_ops.backends.triton.host import COMPILER_OPTIONS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}


class Launch(NamedTuple):
    kernel: Any
    programs: int
    warps: int
    stages: int
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


class Compiled(NamedTuple):
    registers: int
    spilled: int  # bytes stored and loaded
    shared: int
    instructions: collections.Counter[str]

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))


def recorded(monkeypatch, function, *arguments, **options) -> list[Launch]:
    """What the launcher would launch."""
    launches: list[Launch] = []

    def record(kernel, programs, warps, stages, **keywords):
        launches.append(Launch(kernel, programs, warps, stages, keywords))

    with monkeypatch.context() as patch:
        for module in (forward, backward):
            patch.setattr(module, "launch", record)
        function(*arguments, **options)
    return launches


def specialised(launch: Launch) -> ASTSource:
    """As Triton's launch sees it: every pointer aligned, whole numbers by size, 1 and None known when compiling."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        divides = isinstance(value, torch.Tensor)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            divides = value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if divides:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def key(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that need one compilation."""
    source = specialised(launch)
    return (
        launch.name,
        launch.warps,
        launch.stages,
        repr(source.signature),
        repr(source.constants),
        repr(source.attrs),
    )


def compiled(launch: Launch, capability: int) -> Compiled:
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **COMPILER_OPTIONS}
    kernel = triton.compile(specialised(launch), target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        arch = sm_arch_from_capability(capability)
        # --regAllocOptLevel=2 is what Triton asks for since 3.6.
        command = [
            _path(get_ptxas(capability)),
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={arch}",
            ptx,
            "-o",
            f"{folder}/k.o",
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing)
    number = lambda pattern: int(re.search(pattern, report).group(1))  # noqa: E731
    spilled = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    return Compiled(number(r"Used (\d+) registers"), spilled, kernel.metadata.shared, collections.Counter(found))


def _path(tool: Any) -> str:
    return tool.path if hasattr(tool, "path") else tool[0]


# ---- what the operators launch, and what must be true of it

SHARED_MEMORY = 99 * 1024  # what a program may have on every GPU since sm_80
NO_SPILLS = triton.__version__.startswith("3.7.")  # the version of constraints.txt; others allocate otherwise


def arguments(operator, dtype, last, *, images=128, channels=64, maps=32, size=28, multiplier=1, kernel=3, stride=1,
              activation="relu", primary=True, tf32=False):  # fmt: skip
    """Of infer, train or backward, on meta tensors."""
    layout = torch.channels_last if last else torch.contiguous_format

    def new(*shape, kind=dtype):
        t = torch.empty(shape, dtype=kind, device="meta")
        return t.contiguous(memory_format=layout) if len(shape) == 4 and shape[2] > 5 else t

    x, cheap, side = new(images, channels if primary else maps, size, size), maps * multiplier, (size - 1) // stride + 1
    w1, w2 = new(maps, channels, 1, 1) if primary else None, new(cheap, 1, kernel, kernel)
    norms = [[new(n, kind=torch.float32) for _ in range(4)] for n in (maps, cheap)]
    code, named = ops.ACTIVATION_CODES[activation], {"stride": stride, "tf32": tf32}
    if operator == "backward":
        stats = [new(2, n, kind=torch.float32) for n in (maps, cheap)]
        grad, raw = new(images, maps + cheap, side, side), new(images, maps, side, side)
        affine = (*norms[0][:2], *norms[1][:2])
        return (grad, x, w1, w2, raw, *stats, *affine, code, True, True, True, True, True), named
    options = (1e-5, 1e-5, maps + cheap, code, True, *((True, True, 0.1, 0.1) if operator == "train" else ()))
    return (x, w1, w2, None, None, *norms[0], *norms[1], *options), named


def launches_of(monkeypatch, dtype, last, operators=("infer", "train", "backward"), **options):
    """What the operators would launch, each distinct kernel once."""
    functions = {"infer": forward.infer, "train": forward.train, "backward": backward.backward}
    found = {}
    for operator in operators:
        positional, named = arguments(operator, dtype, last, **options)
        for launch in recorded(monkeypatch, functions[operator], *positional, **named):
            found.setdefault(key(launch), launch)
    return list(found.values())


MULTIPLY = ("fused_kernel", "product_kernel", "primary_backward_kernel")


def check_compiled(launch, capability, dtype, tf32=False):
    found = compiled(launch, capability)
    what = f"{launch.name} for sm_{capability}: {found}"
    assert found.spilled == 0 or not NO_SPILLS, what
    assert found.shared <= SHARED_MEMORY, what
    if launch.name in MULTIPLY and (dtype != torch.float32 or tf32):
        assert found.count("HMMA|HGMMA|UTC.*MMA") > 0, what
    # In NCHW, rows of odd lengths and tiles with a narrow halo start where no 128-bit access may.
    given, vector = launch.arguments, 16 // dtype.itemsize
    if given.get("LAST") or given.get("HW", 0) % vector == 0:
        if vector in [given.get(name) for name in ("VX", "VI", "VG", "VM")]:
            assert found.count(r"(LDG|LDGSTS).*\.128") > 0, what
        statistics_only = launch.name == "sums_kernel" or given.get("out", 0) is None
        if given.get("VO") == vector and not statistics_only:
            assert found.count(r"STG.*\.128") > 0, what
    assert found.count(r"ATOMG|ATOM\.|RED[.G]") == 0, what  # sums would depend on the order of programs

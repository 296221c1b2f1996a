"""What nvcc makes of the CUDA kernels, for three architectures: no local memory, no more registers than before, and the
instructions that they were written for."""

import re
import subprocess
from fnmatch import fnmatch

import cuda_runs
import cuda_static
import pytest
from cuda_static import Kernel, blocks_per_multiprocessor
from cusim import toolchain

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not cuda_static.tools()[0], reason="no nvcc"),
]
# Kernels with local memory that cannot be had otherwise: expressions for "name, sm_80", and the most bytes of stack.
STACK: dict[str, int] = {}
# Accesses byte by byte, and wide ones of memory that the compiler could not tell to be shared or global: in no kernel.
NOWHERE = ["!LD[SG].*U8*", "!ST[SG].*U8*", "!LD.*64*", "!LD.*128*", "!ST.*"]
COPIES, HALF, TF32, EXACT = "LDGSTS.*.128*", ["HMMA.16816.F32*", "LDSM.16.*"], ["HMMA.*.TF32"], ["FFMA*", "!HMMA*"]
PRODUCTS, DEPTHWISE = "(infer|raw|input|weight)_kernel", "(moments|apply|sums|gradient|draw)_kernel"
# Expressions for kernels, and the instructions that each of them must have, or must not (with !). Each kernel must be
# in here.
FEATURES = [
    (rf"{PRODUCTS}<b?f16, .*>", [COPIES, *HALF]),
    (rf"{PRODUCTS}<f32, .*, true>", [COPIES, *TF32]),
    (rf"{PRODUCTS}<f32, .*, false>", [COPIES, *EXACT]),
    (r"infer_kernel<b?f16, nhwc, .*>", ["STG.E.64", "LDS.64"]),
    (r"infer_kernel<f32, nhwc, .*>", ["STG.E.128", "LDS.128"]),
    (r"(raw|input)_kernel<.*>", ["STG.E.128"]),
    (r"(input|weight)_kernel<.*>", ["LDG.E.128.CONSTANT"]),
    (rf"{DEPTHWISE}<b?f16, .*>", ["LDG.E.64.CONSTANT"]),
    (rf"{DEPTHWISE}<f32, .*>", ["LDG.E.128.CONSTANT"]),
    (r"(apply|gradient|draw)_kernel<b?f16, .*>", ["STG.E.64"]),
    (r"(apply|gradient|draw)_kernel<f32, .*>", ["STG.E.128"]),
]
CALCULATOR = """
#include <cuda_occupancy.h>
#include <cstdio>
#include <cstdlib>
int main(int, char** of) {  // major version, shared memory of a multiprocessor and of a block
  cudaOccDeviceProp p;
  p.computeMajor = atoi(of[1]), p.computeMinor = 0, p.warpSize = 32, p.numSms = 100;
  p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = 2048;
  p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.sharedMemPerBlock = 48 << 10;
  p.sharedMemPerMultiprocessor = atoi(of[2]), p.sharedMemPerBlockOptin = atoi(of[3]);
  p.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes f;
  f.maxThreadsPerBlock = 1024, f.numBlockBarriers = 1, f.partitionedGCConfig = PARTITIONED_GC_OFF;
  f.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, f.maxDynamicSharedSizeBytes = p.sharedMemPerBlockOptin;
  int threads, fixed, dynamic;
  while (scanf("%d %d %d %d", &f.numRegs, &threads, &fixed, &dynamic) == 4) {
    f.sharedSizeBytes = fixed;
    cudaOccDeviceState state;
    cudaOccResult result;
    const cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &p, &f, &state, threads, dynamic);
    printf("%d ", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def all_kernels():
    for arch, sources in cuda_static.compile_all().items():
        for kernels in sources.values():
            for name, kernel in kernels.items():
                yield arch, name, kernel


def test_kernels_are_named_so_that_tables_can_tell_them():
    names = [(arch, name) for arch, name, _ in all_kernels()]
    assert all(re.fullmatch(r"\w+_kernel(<[^<>]*>)?", name) for _, name in names), names
    assert len(names) == len(set(names)), "kernels of two sources should differ in their names"


def test_nothing_is_kept_in_local_memory():
    """Neither registers that were spilled nor arrays with an index that is known only at run time."""
    found = []
    for arch, name, kernel in all_kernels():
        allowed = [size for pattern, size in STACK.items() if re.fullmatch(pattern, f"{name}, sm_{arch}")]
        if kernel.spills or kernel.stack > max(allowed, default=0):
            found.append(f"{name}, sm_{arch}: {kernel.stack} bytes of stack, {kernel.spills} of spills")
    assert not found, "\n" + "\n".join(found)


def test_registers_do_not_grow():
    assert cuda_static.TABLE.is_file(), f"`{cuda_static.REWRITE}` writes the table"
    version, figures = cuda_static.read_table(cuda_static.TABLE.read_text())
    if version != cuda_static.tools()[1]:
        pytest.skip(f"the table is of nvcc {version}, and this is nvcc {cuda_static.tools()[1]}")
    now = cuda_static.read_table(cuda_static.table())[1]
    wrong = [
        f"{name}, sm_{arch}: in one of table and sources only" for name, arch in sorted(now.keys() ^ figures.keys())
    ]
    for key in sorted(now.keys() & figures.keys()):
        (registers, blocks), (old_registers, old_blocks) = now[key], figures[key]
        if registers > old_registers or blocks < old_blocks:
            was = f"{old_registers} registers and {old_blocks} blocks"
            wrong.append(f"{key[0]}, sm_{key[1]}: {registers} registers and {blocks} blocks, in the table {was}")
    assert not wrong, "\n".join(["", *wrong, f"If it is meant so, `{cuda_static.REWRITE}` rewrites the table."])


@pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing()))
def test_the_simulator_runs_what_the_gpu_runs():
    """The kernels that nvcc compiles are those that tests run (test_cuda_sanitized.py)."""
    compiled = {name for _, name, _ in all_kernels()}
    assert compiled == set(cuda_runs.coverage().kernels)


@pytest.mark.skipif(not cuda_static.tools()[2], reason="no nvdisasm: pip install nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("arch", cuda_static.SHARED)
def test_instructions(arch):
    if arch not in cuda_static.compile_all():
        pytest.skip(f"this nvcc does not know sm_{arch}")
    wrong, used = [], set()
    for name, kernel in ((name, kernel) for of, name, kernel in all_kernels() if of == arch):
        lines = [line for line, (pattern, _) in enumerate(FEATURES) if re.fullmatch(pattern, name)]
        used.update(lines)
        if not lines:
            wrong.append(f"{name}: not in FEATURES of test_cuda_static.py")
        for wanted in [*NOWHERE, *(wanted for line in lines for wanted in FEATURES[line][1])]:
            if any(fnmatch(found, wanted.lstrip("!")) for found in kernel.instructions) == wanted.startswith("!"):
                wrong.append(f"{name}: {'has' if wanted.startswith('!') else 'does not have'} {wanted.lstrip('!')}")
    wrong += [f"no kernel is called {pattern}" for line, (pattern, _) in enumerate(FEATURES) if line not in used]
    assert not wrong, "\n" + "\n".join(wrong)


def test_occupancy_is_that_of_nvidias_calculator(tmp_path):
    """cuda_occupancy.h of the toolkit, which needs no GPU either."""
    cases = [
        (registers, threads, static, dynamic)
        for registers in (16, 32, 33, 64, 80, 96, 104, 128, 129, 168, 184, 255)
        for threads in (32, 64, 96, 128, 256)
        for static in (0, 1000)
        for dynamic in (0, 5000, 39 << 10, 48 << 10, 100_000, 163 << 10, 220_000)
    ]
    source = tmp_path / "occupancy.cpp"
    source.write_text(CALCULATOR)
    command = [toolchain.compiler(), "-w", "-isystem", toolchain.cuda_include(), source, "-o", tmp_path / "occupancy"]
    subprocess.run(command, check=True)
    text = "".join(f"{' '.join(map(str, case))}\n" for case in cases)
    for arch, sizes in cuda_static.SHARED.items():
        command = [tmp_path / "occupancy", arch[:-1], *map(str, sizes)]
        said = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout.split()
        ours = [blocks_per_multiprocessor(arch, Kernel(r, s, 0, 0, {}), t, d) for r, t, s, d in cases]
        assert ours == list(map(int, said)), arch

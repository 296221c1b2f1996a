"""The simulator that runs CUDA kernels on the CPU: right kernels pass, every kind of mistake is caught, and its matrix
operations are those of the PTX manual."""

import functools
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from cusim import toolchain

SELFTEST = toolchain.ROOT / "tests" / "cusim" / "selftest.cu"
PLANTED = SELFTEST.with_name("planted.h").read_text()
DECLARED = re.findall(r"\w+", re.search(r"enum Bug \{([^}]*)\}", PLANTED).group(1))
ORDERS = (0, 1, 7)  # ascending, descending, shuffled
ERROR = 3  # the exit status of the self-test after an error that leaves the simulator usable

# Of each planted mistake: the case it is planted in, and what each mode that has to catch it says.
UBSAN, RACE, WRONG_RESULTS = "runtime error: .*misaligned", "data race", "wrong results"
DIVERGENT = "divergent barrier: thread .* waits in __syncthreads at .*planted.h:"
BUGS = {
    "static_overrun": ("reduce", {"address": "use-after-poison"}),
    "stale_shared": ("reduce", dict.fromkeys(toolchain.MODES, WRONG_RESULTS)),
    "global_overread": ("reduce", {"address": "heap-buffer-overflow"}),
    "missing_barrier": ("reduce", {"plain": WRONG_RESULTS, "address": WRONG_RESULTS, "thread": RACE}),
    "divergent_barrier": ("reduce", {"plain": DIVERGENT, "address": DIVERGENT}),
    "early_return": ("reduce", dict.fromkeys(toolchain.MODES, DIVERGENT)),
    "two_barriers": ("reduce", dict.fromkeys(toolchain.MODES, DIVERGENT)),
    "lane_missing": ("reduce", {"plain": "__shfl_xor_sync at .* waits for lane 3 of warp ., which has returned"}),
    "lane_outside": ("reduce", {"plain": "lane 0 reads lane 16, which the mask 0000ffff leaves out"}),
    "mixed_operations": ("reduce", {"plain": "lanes 0 and 5 .* different operations, __shfl_xor_sync and __syncwarp"}),
    "block_race": ("reduce", {"thread": RACE}),
    "missing_fence": ("last_block", {"thread": RACE}),
    "missing_syncwarp": ("exchange", {"thread": RACE}),
    "missing_wait": ("pipeline_16", dict.fromkeys(toolchain.MODES, WRONG_RESULTS)),
    "short_wait": ("pipeline_8", {"plain": "returns while its cp.async copies are under way"}),
    "unpublished_copy": ("pipeline_16", {"plain": WRONG_RESULTS, "address": WRONG_RESULTS, "thread": RACE}),
    "early_refill": ("pipeline_4", {"plain": WRONG_RESULTS, "address": WRONG_RESULTS, "thread": RACE}),
    "copy_under_way": ("pipeline_16", {"plain": "returns while its cp.async copies are under way"}),
    "misaligned_copy": ("pipeline_8", {"plain": "cp.async destination: misaligned address, must be a multiple of 8"}),
    "copy_to_global": ("pipeline_16", {"plain": "cp.async destination: not an address in shared memory"}),
    "copy_overrun": ("pipeline_16", {"plain": WRONG_RESULTS, "address": "heap-buffer-overflow"}),
    "dynamic_overrun": ("pipeline_16", {"address": "use-after-poison"}),
    "arena_overrun": ("product_fp16", {"address": "use-after-poison"}),
    "arena_too_large": (
        "product_bf16",
        {"plain": "SharedArena: 4096 bytes at offset 0, but the launch has 4080 bytes"},
    ),
    "missing_overlay_barrier": ("product_fp16", {"plain": WRONG_RESULTS, "thread": RACE}),
    "write_after_read": ("product_bf16", {"plain": WRONG_RESULTS, "thread": RACE}),
    "misaligned_ldmatrix": ("product_fp16", {"plain": "ldmatrix: misaligned address, must be a multiple of 16"}),
    "ldmatrix_of_global": ("product_fp16", {"plain": "ldmatrix: not an address in shared memory"}),
    "misaligned_vector": ("product_fp16", {"plain": "vector load: misaligned address, must be a multiple of 16"}),
    "global_load_of_shared": ("product_fp16", {"plain": "global load: a shared address where a global one belongs"}),
    "misaligned_cast": ("product_fp16", {"address": UBSAN}),
    "global_overwrite": ("product_fp16", {"address": "heap-buffer-overflow"}),
    "grid_y": ("limits", {"plain": "launch of nothing: grid 1,65536,1, must be"}),
    "grid_z": ("limits", {"plain": "launch of nothing: grid 1,1,65536, must be"}),
    "grid_empty": ("limits", {"plain": "launch of nothing: grid 0,1,1, must be"}),
    "block_size": ("limits", {"plain": r"launch of nothing: block 32,33,1, must be 1\.\.1024 threads"}),
    "shared_limit": ("limits", {"plain": "launch: invalid argument"}),
    "no_optin": (
        "limits",
        {"plain": "65536 bytes of dynamic shared memory, over the 49152 that the kernel opted in to"},
    ),
}


@pytest.fixture(scope="module")
def selftest(tmp_path_factory):
    """The self-test's program of a mode, built at the first request."""

    @functools.cache
    def build(mode):
        if reason := toolchain.missing(mode):
            pytest.skip(reason)
        program = tmp_path_factory.mktemp("cusim") / mode
        command = toolchain.compile_command(mode, "-Wall", "-Wextra", "-Werror", SELFTEST, "-o", program)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return program

    return build


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", toolchain.MODES)
def test_right_kernels_pass(selftest, mode, order):
    done = toolchain.run(mode, selftest(mode), "all", order)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("bug", "mode"), [(bug, mode) for bug, (_, modes) in BUGS.items() for mode in modes])
def test_planted_bug_is_caught(selftest, bug, mode):
    case, says = BUGS[bug]
    said = []
    for order in ORDERS:
        done = toolchain.run(mode, selftest(mode), case, order, DECLARED.index(bug))
        said.append(f"order {order}: exit status {done.returncode}\n{done.stderr}")
        if done.returncode != 0 and re.search(says[mode], done.stderr):
            assert done.returncode == ERROR or not re.search("^error: ", done.stderr), done.stderr
            return
    pytest.fail("\n".join(said))


def test_every_planted_bug_has_a_test():
    assert DECLARED[0] == "none"
    assert sorted(DECLARED[1:]) == sorted(BUGS)


def compile_for_gpu(architecture, output, *flags):
    """nvcc's verdict on the self-test: no warnings; skips where nvcc or the architecture is missing."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on the path")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if architecture != "native" and f"sm_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    strict = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    target = "-arch=native" if architecture == "native" else f"-arch=sm_{architecture}"
    command = [nvcc, "-std=c++20", target, *strict, f"-I{toolchain.ROOT / 'csrc'}", *flags, SELFTEST, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


@pytest.fixture(scope="module")
def gpu_selftest(tmp_path_factory):
    """The self-test as a program for the GPU of this machine."""
    if (
        not shutil.which("nvidia-smi")
        or subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no GPU")
    program = tmp_path_factory.mktemp("gpu") / "selftest"
    compile_for_gpu("native", program)
    return program


@pytest.fixture(params=["simulator", "gpu"])
def filtered(request):
    """The function that has a filter of the self-test turn 32-bit words into others."""
    gpu = request.param == "gpu"
    program = request.getfixturevalue("gpu_selftest") if gpu else request.getfixturevalue("selftest")("plain")

    def run(case, words):
        out = []
        for order in (0, 7):
            done = toolchain.run("plain", program, case, order, data=words.astype("<u4").tobytes())
            assert done.returncode == 0, done.stderr
            out.append(np.frombuffer(done.stdout.encode("latin-1"), "<u4"))
        np.testing.assert_array_equal(*out)
        return out[0]

    return run


def test_right_kernels_pass_on_a_gpu(gpu_selftest):
    done = toolchain.run("plain", gpu_selftest, "all", 0)
    assert done.returncode == 0, done.stderr


# The fragments as the PTX manual words them, per lane and element: groupID = lane >> 2, threadID_in_group = lane % 4.
# A register holds two 16-bit elements, the one of lower index in the lower half, or one of 32 bits.


def a_16x16(lane, i):
    row = (lane >> 2) if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    column = (lane % 4) * 2 + (i & 1) if i < 4 else (lane % 4) * 2 + (i & 1) + 8
    return row, column


def b_16x8(lane, i):
    row = (lane % 4) * 2 + (i & 1) if i < 2 else (lane % 4) * 2 + (i & 1) + 8
    return row, lane >> 2


def a_16x8(lane, i):
    row = (lane >> 2) if i in (0, 2) else (lane >> 2) + 8
    return row, lane % 4 if i in (0, 1) else (lane % 4) + 4


def b_8x8(lane, i):
    return (lane % 4 if i == 0 else (lane % 4) + 4), lane >> 2


def d_16x8(lane, i):
    row = (lane >> 2) if i < 2 else (lane >> 2) + 8
    return row, (lane % 4) * 2 + (i & 1)


def fragment(bits, place, elements):
    """(tiles, rows, columns) of element bits -> (tiles, 32 lanes, registers)."""
    rows, columns = zip(*(place(lane, i) for lane in range(32) for i in range(elements)), strict=True)
    picked = bits[:, rows, columns].reshape(len(bits), 32, elements)
    return picked if bits.dtype == np.uint32 else np.ascontiguousarray(picked).view("<u4")


def bits_of(values, dtype):
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)
    return tensor.view(torch.int16).numpy().view("<u2") if dtype.itemsize == 2 else tensor.numpy().view("<u4")


def multiply(filtered, case, a, b, c, dtype):
    """A B + C by the simulator's mma, for (tiles, ...) arrays of numbers that dtype holds."""
    places = (a_16x16, 8, b_16x8, 4) if dtype.itemsize == 2 else (a_16x8, 4, b_8x8, 2)
    registers = [
        fragment(bits_of(a, dtype), *places[:2]),
        fragment(bits_of(b, dtype), *places[2:]),
        fragment(bits_of(c, torch.float32), d_16x8, 4),
    ]
    lanes = filtered(case, np.concatenate(registers, axis=2)).view("<f4").reshape(len(a), 32, 4)
    d = np.full(c.shape, np.nan, np.float32)
    for lane in range(32):
        for i in range(4):
            row, column = d_16x8(lane, i)
            d[:, row, column] = lanes[:, lane, i]
    return d


MULTIPLICATIONS = {"mma_fp16": (torch.float16, 16), "mma_bf16": (torch.bfloat16, 16), "mma_tf32": (torch.float32, 8)}


@pytest.mark.parametrize("case", MULTIPLICATIONS)
def test_multiplication_has_the_layout_of_the_manual(filtered, case):
    dtype, depth = MULTIPLICATIONS[case]
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-9, 10, (3, *shape)) for shape in ((16, depth), (depth, 8), (16, 8)))
    np.testing.assert_array_equal(multiply(filtered, case, a, b, c, dtype), a @ b + c)


def test_multiplication_reads_every_finite_half(filtered):
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].astype(np.float32).reshape(-1, 16, 8)
    a = np.concatenate([halves, np.zeros_like(halves)], axis=2)
    b = np.broadcast_to(np.eye(16, 8), (len(a), 16, 8))
    d = multiply(filtered, "mma_fp16", a, b, np.zeros_like(halves), torch.float16)
    np.testing.assert_array_equal(d, halves)


def test_multiplication_ignores_the_low_bits_of_tf32(filtered):
    a, b = np.full((1, 16, 8), 1 + 2**-11), np.full((1, 8, 8), 1 + 2**-10)
    d = multiply(filtered, "mma_tf32", a, b, np.zeros((1, 16, 8)), torch.float32)
    np.testing.assert_array_equal(d, np.full((1, 16, 8), 8 * (1 + 2**-10)))


def test_matrix_loads_have_the_layout_of_the_manual(filtered):
    random = np.random.default_rng(0)
    rows = random.integers(0, 1 << 16, (2, 32, 8), dtype=np.uint16)
    named = np.stack([random.permutation(32), random.integers(0, 32, 32)]).astype("<u4")
    words = np.concatenate([rows.view("<u4"), named[:, :, None]], axis=2)
    got = filtered("ldmatrix", words).reshape(2, 32, 12)
    for block in range(2):
        matrices = rows[block][named[block]].astype(np.uint32).reshape(4, 8, 8)
        for lane in range(32):
            row, column = lane // 4, lane % 4 * 2
            plain = [m[row, column] | m[row, column + 1] << 16 for m in matrices]
            transposed = [m[column, row] | m[column + 1, row] << 16 for m in matrices]
            assert got[block, lane].tolist() == [*plain, *transposed, *plain[:2], *transposed[:2]]


def test_conversions_round_to_nearest(filtered):
    random = np.random.default_rng(0)
    bits = random.integers(0, 1 << 32, 32 * 256, dtype=np.uint32)
    halfway = np.array([1 + 2**-11, 1 + 3 * 2**-11, 65519.9, 65520, 2**-25, 2**-24, 1 + 2**-8, 1 + 3 * 2**-8, 0, -0.0])
    ordinary = np.concatenate([random.normal(size=32 * 64 - len(halfway)), halfway]).astype(np.float32)
    values = np.concatenate([bits.view(np.float32), ordinary])
    values = np.where(np.isnan(values), 1, values)
    got = filtered("conversions", values.view("<u4")).reshape(-1, 7)
    for column, dtype in enumerate((torch.float16, torch.bfloat16)):
        positive, negative = (bits_of(v, dtype).astype(np.uint32) for v in (values, -values))
        np.testing.assert_array_equal(got[:, column], positive | negative << 16)
        back = torch.from_numpy(values).to(dtype).float().numpy()
        np.testing.assert_array_equal(got[:, 2 + 2 * column].view("<f4"), -back)
        np.testing.assert_array_equal(got[:, 3 + 2 * column].view("<f4"), back)
    tf32 = got[:, 6].view("<f4").astype(np.float64)
    wide = values.astype(np.float64)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(wide), 2.0**-126))), -126) - 10)
    nearest = np.sign(wide) * np.floor(np.abs(wide) / step + 0.5) * step
    finite = np.abs(nearest) < 2.0**128
    np.testing.assert_array_equal(tf32[finite], nearest[finite])
    assert np.isinf(tf32[~finite]).all()


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_for_gpus_without_warnings(tmp_path, architecture):
    compile_for_gpu(architecture, tmp_path / "selftest.cubin", "-cubin")


def test_operations_become_the_instructions_they_are_named_after(tmp_path):
    compile_for_gpu(80, tmp_path / "selftest.ptx", "-ptx")
    text = (tmp_path / "selftest.ptx").read_text()
    for instruction in (
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16",
        "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16",
        "cp.async.cg.shared.global",
        "cp.async.ca.shared.global",
        "cp.async.commit_group",
        "cp.async.wait_group 1",
        "cvt.rna.tf32.f32",
        "ld.global.nc.v4",
        "ld.global.cs.v4",
        "st.global.cs.v4",
        "st.shared.v4",
        "ld.shared.v4",
    ):
        assert instruction in text, instruction

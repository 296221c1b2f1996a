"""Same bits every time, nothing read that is not there, and any number of threads and processes at once."""

import ctypes
import faulthandler
import itertools
import mmap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import PLACEMENTS, Problem, definition, errors, in_child, name_of, place, randomise, results, threads
from torch import nn
from torch.utils.data import DataLoader, Dataset

from fif_ops import FeatureAugment, FusedFiF

both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
two_formats = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)

# Some of each: cut by rows for want of images and channels, tiles of rows, one and many blocks, images for every thread.
SHAPES = {
    "one narrow unit": {"in_channels": 3, "out_channels": 8, "batch": 1, "height": 17, "width": 9},
    "one image": {"in_channels": 40, "out_channels": 61, "batch": 1, "height": 13, "width": 14},
    "tiles of rows": {"in_channels": 130, "out_channels": 26, "batch": 1, "height": 40, "width": 37, "cheap_kernel_size": 5},
    "two images": {"in_channels": 24, "out_channels": 70, "batch": 2, "height": 9, "width": 20, "ratio": 3},
    "three images": {"in_channels": 8, "out_channels": 30, "batch": 3, "height": 12, "width": 12, "splice": False},
    "narrow maps": {"in_channels": 17, "out_channels": 33, "batch": 5, "height": 11, "width": 3, "cheap_kernel_size": 7},
}  # fmt: skip


def problem(**options):
    fields = {
        "in_channels": 5, "out_channels": 12, "ratio": 2, "cheap_kernel_size": 3, "splice": True, "activation": "silu",
        "norm": "batch", "bias": False, "batch": 2, "height": 6, "width": 7,
    }  # fmt: skip
    return Problem(**{**fields, **options})


def run(chosen, dtype, training):
    unit = FusedFiF.from_reference((chosen.training_unit() if training else chosen.unit().eval()).to(dtype))
    return results(unit, chosen.input(dtype), chosen.gradient(dtype) if training else None)


def same_bits(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- determinism


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@both_modes
@two_formats
@both_layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_with_any_number_of_threads(shape, layout, dtype, training):
    chosen = problem(placement=layout, **SHAPES[shape])
    with threads(1):
        alone = run(chosen, dtype, training)
    assert not any(tensor.isnan().any() for tensor in alone.values())
    for count in (2, 3, 7):
        with threads(count):
            assert same_bits(run(chosen, dtype, training), alone), count


@both_modes
@both_layouts
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_in_ten_runs(deterministic, shape, layout, training):
    """With torch's switch, which also fills fresh memory with NaN: none of it may be left over or read."""
    chosen = problem(placement=layout, **SHAPES[shape])
    with threads(2):
        first = run(chosen, torch.float32, training)
        assert not any(tensor.isnan().any() for tensor in first.values())
        assert all(same_bits(run(chosen, torch.float32, training), first) for _ in range(9))
    torch.use_deterministic_algorithms(False)
    with threads(2):
        assert same_bits(run(chosen, torch.float32, training), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
@both_layouts
def test_fresh_memory_is_never_read(deterministic, layout, dtype):
    """Every kind of unit on maps of every remainder of a vector, with fresh memory full of NaN."""
    with threads(1):
        for width, (ratio, splice), norm in itertools.product(
            (1, 2, 3, 7, 8, 9, 16, 21), ((2, True), (3, False)), ("batch", None)
        ):
            chosen = problem(
                width=width, height=3, ratio=ratio, splice=splice, norm=norm, bias=norm is None, out_channels=11,
                placement=layout, cheap_kernel_size=(3, 5, 7)[width % 3],
            )  # fmt: skip
            for training in (False, True):
                assert not any(tensor.isnan().any() for tensor in run(chosen, dtype, training).values())


# ---- memory around the tensors


@two_formats
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_views_of_memory_full_of_nan(placement, dtype):
    """What lies around a view has no influence, neither of the input nor of the gradient."""
    with threads(1):
        for width, height in ((1, 1), (1, 6), (5, 1), (7, 4), (16, 3), (19, 2)):
            dense = problem(width=width, height=height, batch=4, in_channels=6)
            x, grad = place(dense.input(dtype), placement), place(dense.gradient(dtype), placement)
            unit = FusedFiF.from_reference(dense.training_unit().to(dtype))
            found = results(unit, x, grad)
            assert not any(tensor.isnan().any() for tensor in found.values())
            again = results(FusedFiF.from_reference(dense.training_unit().to(dtype)), x.clone(), grad.clone())
            assert all(torch.allclose(found[name], again[name], rtol=1e-1, atol=1e-1) for name in found)


class Guarded:
    """Tensors that start or end exactly at a page which the process may not touch."""

    def __init__(self):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def __call__(self, values, at_end):
        page, size = mmap.PAGESIZE, values.numel() * values.element_size()
        inner = -(-size // page) * page
        memory = mmap.mmap(-1, inner + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + page + inner):
            assert self.libc.mprotect(guard, page, 0) == 0
        order = sorted(range(values.dim()), key=values.stride, reverse=True)
        offset = page + (inner - size if at_end else 0)
        flat = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset)
        tensor = flat.view([values.shape[dim] for dim in order]).permute(
            [order.index(dim) for dim in range(values.dim())]
        )
        return tensor.copy_(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
@both_layouts
def test_nothing_beyond_the_ends_of_tensors_is_touched(layout, dtype):
    """Input, gradient and all parameters lie between pages that may not be touched: one byte outside ends the process."""

    def touch():
        torch.set_num_threads(1)
        guarded = Guarded()
        for width, height, kernel, maps, at_end in itertools.product(
            (1, 2, 3, 8, 15, 17), (1, 4), (1, 3, 7), (1, 5, 17), (False, True)
        ):
            chosen = problem(
                in_channels=3,
                out_channels=2 * maps,
                width=width,
                height=height,
                cheap_kernel_size=kernel,
                placement=layout,
            )
            unit = FusedFiF.from_reference(chosen.training_unit().to(dtype))
            for module in unit.modules():
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is not None and tensor.dim() > 0:
                            moved = guarded(tensor.detach(), at_end)
                            held[name] = nn.Parameter(moved) if held is module._parameters else moved
            x, grad = guarded(chosen.input(dtype), at_end), guarded(place(chosen.gradient(dtype), layout), at_end)
            results(unit, x, grad)
            results(unit.eval(), x)
        return True

    assert in_child(touch)


def test_the_guard_pages_work():
    def overrun():
        faulthandler.disable()  # the crash is wanted
        tensor = Guarded()(torch.ones(4, 3), at_end=True)
        return ctypes.c_float.from_address(tensor.data_ptr() + 4 * tensor.numel()).value

    with pytest.raises(AssertionError, match=r"-11|-7"):
        in_child(overrun)


def test_overlapping_and_lazy_views():
    """Windows that overlap, and a view whose minus sign is still to be applied."""
    unit = FusedFiF(3, 8).eval()
    windows = torch.randn(40).as_strided((2, 3, 4, 5), (7, 2, 1, 3))
    negative = torch._neg_view(torch.randn(2, 3, 4, 5))
    assert negative.is_neg()
    for x in (windows, negative):
        assert torch.equal(unit(x), unit(x.clone(memory_format=torch.contiguous_format)))
        with torch.no_grad():
            assert torch.equal(unit(x), unit(x.clone(memory_format=torch.contiguous_format)))


def test_the_input_is_left_alone():
    for training, layout in itertools.product((False, True), ("contiguous", "channels_last", "inner columns")):
        chosen = problem(placement=layout)
        x, grad = chosen.input(torch.float32), chosen.gradient(torch.float32)
        before = x.clone(), grad.clone()
        results(FusedFiF.from_reference(chosen.unit()).train(training), x, grad if training else None)
        assert torch.equal(x, before[0])
        assert torch.equal(grad, before[1])


def test_default_dtype_has_no_influence():
    chosen = problem(bias=True, frozen=(True, False))
    wanted = run(chosen, torch.float32, True)
    unit, x, grad = (
        FusedFiF.from_reference(chosen.training_unit()),
        chosen.input(torch.float32),
        chosen.gradient(torch.float32),
    )
    torch.set_default_dtype(torch.float64)
    try:
        assert same_bits(results(unit, x, grad), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- threads and processes


def test_calls_from_many_threads_at_once():
    """Several Python threads, each with torch's own threads beneath, on units of their own and on a shared one."""
    shared = FusedFiF.from_reference(problem(in_channels=9).unit().eval())
    images = torch.randn(3, 9, 15, 11)

    def job(shape, layout):
        chosen = problem(placement=layout, **shape)
        training, x, grad = chosen.training_unit(), chosen.input(torch.float32), chosen.gradient(torch.float32)

        def work():
            with torch.no_grad():
                found = [{"shared": shared(images)}]
            found.append(results(FusedFiF.from_reference(training), x, grad))
            return [*found, results(FusedFiF.from_reference(training).eval(), x)]

        return work

    jobs = [job(shape, layout) for shape in SHAPES.values() for layout in ("contiguous", "channels_last")]
    with threads(2):
        alone = [work() for work in jobs]
        barrier = threading.Barrier(4)
        with ThreadPoolExecutor(4, initializer=barrier.wait) as pool:
            for wanted, found in zip(alone * 3, pool.map(lambda work: work(), jobs * 3), strict=True):
                assert all(same_bits(one, other) for one, other in zip(found, wanted, strict=True))


def test_one_unit_trained_by_threads_that_wait_for_each_other():
    """Backward passes of one graph run on autograd's own threads."""
    unit = FusedFiF.from_reference(problem().unit())
    xs = [torch.randn(2, 5, 6, 7, requires_grad=True) for _ in range(4)]
    total = sum(unit(x).square().sum() for x in xs)
    total.backward()
    assert all(x.grad is not None and not x.grad.isnan().any() for x in xs)


class Augmented(Dataset):
    """What a data pipeline might do: run a unit inside the loader's workers."""

    def __init__(self):
        self.unit = FusedFiF.from_reference(problem().unit().eval())
        self.images = torch.randn(8, 5, 6, 7)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        with torch.no_grad():
            return self.unit(self.images[index : index + 1])[0]


def test_in_workers_of_a_data_loader():
    data = Augmented()
    with threads(2):
        wanted = torch.stack([data[index] for index in range(len(data))])
        found = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2, timeout=60)))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_in_a_forked_process():
    chosen = problem()
    with threads(2):
        wanted = run(chosen, torch.float32, True)

    def work():
        torch.set_num_threads(1)
        return {name: tensor.numpy() for name, tensor in run(chosen, torch.float32, True).items()}

    found = in_child(work)
    assert same_bits(
        {name: torch.from_numpy(array) if array.ndim else torch.tensor(array) for name, array in found.items()}, wanted
    )


# ---- running statistics, beyond what test_modules.py does in float32


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=name_of)
@both_layouts
def test_running_statistics_in_every_format(layout, dtype, momentum):
    """After some steps as in float64, to the rounding of the format they are kept in; the batch size changes between."""
    plain = randomise(FeatureAugment(5, 12, bias=True))
    for stage in (plain.primary_conv, plain.cheap_operation):
        stage[1].momentum = momentum
    plain = plain.to(dtype)
    wide, fused = FeatureAugment._copy_of(plain).double(), FusedFiF.from_reference(plain)
    for step in range(4):
        x = place(torch.randn(2 + step, 5, 4, 3) * (step + 1), layout).to(dtype)
        wide(x.double())
        fused(x)
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}[dtype]
    for (name, wanted), found in zip(wide.named_buffers(), fused.buffers(), strict=True):
        assert found.dtype == (torch.int64 if "tracked" in name else dtype)
        assert (found - wanted).double().norm() <= rounding * wanted.double().norm(), name


def test_statistics_of_two_values():
    """The smallest batch: unbiased variance is twice the biased one."""
    chosen = problem(batch=2, height=1, width=1)
    unit, x = chosen.training_unit(), chosen.input(torch.float32)
    found = results(FusedFiF.from_reference(unit), x)
    for name, error in errors(found, definition(unit, x)).items():
        assert error <= 1e-5, name


# ---- leaks


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def test_memory_does_not_grow():
    chosen = problem(in_channels=16, out_channels=48, batch=4, height=24, width=24, bias=True)
    unit = FusedFiF.from_reference(chosen.training_unit())
    x, grad = chosen.input(torch.float32), chosen.gradient(torch.float32)
    last = x.contiguous(memory_format=torch.channels_last)

    def calls(count):
        for _ in range(count):
            results(unit.train(), x, grad)
            results(unit.eval(), last)
            with pytest.raises(ValueError, match="channels"):
                unit(grad)
            with pytest.raises(RuntimeError, match="out_channels"):
                torch.ops.fif_ops.infer(
                    x,
                    unit.primary_conv[0].weight,
                    unit.cheap_operation[0].weight,
                    None,
                    None,
                    *[None] * 8,
                    0.0,
                    0.0,
                    99,
                    0,
                    True,
                )

    calls(50)
    before = resident_bytes()
    calls(300)
    one_call = 4 * x.numel() * 10
    assert resident_bytes() - before < 20 * one_call, "of 300 calls"

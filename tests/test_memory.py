"""What a unit keeps for its backward pass, what it allocates, and that its results are tensors of their own."""

import itertools
from pathlib import Path

import pytest
import torch
from support import PLACEMENTS, Problem, in_child, name_of, place

from fif_ops import FusedFiF

pytestmark = pytest.mark.usefixtures("one_thread")
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def problem(**options):
    fields = {
        "in_channels": 12, "out_channels": 32, "ratio": 2, "cheap_kernel_size": 3, "splice": True, "activation": "relu",
        "norm": "batch", "bias": False, "batch": 4, "height": 14, "width": 15,
    }  # fmt: skip
    return Problem(**{**fields, **options})


def saved_bytes(unit, x):
    """Bytes that autograd keeps beside input, parameters and buffers; tensors on one storage count once."""
    known = {t.untyped_storage().data_ptr() for t in (x, *unit.parameters(), *unit.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unit(x)
    assert out.requires_grad
    return sum(kept.values())


# ---- kept for backward


@pytest.mark.parametrize("training", [True, False], ids=["training", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "hardswish", "gelu"])
@both_layouts
def test_kept_for_backward_is_a_fraction_of_the_references(layout, activation, dtype, training):
    chosen = problem(activation=activation, placement=layout, frozen=(not training, not training))
    plain = chosen.training_unit().to(dtype)
    x = chosen.input(dtype).requires_grad_()
    ours, reference = saved_bytes(FusedFiF.from_reference(plain), x), saved_bytes(plain, x)
    assert ours <= 0.3 * reference


@pytest.mark.parametrize(
    "options",
    [
        {}, {"activation": None}, {"ratio": 4}, {"splice": False}, {"norm": None, "bias": True}, {"out_channels": 31},
        {"placement": "every other channel"}, {"placement": "channels_last"},
    ],
    ids=str,
)  # fmt: skip
def test_kept_for_backward_are_the_primary_maps_alone(options):
    """Before normalisation, in the input's dtype, and mean and deviation of every channel in float32."""
    for dtype in (torch.float32, torch.bfloat16):
        chosen = problem(**options)
        unit = FusedFiF.from_reference(chosen.training_unit().to(dtype))
        x = chosen.input(dtype).requires_grad_()
        maps = unit.primary_channels * x[:, 0].numel() * x.element_size()
        statistics = 2 * (unit.primary_channels + unit.cheap_channels) * 4
        assert saved_bytes(unit, x) <= maps + statistics


def test_nothing_is_kept_without_gradients():
    unit = FusedFiF.from_reference(problem().training_unit())
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pytest.fail, pytest.fail):
        unit(problem().input(torch.float32))


# ---- results


@pytest.mark.parametrize("path", ["kernel", "composition"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(
    "options", [{"out_channels": 31}, {"out_channels": 17, "splice": False}, {}, {"batch": 1}], ids=str
)
def test_output_is_a_fresh_tensor(options, training, path):
    """No view, no alias of the input, no storage larger than its values."""
    for placement in PLACEMENTS:
        chosen = problem(placement=placement, **options)
        unit = FusedFiF.from_reference(chosen.training_unit() if training else chosen.unit().eval())
        if path == "composition":
            unit = unit.to_reference()
        x = chosen.input(torch.float32)
        with torch.set_grad_enabled(training):
            out = unit(x)
        assert out._base is None
        assert out.storage_offset() == 0
        assert out.untyped_storage().nbytes() == out.numel() * out.element_size()
        assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_gradients_are_fresh_tensors():
    unit = FusedFiF.from_reference(problem(out_channels=31).training_unit())
    x = problem().input(torch.float32).requires_grad_()
    grad = torch.randn(4, 31, 14, 15)
    unit(x).backward(grad)
    assert x.grad._base is None
    assert x.grad.untyped_storage().nbytes() == x.numel() * x.element_size()
    assert len({t.untyped_storage().data_ptr() for t in (x, x.grad, grad)}) == 3


# ---- allocated on the way


def peak_bytes():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@both_layouts
def test_memory_at_the_peak(layout):
    """Inference allocates its output, training the primary maps as well, backward the gradients of both; and some tiles."""

    def measure():
        torch.set_num_threads(1)
        small = problem(in_channels=16, out_channels=48, placement=layout)
        unit = FusedFiF.from_reference(small.training_unit())
        unit(small.input(torch.float32)).sum().backward()  # what is set up once
        x = place(torch.randn(4, 16, 224, 224), layout).requires_grad_()
        grad = place(torch.randn(4, 48, 224, 224), layout)
        peaks = [peak_bytes()]
        with torch.no_grad():
            unit.eval()(x)
        peaks.append(peak_bytes())
        out = unit.train()(x)
        peaks.append(peak_bytes())
        out.backward(grad)
        peaks.append(peak_bytes())
        return [now - then for then, now in itertools.pairwise(peaks)]

    inference, training, backward = in_child(measure)
    one_map, slack = 4 * 4 * 224 * 224, 8 * 2**20
    planes = 4 * (1 if layout == "contiguous" else 16)  # of one channel, or one vector of channels, at a time
    assert inference <= 48 * one_map + slack
    assert inference + training <= (48 + 24 + planes // 2) * one_map + slack
    assert backward <= (16 + 24 + planes) * one_map + slack

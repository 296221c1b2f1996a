"""Results and gradients on a GPU, against the definition in float64; see gpu_support.py."""

import copy
import itertools

import pytest
import torch
from gpu_support import (
    BACKENDS,
    DEVICE,
    FP32,
    ON_GPU,
    PRECISIONS,
    both_layouts,
    both_modes,
    check,
    every_precision,
    fused_on,
    make_unit,
    needs_device,
    place,
    run,
)

from fif_ops import FeatureAugment, FusedFiF, backends

pytest_plugins = ["gpu_support"]
pytestmark = [needs_device, pytest.mark.usefixtures("whole_context")]

# Input channels, output channels, (batch, height, width), and options of the unit. Smooth activations where maps are
# small: in 16 bits, rounding decides on which side of a kink a value lies, and a few such values are much of a small map.
UNITS = {
    "plain": (16, 32, (4, 14, 14), {"activation": "silu"}),
    "relu": (24, 72, (4, 56, 56), {}),
    "linear": (72, 24, (2, 28, 28), {"activation": None}),
    "d5": (16, 40, (3, 13, 17), {"cheap_kernel_size": 5, "activation": "silu"}),
    "ratio3-cut": (13, 37, (3, 9, 13), {"ratio": 3, "activation": "silu"}),
    "ratio4": (20, 48, (3, 10, 11), {"ratio": 4, "activation": "silu"}),
    "unspliced": (16, 24, (3, 12, 12), {"splice": False, "activation": "silu"}),
    "unspliced-ratio3-d5": (
        9,
        30,
        (3, 12, 9),
        {"splice": False, "ratio": 3, "cheap_kernel_size": 5, "activation": "silu"},
    ),
    "one-pixel": (24, 32, (70, 1, 1), {"activation": "silu"}),
    "seven": (160, 96, (5, 7, 7), {"activation": "silu"}),
    "seven-wide": (112, 672, (3, 7, 7), {"activation": None}),
    "one-row": (8, 16, (6, 1, 131), {"activation": "silu"}),
    "one-column": (8, 16, (6, 37, 1), {"activation": "silu"}),
    "odd-channels": (7, 10, (4, 15, 23), {"activation": "silu"}),
    "many-channels": (960, 160, (3, 7, 7), {"activation": "silu"}),
    "relu6": (16, 32, (3, 20, 20), {"activation": "relu6"}),
    "hardswish": (16, 32, (3, 20, 20), {"activation": "hardswish"}),
    "gelu": (16, 32, (3, 14, 14), {"activation": "gelu"}),
    "bias": (16, 32, (3, 14, 14), {"norm": None, "bias": True, "activation": "silu"}),
    "groups": (32, 64, (3, 14, 14), {"groups": 4, "activation": "silu"}),
    "stride": (16, 32, (3, 15, 14), {"stride": 2, "activation": "silu"}),
    "k3": (12, 32, (3, 14, 15), {"kernel_size": 3, "activation": "silu"}),
    "k3-stride-groups": (12, 32, (3, 15, 15), {"kernel_size": 3, "stride": 2, "groups": 2, "activation": "silu"}),
}
KINKED = ("relu6", "hardswish")
every_unit = pytest.mark.parametrize("unit", UNITS)


def problem(name, precision=FP32, last=False, training=False):
    """The unit, its input and the gradient of its output, on the device."""
    in_channels, out_channels, (batch, height, width), options = UNITS[name]
    unit = make_unit(in_channels, out_channels, **options)
    x = place(torch.randn(batch, in_channels, height, width).to(precision.dtype), last)
    size = (batch, out_channels, *unit.output_size(height, width))
    return unit, x, place(torch.randn(size).to(precision.dtype), last) if training else None


def test_some_kernels_run_here():
    reasons = {name: backends.BACKENDS[name].unavailable() for name in BACKENDS}
    assert "" in reasons.values(), reasons
    if not reasons[BACKENDS[0]]:
        fused_on(make_unit(16, 32).to(DEVICE).eval(), torch.randn(1, 16, 8, 8, device=DEVICE))


@both_layouts
@every_precision
@both_modes
@every_unit
def test_units(gpu_backend, unit, training, precision, last):
    if training and unit in KINKED and precision is not FP32:
        pytest.skip("rounding decides on which side of a kink a value lies")
    if gpu_backend != BACKENDS[0] and precision.name in ("bf16", "tf32") and unit not in ("plain", "relu"):
        pytest.skip("compiles for long: few units in this format")
    made, x, upstream = problem(unit, precision, last, training)
    check(made, x, upstream, precision, last)


@both_layouts
@pytest.mark.parametrize("name", ["fp16", "bf16"])
@both_modes
def test_autocast(gpu_backend, training, name, last):
    for unit in ("plain", "ratio3-cut"):
        made, x, upstream = problem(unit, PRECISIONS[name], last, training)
        if training:
            check(made, x, upstream, PRECISIONS[name], last, autocast=True)
            continue
        fused = fused_on(made.eval().to(DEVICE), x.float(), last)
        with torch.autocast(DEVICE.type, PRECISIONS[name].dtype), torch.no_grad():
            found = fused(x.float())
        wanted = copy.deepcopy(made).double().eval()(x.double())
        assert found.dtype == PRECISIONS[name].dtype
        assert (found - wanted).norm() <= PRECISIONS[name].inference_limit * wanted.norm()


@pytest.mark.skipif(not ON_GPU, reason="the switch is for GPUs")
def test_fp32_is_exact_unless_the_switch_says_otherwise(gpu_backend):
    made, x, _ = problem("many-channels")
    made = made.to(DEVICE).eval()
    wanted = copy.deepcopy(made).double()(x.double())
    errors = []
    for tf32 in (False, True):
        with PRECISIONS["tf32" if tf32 else "fp32"].switched(DEVICE):
            errors.append(((run(fused_on(made, x), x)[0] - wanted).norm() / wanted.norm()).item())
    assert errors[0] <= 1e-5
    assert errors[1] <= 2e-3


# ---- gradients that arrive with odd strides

UPSTREAMS = {
    "one-number": lambda g: g[:1, :1, :1, :1].expand_as(g),
    "one-image": lambda g: g[:1].expand_as(g),
    "one-row": lambda g: g[:, :, :1].expand_as(g),
    "slice-of-channels": lambda g: torch.cat([g, g], 1)[:, g.shape[1] // 2 : g.shape[1] // 2 + g.shape[1]],
    "every-other-channel": lambda g: torch.stack([g, g * float("nan")], 2).flatten(1, 2)[:, ::2],
    "every-other-column": lambda g: torch.stack([g, g * float("nan")], 4).flatten(3, 4)[..., ::2],
    "inner-pixels": lambda g: torch.nn.functional.pad(g, (1, 2, 3, 1), value=float("nan"))[:, :, 3:-1, 1:-2],
    "transposed": lambda g: g.transpose(2, 3).contiguous().transpose(2, 3),
    "batch-innermost": lambda g: g.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "other-layout": lambda g: g.contiguous(memory_format=torch.channels_last),
}


@both_layouts
@pytest.mark.parametrize("name", ["fp32", "fp16"])
@pytest.mark.parametrize("strides", UPSTREAMS)
def test_upstream_gradients_of_any_strides(gpu_backend, strides, name, last):
    made, x, upstream = problem("plain", PRECISIONS[name], last, training=True)
    if strides == "one-number":
        # Under a constant gradient almost nothing passes batch statistics; a gate lets through what there is.
        made.primary_conv[1].eval()
        made.cheap_operation[1].eval()
        fused, plain = fused_on(made.to(DEVICE, x.dtype), x, last), copy.deepcopy(made).to(DEVICE).double()
        strided = UPSTREAMS[strides](upstream)
        found, wanted = run(fused, x, strided), run(plain, x.double(), strided.double())
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= PRECISIONS[name].training_limit * 2 * theirs.norm()
        return
    check(made, x, UPSTREAMS[strides](upstream), PRECISIONS[name], last)


INPUTS = {
    "inner-channels": lambda x: torch.cat([x, x, x], 1)[:, 5 : 5 + x.shape[1]],
    "inner-pixels": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 1), value=float("nan"))[:, :, 1:-1, 3:-2],
    "every-other-image": lambda x: torch.stack([x, x * float("nan")], 1).flatten(0, 1)[::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "misaligned": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("name", ["fp32", "fp16"])
@both_modes
@pytest.mark.parametrize("strides", INPUTS)
def test_inputs_of_any_strides(gpu_backend, strides, training, name):
    made, x, upstream = problem("plain", PRECISIONS[name], False, training)
    check(made, INPUTS[strides](x), upstream, PRECISIONS[name])


# ---- sizes and states


@both_layouts
def test_empty_batch(last):
    """Whichever backend takes it: the right shape, and gradients that are zero."""
    unit = make_unit(6, 10).to(DEVICE)
    x = place(torch.randn(0, 6, 5, 7), last).requires_grad_()
    with torch.no_grad():
        assert FusedFiF.from_reference(unit).eval()(x).shape == (0, 10, 5, 7)
    out = FusedFiF.from_reference(unit).eval()(x)
    gradients = torch.autograd.grad(out.sum(), [x, *unit.parameters()], allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)


@both_layouts
@both_modes
@pytest.mark.parametrize(
    "size", [(65536, 4, 2, 2), (70000, 8, 1, 1), (2, 40000, 2, 2)], ids=["65536", "70000", "channels"]
)
def test_more_than_65535_of_something(gpu_backend, size, training, last):
    batch, channels, height, width = size
    out_channels = 66000 if channels > 1000 else 6
    groups = 1000 if channels > 1000 else 1
    unit = make_unit(channels, out_channels, activation="silu", groups=groups)
    x = place(torch.randn(size), last)
    upstream = place(torch.randn(batch, out_channels, height, width), last) if training else None
    check(unit, x, upstream, last=last, truth_on=torch.device("cpu"))  # such sizes are not for every library


@pytest.mark.parametrize("mode", ["tracked", "momentum-none", "untracked", "frozen-primary", "frozen-cheap"])
@both_layouts
def test_statistics_after_some_steps(gpu_backend, last, mode):
    plain = make_unit(8, 20, activation="silu").to(DEVICE)
    for norm in (plain.primary_conv[1], plain.cheap_operation[1]):
        if mode == "momentum-none":
            norm.momentum = None
        if mode == "untracked":
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    if mode.startswith("frozen"):
        (plain.primary_conv if mode == "frozen-primary" else plain.cheap_operation)[1].eval()
    x = place(torch.randn(5, 8, 6, 9), last)
    fused, exact = fused_on(plain, x, last), copy.deepcopy(plain).double()
    for _ in range(3):
        x = torch.randn_like(x)
        upstream = torch.randn(5, 20, 6, 9, device=DEVICE)
        found, wanted = run(fused, x, upstream), run(exact, x.double(), upstream.double())
        for ours, theirs in zip(found, wanted, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    for (name, ours), theirs in zip(fused.named_buffers(), exact.buffers(), strict=True):
        assert (ours - theirs).double().norm() <= 1e-5 * theirs.double().norm(), name


@both_layouts
@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_float32_normalisation_of_16_bit_maps(gpu_backend, name, last):
    precision = PRECISIONS[name]
    made, x, upstream = problem("plain", precision, last, training=True)
    made = made.to(DEVICE, precision.dtype)
    for stage in (made.primary_conv, made.cheap_operation):
        stage[1].float()
    fused, exact = fused_on(made, x, last), copy.deepcopy(made).double()
    found, wanted = run(fused, x, upstream), run(exact, x.double(), upstream.double())
    parameters = [x, *made.parameters()]
    for ours, theirs, like in zip(found[1:], wanted[1:], parameters, strict=False):
        assert ours.dtype == like.dtype
        assert (ours - theirs).norm() <= 4 * precision.training_limit * theirs.norm()
    with torch.no_grad():
        found, wanted = fused.eval()(x), exact.eval()(x.double())
    assert (found - wanted).norm() <= precision.inference_limit * wanted.norm()


@both_layouts
def test_the_halo_is_zero_after_the_activation(gpu_backend, last):
    """Of x = 0 and a positive shift y is positive everywhere; around the map it is 0 all the same."""
    unit = make_unit(4, 8).to(DEVICE).eval()
    with torch.no_grad():
        unit.primary_conv[1].bias.fill_(2.0)
        unit.primary_conv[1].running_mean.zero_()
        for size, dtype in itertools.product(((5, 6), (1, 1), (17, 33)), (torch.float32, torch.float16)):
            x = place(torch.zeros(2, 4, *size, dtype=dtype), last)
            found = fused_on(unit.to(dtype), x, last)(x)
            wanted = FeatureAugment._copy_of(unit).double()(x.double())
            assert (found - wanted).norm() <= 3e-3 * wanted.norm()

"""A depthwise convolution with its normalisation in training, against torch in float64."""

import copy

import pytest
import torch
from torch import nn

from fif_ops import backends, ops
from fif_ops.autograd import StridedNorm
from fif_ops.models import conv_norm as module
from fif_ops.models.conv_norm import ConvNorm, PooledConvNorm, conv_norm

pytestmark = pytest.mark.skipif(not ops.LOADED, reason="needs the binary library")


@pytest.fixture(autouse=True)
def small_maps_too(monkeypatch):
    monkeypatch.setattr(module, "STRIDED_PIXELS", 1)


LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SIZES = {  # batch, channels, height, width, kernel, stride
    "usual": (3, 32, 14, 14, 3, 2),
    "odd": (2, 19, 11, 9, 3, 2),
    "narrow": (2, 5, 7, 7, 5, 2),
    "pixel": (16, 17, 1, 1, 3, 2),
    "column": (3, 3, 9, 1, 7, 3),
    "steep": (3, 8, 10, 10, 3, 4),
    "flat": (2, 20, 6, 13, 3, 1),
    "many": (33, 16, 4, 4, 3, 2),
}


def made(kind, size, dtype):
    batch, channels, height, width, kernel, stride = size
    torch.manual_seed(0)
    unit = ConvNorm(channels, channels, kernel, stride, groups=channels).to(dtype)
    nn.init.uniform_(unit[1].weight, 0.5, 1.5)
    nn.init.normal_(unit[1].bias)
    offset = 3 if dtype in (torch.float32, torch.float64) else 0  # which rounded maps would lose digits to
    x = torch.randn(batch, channels, height, width, dtype=torch.float64) + offset
    return unit, x.to(dtype).contiguous(memory_format=LAYOUTS[kind]).requires_grad_()


def results(unit, x, upstream):
    out = unit(x)
    gradients = torch.autograd.grad(out, (x, *unit.parameters()), upstream)
    return (out, *gradients, *(t.detach().clone() for t in unit.buffers()))


def plain_twin(unit):
    """torch's own modules in float64, of the same values."""
    conv = unit[0]
    twin = conv_norm(conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.groups)
    twin.double().load_state_dict(unit.state_dict())
    return twin


def is_strided(out):
    return out.grad_fn.name() == "StridedNormBackward"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_agrees_with_float64(layout, dtype, size):
    unit, x = made(layout, SIZES[size], dtype)
    assert is_strided(copy.deepcopy(unit)(x))
    batch, channels, height, width, _, stride = SIZES[size]
    upstream = torch.randn(batch, channels, -(height // -stride), -(width // -stride)).to(dtype)
    truth = results(plain_twin(unit), x.detach().double().requires_grad_(), upstream.double())
    strided = upstream.transpose(2, 3).contiguous().transpose(2, 3)
    for name, upward in (("dense", upstream), ("strided", strided)):
        ours = results(copy.deepcopy(unit), x, upward)
        assert ours[0].is_contiguous(memory_format=LAYOUTS[layout])
        for got, want in zip(ours, truth, strict=True):
            scale = max(1.0, want.double().abs().max().item())
            assert got.double().isfinite().all()
            assert (got.double() - want).abs().max() <= TOLERANCES[dtype] * scale * 4, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck(layout):
    unit, x = made(layout, (2, 3, 5, 4, 3, 2), torch.float64)
    weight, bias = (t.detach().requires_grad_() for t in (unit[1].weight, unit[1].bias))

    def call(x, kernel, weight, bias):
        return StridedNorm.apply(x, kernel, weight, bias, None, None, 1e-5, 0.1, 2)

    inputs = (x, unit[0].weight, weight, bias)
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    some = (x.detach(), unit[0].weight.detach(), weight, bias)
    assert torch.autograd.gradcheck(call, some)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [0, 3])
def test_opcheck(layout, batch):
    unit, x = made(layout, (batch, 18, 5, 4, 3, 2), torch.float32)
    x = x.detach()
    conv, norm = unit[0].weight.detach(), unit[1]
    weight, bias = norm.weight.detach(), norm.bias.detach()
    arguments = (x, conv, weight, bias, norm.running_mean, norm.running_var, 1e-5, 0.1, 2)
    torch.library.opcheck(torch.ops.fif_ops.strided_train.default, arguments)
    out, raw, stats = torch.ops.fif_ops.strided_train(*arguments)
    for need_x in (True, False):
        backward = (torch.randn_like(out), x, conv, raw, stats, weight, need_x, 2)
        torch.library.opcheck(torch.ops.fif_ops.strided_backward.default, backward)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_for_any_number_of_threads(layout):
    unit, x = made(layout, (9, 40, 28, 28, 3, 2), torch.float32)
    upstream = torch.randn(9, 40, 14, 14)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(results(copy.deepcopy(unit), x, upstream))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_what_is_not_plain_goes_to_torch():
    unit, x = made("nchw", SIZES["usual"], torch.float32)
    assert is_strided(unit(x))
    changes = {
        "evaluation": lambda u: u[1].eval(),
        "hook": lambda u: u[0].register_forward_hook(lambda module, inputs, out: out + 1),
        "momentum": lambda u: setattr(u[1], "momentum", None),
        "dilation": lambda u: (setattr(u[0], "dilation", (2, 2)), setattr(u[0], "padding", (2, 2))),
    }
    for change in changes.values():
        other = copy.deepcopy(unit)
        change(other)
        assert not is_strided(other(x))
    with backends.use("reference"):
        assert not is_strided(unit(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert unit(x).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="more than 1 value"):
        ConvNorm(4, 4, 3, 2, groups=4)(torch.randn(1, 4, 2, 2))


@pytest.mark.parametrize("training", [True, False])
def test_head_agrees(training):
    torch.manual_seed(0)
    head = PooledConvNorm(12, 20).double().train(training)
    plain = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_norm(12, 20, 1, relu=True), nn.Flatten()).double()
    plain.load_state_dict(head.state_dict())
    plain.train(training)
    x, upstream = torch.randn(6, 12, 3, 2, dtype=torch.float64, requires_grad=True), torch.randn(6, 20).double()
    torch.testing.assert_close(results(head, x, upstream), results(plain, x, upstream))
    head[1].register_forward_hook(lambda module, inputs, out: out * 0)
    assert not torch.equal(head(x), plain(x))


def test_heads_of_other_parts_run_as_they_are():
    for place, part in {
        0: nn.AdaptiveAvgPool2d(2), 1: nn.Conv2d(12, 20, 3, padding=1, bias=False), 2: nn.Identity(),
    }.items():  # fmt: skip
        head = PooledConvNorm(12, 20).eval()
        head[place] = part
        x = torch.randn(2, 12, 4, 4)
        torch.testing.assert_close(head(x), nn.Sequential(*head)(x))
    head[1] = nn.Conv2d(12, 20, 1, groups=4, bias=False)
    torch.testing.assert_close(head(x), nn.Sequential(*head)(x))

"""FeatureAugment and compose against literal loops, counted sizes, and the statements of the source."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fif_ops import FeatureAugment, Norm, models
from fif_ops.reference import ACTIVATIONS, compose, memory_format_of

pytestmark = pytest.mark.usefixtures("one_thread")

FUNCTIONS = {None: lambda t: t, **{name: kind() for name, kind in ACTIVATIONS.items()}}


def literal_convolution(maps, kernels, bias, maps_of_kernel, stride, padding):
    """Kernel by kernel, over the maps that ``maps_of_kernel`` gives it; maps (B, C, H, W), kernels (N, c, k, k)."""
    padded = np.pad(maps, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    result = np.zeros((len(maps), len(kernels), *windows.shape[2:4]))
    for index, kernel in enumerate(kernels):
        for source, plane in zip(maps_of_kernel(index), kernel, strict=True):
            result[:, index] += np.einsum("bhwij,ij->bhw", windows[:, source], plane)
        if bias is not None:
            result[:, index] += bias[index]
    return result


def literal_unit(unit, x):
    """The unit of S0 [0142]-[0197] by loops over kernels and groups, in float64, with running statistics."""

    def numbers(tensor):
        return None if tensor is None else tensor.detach().numpy()

    def finish(maps, norm):
        if isinstance(norm, nn.BatchNorm2d):
            mean, var = numbers(norm.running_mean), numbers(norm.running_var)
            scale = numbers(norm.weight) / np.sqrt(var + norm.eps)
            maps = (maps - mean[:, None, None]) * scale[:, None, None] + numbers(norm.bias)[:, None, None]
        return FUNCTIONS[unit.activation](torch.from_numpy(maps)).numpy()

    m, c = unit.primary_channels, unit.matrix_channels
    conv, cheap = unit.primary_conv[0], unit.cheap_operation[0]
    per_group_in, per_group_out = unit.in_channels // unit.groups, m // unit.groups
    y = literal_convolution(
        numbers(x),
        numbers(conv.weight),
        numbers(conv.bias),
        lambda kernel: range(kernel // per_group_out * per_group_in, (kernel // per_group_out + 1) * per_group_in),
        unit.stride,
        unit.padding,
    )
    y = finish(y, unit.primary_conv[1])
    weight, bias = numbers(cheap.weight), numbers(cheap.bias)
    per_group = unit.cheap_channels // (m // c)
    if unit.shared:
        weight = np.stack([weight[index % per_group] for index in range(unit.cheap_channels)])
        bias = None if bias is None else np.stack([bias[index % per_group] for index in range(unit.cheap_channels)])
    z = literal_convolution(
        y,
        weight,
        bias,
        lambda kernel: range(kernel // per_group * c, (kernel // per_group + 1) * c),
        1,
        unit.cheap_kernel_size // 2,
    )
    z = finish(z, unit.cheap_operation[1])
    return (np.concatenate([y, z], 1) if unit.splice else z)[:, : unit.out_channels]


def randomise(unit):
    for name, tensor in (*unit.named_parameters(), *unit.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2.0) if "running_var" in name else tensor.data.normal_()
    return unit


def norms_of(unit, training=False):
    return {
        f"{part}_norm": Norm(bn.weight, bn.bias, bn.running_mean, bn.running_var, training, 0.1, bn.eps)
        for part, bn in (("primary", unit.primary_conv[1]), ("cheap", unit.cheap_operation[1]))
        if isinstance(bn, nn.BatchNorm2d)
    }


def composed(unit, x, training=False):
    conv, cheap = unit.primary_conv[0], unit.cheap_operation[0]
    names = ("out_channels", "activation", "splice", "stride", "padding", "groups", "shared")
    return compose(
        x,
        conv.weight,
        cheap.weight,
        primary_bias=conv.bias,
        cheap_bias=cheap.bias,
        **norms_of(unit, training),
        **{name: getattr(unit, name) for name in names},
    )


@pytest.mark.parametrize("splice", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("d", [1, 3, 5])
@pytest.mark.parametrize("k", [1, 3])
def test_all_variants_equal_literal_loops(k, d, shared, splice):
    """V1-V6: c = 1, 2, 3, 4 and c = M, own and shared kernels, spliced and not."""
    for in_channels, m, per_map in ((5, 4, 1), (6, 4, 2), (5, 4, 3), (6, 6, 1), (5, 6, 2), (6, 6, 3)):
        for c in (c for c in (1, 2, 3, 4, 6) if m % c == 0):
            ratio = per_map + splice
            unit = FeatureAugment(
                in_channels, m * ratio, k, ratio, d, activation=None, norm=None, splice=splice, matrix_channels=c,
                shared=shared,
            ).double()  # fmt: skip
            x = torch.randn(2, in_channels, 4, 3, dtype=torch.float64)
            np.testing.assert_allclose(unit(x).detach().numpy(), literal_unit(unit, x), rtol=0, atol=1e-10)


@st.composite
def units(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    c = draw(st.sampled_from([1, 1, 2, 3]))
    splice = draw(st.booleans())
    ratio = draw(st.integers(2 if splice else 1, 4))
    m = np.lcm(groups, c).item() * draw(st.integers(1, 3))
    unit = FeatureAugment(
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=draw(st.integers((m - 1) * ratio + 1, m * ratio)),
        kernel_size=draw(st.sampled_from([1, 2, 3])),
        ratio=ratio,
        cheap_kernel_size=draw(st.sampled_from([1, 3, 5])),
        stride=draw(st.integers(1, 2)),
        activation=draw(st.sampled_from([None, *ACTIVATIONS])),
        norm=draw(st.sampled_from(["batch", None])),
        splice=splice,
        matrix_channels=c,
        shared=draw(st.booleans()),
        groups=groups,
        bias=draw(st.booleans()),
        padding=draw(st.sampled_from([None, 0, 2])),
    )
    return randomise(unit.double())


@given(unit=units(), batch=st.integers(0, 3), size=st.tuples(st.integers(3, 6), st.integers(3, 6)))
def test_whole_unit_equals_literal_loops(unit, batch, size):
    x = torch.randn(batch, unit.in_channels, *size, dtype=torch.float64)
    unit.eval()
    result = unit(x)
    np.testing.assert_allclose(result.detach().numpy(), literal_unit(unit, x), rtol=1e-10, atol=1e-10)
    assert result.shape[2:] == unit.output_size(*size)
    torch.testing.assert_close(composed(unit, x), result, rtol=0, atol=0)


@settings(max_examples=20)
@given(unit=units())
def test_compose_trains_as_the_module(unit):
    x = torch.randn(2, unit.in_channels, 5, 4, dtype=torch.float64)
    twin = FeatureAugment._copy_of(unit)
    torch.testing.assert_close(composed(twin, x, training=True), unit.train()(x), rtol=0, atol=0)
    for name, buffer in unit.named_buffers():
        if "num_batches" not in name:
            torch.testing.assert_close(twin.get_buffer(name), buffer, rtol=0, atol=0)


def test_zero_halo_with_positive_shift():
    """The cheap convolution pads y itself with zeros: its halo is zero, not relu(shift)."""
    unit = FeatureAugment(3, 4).double().eval()
    shift = torch.tensor([0.5, 2.0], dtype=torch.float64)
    with torch.no_grad():
        unit.primary_conv[1].bias.copy_(shift)
        unit.cheap_operation[0].weight.fill_(1.0)
        unit.cheap_operation[1].running_var.fill_(1.0 - unit.cheap_operation[1].eps)
    out = unit(torch.zeros(1, 3, 4, 5, dtype=torch.float64))
    taps = F.conv2d(torch.ones(1, 1, 4, 5), torch.ones(1, 1, 3, 3), padding=1)[0, 0].double()
    assert taps.unique().tolist() == [4.0, 6.0, 9.0]
    torch.testing.assert_close(out[0, :2], shift[:, None, None].expand(2, 4, 5))
    torch.testing.assert_close(out[0, 2:], shift[:, None, None] * taps)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize(
    ("splice", "ratio", "out"), [(True, 2, 8), (True, 2, 7), (True, 4, 9), (False, 2, 7), (False, 1, 5)]
)
def test_result_is_fresh_and_in_the_layout_of_x(splice, ratio, out, batch, layout):
    unit = FeatureAugment(3, out, ratio=ratio, splice=splice, norm=None, activation=None)
    x = torch.randn(batch, 3, 4, 5).contiguous(memory_format=layout)
    with torch.no_grad():
        for result in (unit(x), composed(unit, x)):
            assert result.shape == (batch, out, 4, 5)
            assert result.is_contiguous(memory_format=layout if batch else torch.contiguous_format)
            assert result.untyped_storage().nbytes() == 4 * result.numel()


def test_memory_format_rule_is_torchs():
    conv = nn.Conv2d(4, 6, 1)
    for size in ((2, 4, 3, 5), (1, 4, 1, 1), (3, 4, 1, 1), (1, 4, 3, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(size, memory_format=layout)
            assert memory_format_of(x) == layout
            assert memory_format_of(conv(x)) == layout
    wide = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    assert memory_format_of(wide[:, ::2]) == torch.channels_last
    assert memory_format_of(wide.contiguous()[:, ::2]) == torch.contiguous_format
    assert memory_format_of(torch.randn(2, 1, 3, 5).expand(2, 4, 3, 5)) == torch.contiguous_format


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_compose_is_differentiable_twice(activation):
    unit = randomise(FeatureAugment(2, 5, ratio=2, activation=activation, bias=True).double())
    x = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().requires_grad_() for p in (unit.primary_conv[0].weight, unit.cheap_operation[0].weight)]

    def run(x, primary, cheap):
        norms = {
            name: norm._replace(weight=norm.weight.detach(), bias=norm.bias.detach(), momentum=0.0)
            for name, norm in norms_of(unit, training=True).items()
        }
        return compose(x, primary, cheap, activation=activation, out_channels=5, **norms)

    assert torch.autograd.gradcheck(run, (x, *weights))
    assert torch.autograd.gradgradcheck(run, (x, *weights), atol=1e-4, fast_mode=True)


@pytest.mark.parametrize(("k", "d", "c", "shared", "splice", "ratio", "groups", "stride"), [
    (1, 3, 1, False, True, 2, 1, 1),
    (1, 3, 1, True, True, 3, 1, 2),
    (3, 5, 2, False, True, 2, 2, 1),
    (3, 3, 2, True, False, 2, 1, 2),
    (1, 3, 4, False, False, 1, 1, 1),
    (1, 1, 12, False, True, 3, 3, 1),
])  # fmt: skip
def test_counts(k, d, c, shared, splice, ratio, groups, stride):
    """The table of primary and cheap parameters and multiplications, and the same counted from real modules."""
    channels, m, height, width = 6, 12, 9, 7
    unit = FeatureAugment(
        channels, m * ratio, k, ratio, d, stride, splice=splice, matrix_channels=c, shared=shared, groups=groups
    )
    n = m * (ratio - splice)
    assert (unit.primary_channels, unit.cheap_channels) == (m, n)
    cheap = (n * c // m if shared else n) * c * d**2
    primary = m * (channels // groups) * k**2
    assert unit.parameter_count() == primary + cheap + 2 * (m + n)
    h, w = -(-height // stride), -(-width // stride)
    assert unit.mac_count(height, width) == h * w * (primary + n * c * d**2)
    assert unit.mac_count(height, width) == models.mac_count(unit, height, width, channels)
    standard = nn.Conv2d(channels, m * ratio, k, bias=False)
    assert unit.parameter_ratio() == pytest.approx(standard.weight.numel() / (primary + cheap), rel=1e-12)
    assert unit.mac_ratio() == pytest.approx(standard.weight.numel() / (primary + n * c * d**2), rel=1e-12)


def test_bias_counts_as_parameters():
    assert FeatureAugment(6, 8, norm=None, bias=True).parameter_count() == 6 * 4 + 4 + 4 * 9 + 4
    assert FeatureAugment(6, 8, norm=None, bias=True, shared=True).parameter_count() == 6 * 4 + 4 + 9 + 1


@pytest.mark.parametrize(("channels", "s", "k", "d", "formula", "spliced", "unspliced", "spliced_kernels"), [
    (16, 2, 1, 3, 1.8824, 1.2800, 0.9412, 1.4118),
    (16, 2, 3, 3, 1.8824, 1.8824, 1.7778, 2.6667),
    (64, 2, 1, 3, 1.9692, 1.7534, 1.5610, 2.3415),
    (64, 2, 3, 3, 1.9692, 1.9692, 1.9394, 2.9091),
    (64, 4, 1, 3, 3.8209, 2.8132, 2.5600, 3.2000),
    (256, 2, 1, 3, 1.9922, 1.9321, 1.8686, 2.8029),
    (256, 4, 3, 3, 3.9537, 3.9537, 3.9385, 4.9231),
])  # fmt: skip
def test_compression_ratios(channels, s, k, d, formula, spliced, unspliced, spliced_kernels):
    """S0 prints one formula; it is exact only if spliced, with S counting the identity, and d = k."""
    unit = FeatureAugment(channels, 8 * s, k, s, d)
    assert unit.formula_ratio() == pytest.approx(formula, abs=5e-5)
    assert unit.parameter_ratio() == unit.mac_ratio() == pytest.approx(spliced, abs=5e-5)
    if k == d:
        assert unit.formula_ratio() == pytest.approx(unit.mac_ratio(), rel=1e-12)
    else:
        assert unit.formula_ratio() > unit.mac_ratio() * 1.01
    assert FeatureAugment(channels, 8 * s, k, s, d, splice=False).mac_ratio() == pytest.approx(unspliced, abs=5e-5)
    kernels_counted = FeatureAugment(channels, 8 * (s + 1), k, s + 1, d)
    assert kernels_counted.mac_ratio() == pytest.approx(spliced_kernels, abs=5e-5)


def test_formula_needs_each_of_its_conditions():
    def gap(**change):
        unit = FeatureAugment(**{"in_channels": 16, "out_channels": 24, "kernel_size": 3, "ratio": 2, **change})
        return abs(unit.formula_ratio() / unit.parameter_ratio() - 1)

    assert gap() < 1e-12
    for change in (
        {"cheap_kernel_size": 5}, {"matrix_channels": 2}, {"shared": True}, {"splice": False}, {"groups": 2},
        {"out_channels": 23},
    ):  # fmt: skip
        assert gap(**change) > 1e-3, change


@pytest.mark.parametrize(("arguments", "words"), [
    ({"in_channels": 0}, "in_channels=0: must be 1 or more"),
    ({"stride": -1}, "stride=-1: must be 1 or more"),
    ({"padding": -1}, "padding=-1: must be 0 or more"),
    ({"cheap_kernel_size": 4}, "cheap_kernel_size=4: must be odd.* use 3 or 5"),
    ({"ratio": 1}, "ratio=1: a spliced unit .* ratio >= 2, or splice=False"),
    ({"norm": "layer"}, "norm='layer': must be \"batch\" or None"),
    ({"groups": 4}, "in_channels=10 does not divide into groups=4; nearest in_channels: 8 or 12; .*groups: 2 or 5"),
    ({"groups": 20}, "in_channels=10 .*groups=20; nearest in_channels: 20; nearest groups: 10"),
    ({"groups": 5}, "groups=5 does not divide the 12 primary maps .*nearest groups: 4 or 6; .*out_channels: 20 or 29"),
    ({"matrix_channels": 5}, "matrix_channels=5 does not divide the 12 .*matrix_channels: 4 or 6; .*: 20 or 29"),
    ({"matrix_channels": 13}, "matrix_channels=13 .*nearest matrix_channels: 12; nearest out_channels: 25"),
    ({"activation": "mish"}, "activation='mish': must be None, one of 'relu', .*GELU"),
    ({"activation": nn.GELU("tanh")}, "approximate='none'"),
    ({"activation": nn.LeakyReLU()}, "activation=LeakyReLU"),
    ({"activation": nn.ReLU}, "activation=<class"),
    ({"strict": True}, "ratio=2 makes 12 cheap maps of 12 .*ratio >= 3"),
    ({"strict": True, "ratio": 3, "matrix_channels": 8}, "matrix_channels=8 is not below the 8 .*matrix_channels <= 4"),
    ({"strict": True, "splice": False, "out_channels": 2}, "matrix_channels=1 is not below the 1 .*more out_channels"),
])  # fmt: skip
def test_refused_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        FeatureAugment(**{"in_channels": 10, "out_channels": 24, **arguments})


@pytest.mark.parametrize("name", ["in_channels", "out_channels", "kernel_size", "ratio", "stride", "padding", "groups"])
@pytest.mark.parametrize("value", [2.0, True, (3, 3), "4"])
def test_refused_types(name, value):
    with pytest.raises(TypeError, match=f"{name}=.*must be one integer"):
        FeatureAugment(**{"in_channels": 10, "out_channels": 24, name: value})


def test_suggested_sizes_are_accepted():
    for arguments in (
        {"in_channels": 8, "groups": 4}, {"in_channels": 12, "groups": 4}, {"groups": 5, "out_channels": 20},
        {"groups": 5, "out_channels": 29}, {"matrix_channels": 13, "out_channels": 25}, {"strict": True, "ratio": 3},
        {"strict": True, "splice": False}, {"in_channels": np.int64(10)},
    ):  # fmt: skip
        FeatureAugment(**{"in_channels": 10, "out_channels": 24, **arguments})


def test_refused_inputs():
    unit = FeatureAugment(3, 8)
    with pytest.raises(
        ValueError, match=r"x has shape \(3, 4, 4\): must have 4 dimensions, \(batch, 3, height, width\)"
    ):
        unit(torch.randn(3, 4, 4))
    with pytest.raises(RuntimeError, match="channels"):
        unit(torch.randn(1, 4, 4, 4))


def test_activation_given_as_module():
    for name, kind in ACTIVATIONS.items():
        unit = FeatureAugment(3, 8, activation=kind())
        assert unit.activation == name
        assert type(unit.primary_conv[2]) is type(unit.cheap_operation[2]) is kind
    assert FeatureAugment(3, 8, activation=nn.ReLU(inplace=True)).primary_conv[2].inplace is False
    assert len(FeatureAugment(3, 8, activation=None).primary_conv) == 2


def test_checkpoints_of_public_ghost_modules_load():
    """Their modules hold Sequential(conv, norm, relu or empty Sequential) under these two names."""

    class Ghost(nn.Module):
        def __init__(self, m):
            super().__init__()
            self.primary_conv = nn.Sequential(nn.Conv2d(6, m, 1, bias=False), nn.BatchNorm2d(m), nn.Sequential())
            self.cheap_operation = nn.Sequential(
                nn.Conv2d(m, m, 3, 1, 1, groups=m, bias=False), nn.BatchNorm2d(m), nn.Sequential()
            )

        def forward(self, x):
            y = self.primary_conv(x)
            return torch.cat([y, self.cheap_operation(y)], 1)[:, :9]

    ghost = randomise(Ghost(5)).eval()
    unit = FeatureAugment(6, 9, activation=None).eval()
    unit.load_state_dict(ghost.state_dict())
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(unit(x), ghost(x), rtol=0, atol=0)
    statistics = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert list(unit.state_dict()) == [
        f"{part}.{key}"
        for part in ("primary_conv", "cheap_operation")
        for key in ("0.weight", *(f"1.{name}" for name in statistics))
    ]


def test_shared_weights_are_stored_once():
    unit = FeatureAugment(6, 16, ratio=2, matrix_channels=2, shared=True, bias=True, norm=None)
    assert unit.cheap_operation[0].weight.shape == (2, 2, 3, 3)
    assert unit.cheap_operation[0].bias.shape == (2,)


def test_repr_and_config_are_the_constructors():
    unit = FeatureAugment(6, 16, 3, 3, activation=nn.SiLU(), matrix_channels=2, shared=True, stride=2)
    assert FeatureAugment(**unit.config()).config() == unit.config()
    assert unit.extra_repr() == (
        "6, 16, kernel_size=3, ratio=3, cheap_kernel_size=3, stride=2, activation='silu', norm='batch', splice=True, "
        "matrix_channels=2, shared=True, groups=1, bias=False, padding=1, strict=False"
    )

"""Spindle and HWNet: the counts, sizes and structure of the source's tables."""

import pytest
import torch
from torch import nn

from fif_ops import FeatureAugment, FusedFiF
from fif_ops.models import HWNet, Spindle, hwnet, mac_count, parameter_count
from fif_ops.models.conv_norm import ConvNorm, conv_norm

pytestmark = pytest.mark.usefixtures("one_thread")

GOLDEN = {
    ("patent", 0.5): (1_004_600, 49_981_024),
    ("patent", 0.9): (2_294_426, 140_807_522),
    ("patent", 1.0): (2_676_360, 169_883_840),
    ("patent", 1.25): (3_762_800, 256_055_920),
    ("table2", 0.5): (1_008_024, 49_030_816),
    ("table2", 0.9): (2_315_758, 141_397_482),
    ("table2", 1.0): (2_703_944, 170_993_984),
    ("table2", 1.25): (3_810_240, 259_325_200),
}
TABLE_2 = {0.5: (1.0e6, 49e6), 0.9: (2.3e6, 141e6), 1.0: (2.7e6, 171e6), 1.25: (3.8e6, 260e6)}
TOLERANCE = {"patent": (1.0, 2.0), "table2": (0.8, 0.3)}  # per cent, to the digit given
CHANNELS = {
    0.5: (8, 16, 32, 48, 64, 128, 256, 640),
    0.9: (16, 28, 56, 88, 116, 232, 460, 1152),
    1.0: (16, 32, 64, 96, 128, 256, 512, 1280),
    1.25: (20, 40, 80, 120, 160, 320, 640, 1600),
}
# HWNet-B at width 1.0: channels in, hidden, out, stride, parameters, multiplications, input size.
SPINDLES = [
    (16, 16, 16, 1, 464, 5_017_600, 112),
    (16, 96, 32, 2, 4_192, 23_030_784, 112),
    (32, 96, 32, 1, 3_904, 11_440_128, 56),
    (32, 192, 64, 2, 12_992, 18_740_736, 56),
    (64, 192, 64, 1, 13_952, 10_536_960, 28),
    (64, 192, 64, 1, 13_952, 10_536_960, 28),
    (64, 288, 96, 2, 28_704, 11_543_616, 28),
    (96, 288, 96, 1, 30_144, 5_757_696, 14),
    (96, 288, 96, 1, 30_144, 5_757_696, 14),
    (96, 384, 128, 1, 58_880, 11_289_600, 14),
    (128, 384, 128, 1, 52_480, 10_085_376, 14),
    (128, 384, 128, 1, 52_480, 10_085_376, 14),
    (128, 768, 256, 2, 162_560, 15_523_200, 14),
    (256, 768, 256, 1, 203_264, 9_859_584, 7),
]


def meta(*args, **kwargs):
    with torch.device("meta"):
        return hwnet(*args, **kwargs).eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("variant", "width"), GOLDEN)
def test_golden_counts(variant, width, fused):
    net = meta(width, variant, fused=fused)
    counts = (net.parameter_count(), net.mac_count())
    assert counts == GOLDEN[variant, width]
    for count, printed, tolerance in zip(counts, TABLE_2[width], TOLERANCE[variant], strict=True):
        assert round(100 * abs(count / printed - 1), 1) <= tolerance


def test_counts_for_small_images():
    net = meta(num_classes=10, in_size=32)
    assert (net.parameter_count(), net.mac_count()) == (1_408_170, 14_378_240)
    assert net.stem[0].stride == (1, 1)
    assert meta(num_classes=10, in_size=65).mac_count(32, 32) == 4_095_680


@pytest.mark.parametrize(("variant", "width"), GOLDEN)
def test_channels(variant, width):
    net = meta(width, variant)
    widths = [net.stem[0].out_channels, *(spindle.fif2.out_channels for spindle in net.spindles)]
    assert sorted(set(widths)) == list(CHANNELS[width][:6])
    assert (net.augment.out_channels, net.classifier.in_features) == CHANNELS[width][6:]


def test_spindles_of_the_patent_one_by_one():
    for cin, hidden, cout, stride, params, macs, size in SPINDLES:
        with torch.device("meta"):
            spindle = Spindle(cin, hidden, cout, stride)
        assert parameter_count(spindle) == params
        assert mac_count(spindle, size, size, cin) == macs
    built = [(s.fif1.in_channels, s.fif1.out_channels, s.fif2.out_channels) for s in meta().spindles]
    assert built == [row[:3] for row in SPINDLES]


@pytest.mark.parametrize("variant", ["patent", "table2"])
@pytest.mark.parametrize(("in_size", "sizes"), [(224, [112, 56, 28, 14, 7]), (32, [32, 16, 8, 4, 2])])
def test_units_and_map_sizes(variant, in_size, sizes):
    net = meta(variant=variant, num_classes=10, in_size=in_size)
    assert len(net.spindles) == sum(isinstance(m, Spindle) for m in net.modules()) == 14
    units = [m for m in net.modules() if isinstance(m, FeatureAugment)]
    assert len(units) == 29
    strides = [unit.stride for unit in units]
    assert strides.count(2) == (4 if variant == "table2" else 0)
    seen = []
    for module in (net.stem, *net.spindles, net.augment):
        module.register_forward_hook(lambda _m, _i, out: seen.append(out.shape[2]))
    assert net(torch.empty(2, 3, in_size, in_size, device="meta")).shape == (2, 10)
    assert list(dict.fromkeys(seen)) == sizes
    assert seen[-1] == sizes[-1]


def test_shortcuts_and_strided_convolutions():
    """The patent: residual exactly at stride 1, depthwise exactly at stride 2. Table 2: shortcuts everywhere."""
    same, wider, strided = (16, 48, 16, 1), (16, 48, 24, 1), (16, 48, 24, 2)
    for variant, sizes, depthwise, shortcut in (
        ("patent", same, False, nn.Identity),
        ("patent", wider, False, ConvNorm),
        ("patent", strided, True, type(None)),
        ("table2", same, False, nn.Identity),
        ("table2", wider, False, ConvNorm),
        ("table2", strided, False, ConvNorm),
        ("table2", (16, 48, 16, 2), False, ConvNorm),
    ):
        spindle = Spindle(*sizes, variant=variant)
        assert (spindle.depthwise is not None) == depthwise
        assert type(spindle.shortcut) is shortcut
        assert spindle.fif2.activation is None
        assert spindle.fif1.activation == "relu"
        size = 5 if sizes[3] == 1 else 3
        assert spindle(torch.randn(2, 16, 5, 5)).shape == (2, sizes[2], size, size)


def test_spindle_adds_its_input():
    spindle = Spindle(8, 24, 8).eval()
    x = torch.randn(2, 8, 6, 6)
    for unit_part in (spindle.fif2.primary_conv, spindle.fif2.cheap_operation):
        nn.init.zeros_(unit_part[0].weight)
    torch.testing.assert_close(spindle(x), x)


@pytest.mark.parametrize("variant", ["patent", "table2"])
def test_fused_and_reference_are_one_network(variant):
    nets = []
    for fused in (True, False):
        torch.manual_seed(3)
        nets.append(hwnet(0.5, variant, num_classes=10, in_size=32, fused=fused))
    fused, plain = nets
    kinds = [{type(m) for m in net.modules() if isinstance(m, FeatureAugment)} for net in nets]
    assert kinds == [{FusedFiF}, {FeatureAugment}]
    assert list(fused.state_dict()) == list(plain.state_dict())
    for one, other in zip(fused.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_network_learns(fused):
    net = hwnet(0.5, num_classes=2, in_size=32, fused=fused)
    labels = torch.arange(16) % 2
    x = 0.3 * torch.randn(16, 3, 16, 16) + labels[:, None, None, None]
    optimiser = torch.optim.Adam(net.parameters(), lr=2e-3)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(net(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_counting_leaves_the_model_alone():
    net = hwnet(0.5, num_classes=10, in_size=32, fused=False)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    net.mac_count()
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(("arguments", "words"), [
    ({"in_size": 8}, "in_size=8: .* needs 16 or more; enlarge the images"),
    ({"width": 0}, "width=0: must be a positive factor"),
    ({"width": float("nan")}, "width=nan: must be a positive factor"),
    ({"variant": "b"}, "variant='b': must be one of 'patent', 'table2'"),
    ({"num_classes": 0}, "num_classes=0: must be 1 or more"),
])  # fmt: skip
def test_refused_networks(arguments, words):
    with pytest.raises(ValueError, match=words):
        hwnet(**arguments)


def test_refused_spindles():
    with pytest.raises(ValueError, match="stride=0: must be 1 or more"):
        Spindle(8, 16, 8, 0)
    with pytest.raises(TypeError, match=r"stride=1\.5: must be one integer"):
        Spindle(8, 16, 8, 1.5)
    with pytest.raises(ValueError, match="variant='literal': must be one of"):
        Spindle(8, 16, 8, variant="literal")
    with pytest.raises(ValueError, match="in_channels=0"):
        Spindle(0, 16, 8)


def test_smallest_network():
    net = hwnet(0.01, num_classes=3, in_size=16).eval()
    assert isinstance(net, HWNet)
    assert net(torch.randn(1, 3, 16, 16)).shape == (1, 3)


def _set_bias(conv):
    conv.bias = nn.Parameter(torch.linspace(-1, 1, conv.out_channels))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "args", [(6, 10, 1), (6, 10, 1, 2), (6, 6, 3, 2, 6), (3, 8, 3, 2, 1, True), (5, 7, 1, 1, 1, True)], ids=str
)
def test_a_convolution_joins_its_normalisation_in_evaluation(args, layout):
    torch.manual_seed(0)
    joined = ConvNorm(*args)
    plain = conv_norm(*args)
    x = torch.randn(2, args[0], 9, 7).contiguous(memory_format=layout)
    for _ in range(2):
        joined(torch.randn(8, args[0], 9, 7))  # so that statistics are no zeros and ones
    plain.load_state_dict(joined.state_dict())
    changes = [
        lambda unit: None,
        lambda unit: unit[0].weight.data.mul_(-1.5),
        lambda unit: unit[1].running_mean.add_(0.5),
        lambda unit: setattr(unit[1], "eps", 0.3),
        lambda unit: unit[0].register_forward_hook(lambda module, inputs, out: out + 1),
        lambda unit: unit[1].train(),
        lambda unit: (unit[0]._forward_hooks.clear(), unit[1].eval(), _set_bias(unit[0])),
        lambda unit: (setattr(unit[0], "bias", None), setattr(unit[0], "padding_mode", "circular")),
        lambda unit: (setattr(unit[0], "padding_mode", "zeros"), setattr(unit[0], "dilation", (2, 2))),
    ]
    for unit in (joined, plain):
        unit.eval()
    for change in changes:
        for unit in (joined, plain):
            change(unit)
        with torch.no_grad():
            out = joined(x)
            torch.testing.assert_close(out, plain(x), rtol=1e-4, atol=1e-5)
            # Torch's own padding of other modes leaves channels_last.
            assert out.is_contiguous(memory_format=layout) or joined[0].padding_mode != "zeros"
    assert joined(x).requires_grad

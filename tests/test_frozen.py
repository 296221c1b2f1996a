"""Frozen modules against the modules themselves in float64, and what freezing promises beside results."""

import copy
import hashlib
import io
import pickle
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, PLACEMENTS, in_child, name_of, place, randomise, threads
from test_isa import ISAS, SANITIZED_ISAS, python, report, run_tests, sanitizers  # noqa: F401
from torch import nn

from fif_ops import FeatureAugment, Frozen, FusedFiF, backends, freeze, ops
from fif_ops.models import HWNet, Spindle, hwnet
from fif_ops.models.conv_norm import ConvNorm, conv_norm
from fif_ops.reference import memory_format_of

pytestmark = [
    pytest.mark.skipif(not ops.LOADED, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("one_thread", "no_gradients"),
]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
both_variants = pytest.mark.parametrize("variant", ["patent", "table2"])
KERNELS, STRIDES = (1, 3, 5, 7), (1, 2, 3)
ACTIVATIONS = tuple(ops.ACTIVATION_CODES)
TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-10, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# What runs with every instruction set, and what under sanitizers.
EVERY_ISA = "one_pixel or every_window or tiles or ((random or test_network) and float32)"
SANITIZED = "one_pixel or tiles or corrupted or misaligned or (every_window and 3) or with_another_end"
# Instrumented, the baseline's short vectors take eight times as long; its windows are those of the others.
SANITIZED_BASELINE = "one_pixel or corrupted or misaligned or with_another_end"


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


def made(*modules, dtype=torch.float32):
    """In evaluation, with random numbers for all parameters and statistics; several make a Sequential."""
    return randomise(modules[0] if len(modules) == 1 else nn.Sequential(*modules)).eval().to(dtype)


def depthwise(channels, kernel=3, stride=1):
    return conv_norm(channels, channels, kernel, stride, groups=channels)


def frozen_parts(module):
    return sum(isinstance(part, Frozen) for part in module.modules())


def check(module, x, parts=1):
    """The frozen module, which has so many frozen parts (None: any) and does what the module does in float64.

    It may be off by the dtype's tolerance, or by twice what the module itself is off by on the reference path.
    """
    with backends.use("reference"):
        wanted = copy.deepcopy(module).double()(x.double())
        plain = (module(x).double() - wanted).norm().item()
    frozen = freeze(module)
    assert parts is None or frozen_parts(frozen) == parts
    found = frozen(x)
    assert found.dtype == x.dtype
    assert found.shape == wanted.shape
    if found.dim() == 4:
        assert found.is_contiguous(memory_format=memory_format_of(x))
    size = wanted.norm().item() or 1.0
    error = (found.double() - wanted).norm().item()
    allowed = max(TOLERANCES[x.dtype] * size, 2 * plain)
    assert error <= allowed, f"off by {error / size}, and may be by {allowed / size}"
    return frozen


def images(*size, dtype=torch.float32, placement="contiguous"):
    return place(torch.randn(size).to(dtype), placement)


# ---- units


@every_dtype
@both_layouts
def test_one_pixel(layout, dtype):
    """In a child, since a pixel written in the wrong format lands outside the result."""

    def run():
        for channels, out in ((3, 8), (1, 40), (5, 130)):
            for batch in (1, 3):
                check(
                    made(FusedFiF(channels, out), dtype=dtype),
                    images(batch, channels, 1, 1, dtype=dtype, placement=layout),
                )
        check(made(FusedFiF(3, 40, stride=2), dtype=dtype), images(2, 3, 2, 2, dtype=dtype, placement=layout))
        return True

    assert in_child(run)


MAPS = ((1, 9), (9, 1), (2, 2), (7, 7), (5, 17), (13, 33))


@both_layouts
@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_every_window(dtype, kernel, stride, layout):
    for cheap, (height, width) in zip(KERNELS * 2, MAPS, strict=False):
        unit = FusedFiF(5, 21, kernel, cheap_kernel_size=cheap, stride=stride, activation="silu")
        check(made(unit, dtype=dtype), images(2, 5, height, width, dtype=dtype, placement=layout))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_every_placement(dtype, placement):
    x = images(3, 6, 9, 18, dtype=dtype, placement=placement)
    for kernel, stride in ((1, 1), (3, 1), (3, 2), (1, 3)):
        unit = FusedFiF(6, 20, kernel, stride=stride)
        check(made(unit, dtype=dtype), x)
        check(made(copy.deepcopy(unit), depthwise(20, 3, 2), dtype=dtype), x)
        check(made(Spindle(6, 12, 6), dtype=dtype), x)


@st.composite
def chains(draw):
    """Modules and an input: a unit, perhaps a depthwise convolution behind it, perhaps another unit behind that."""
    channels = st.one_of(st.integers(1, 12), st.integers(1, 70))
    sizes = st.one_of(st.integers(1, 9), st.integers(1, 34))
    batch, height, width, given_channels = draw(st.sampled_from([0, 1, 3])), draw(sizes), draw(sizes), draw(channels)

    def unit(inputs):
        splice = draw(st.booleans())
        options = {
            "kernel_size": st.sampled_from(KERNELS), "ratio": st.integers(2 if splice else 1, 5), "bias": st.booleans(),
            "cheap_kernel_size": st.sampled_from(KERNELS), "stride": st.sampled_from(STRIDES),
            "activation": st.sampled_from(ACTIVATIONS), "norm": st.sampled_from(["batch", None]), "shared": st.booleans(),
        }  # fmt: skip
        kind = draw(st.sampled_from([FusedFiF, FeatureAugment]))
        return kind(inputs, draw(channels), splice=splice, **draw(st.fixed_dictionaries(options)))

    parts = [unit(given_channels)]
    if parts[0].out_channels > 1 and draw(st.booleans()):
        parts.append(
            depthwise(parts[0].out_channels, draw(st.sampled_from(KERNELS[1:])), draw(st.sampled_from(STRIDES)))
        )
    if draw(st.booleans()):
        parts.append(unit(parts[0].out_channels))
    torch.manual_seed(draw(st.integers(0, 1000)))
    return made(*parts), images(batch, given_channels, height, width), draw(st.sampled_from(PLACEMENTS))


@every_dtype
def test_random(dtype):
    @settings(max_examples=40)
    @given(chains())
    def run(chain):
        module, x, placement = chain
        check(module.to(dtype), place(x.to(dtype), placement))

    run()


@both_layouts
@pytest.mark.parametrize("kernel", KERNELS)
def test_tiles_of_rows(kernel, layout):
    """Maps that take several tiles, each of which needs rows of the one before; with two threads also cut by rows."""
    for (after, stride), count in zip(((0, 1), (3, 1), (3, 2), (5, 3), (7, 2)), (1, 2, 2, 1, 2), strict=True):
        unit = FusedFiF(4, 96, 3, cheap_kernel_size=kernel, ratio=3 if after == 5 else 2, splice=after != 3)
        x = images(1, 4, 61, 40, placement=layout)
        with threads(count):
            check(made(unit, depthwise(96, after, stride)) if after else made(unit), x)


# ---- spindles and networks


@both_variants
@pytest.mark.parametrize("stride", STRIDES)
@every_dtype
def test_spindle(dtype, stride, variant):
    for channels in (8, 21):  # without and with a convolution in the shortcut
        for fused, layout in ((True, "contiguous"), (False, "channels_last")):
            spindle = Spindle(8, 42, channels, stride, variant=variant, fused=fused)
            check(made(spindle, dtype=dtype), images(2, 8, 7, 10, dtype=dtype, placement=layout))


ENDS = {
    "ratio 3": lambda: FusedFiF(24, 8, ratio=3, activation=None),
    "gelu": lambda: FusedFiF(24, 8, activation="gelu"),
    "not spliced": lambda: FusedFiF(24, 8, splice=False),
    "3x3": lambda: FusedFiF(24, 8, 3),
    "convolution": lambda: conv_norm(24, 8, 3, relu=True),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_spindle_with_another_end(dtype, end):
    spindle = Spindle(8, 24, 8)
    spindle.fif2 = ENDS[end]()
    check(made(spindle, dtype=dtype), images(2, 8, 7, 10, dtype=dtype))


@both_variants
@every_dtype
def test_network(dtype, variant):
    net = made(hwnet(0.25, variant, num_classes=5, in_size=32), dtype=dtype)
    check(net, images(2, 3, 16, 16, dtype=dtype))
    check(net, images(1, 3, 33, 20, dtype=dtype, placement="channels_last"))


def test_network_of_large_images():
    check(made(hwnet(0.25, num_classes=5, in_size=224, fused=False)), images(1, 3, 96, 65))


def replaced(path, part):
    """The change of a network that puts another part there."""

    def change(net):
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, part)
        return net

    return change


class Doubled(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * 2


class Softmax(HWNet):
    def forward(self, x):
        return super().forward(x).softmax(1)


def hooked(path):
    def change(net):
        net.get_submodule(path).register_forward_hook(lambda module, args, out: out * 2)
        return net

    return change


NETWORKS = {
    "other activation": replaced("head.3", nn.Tanh()),
    "no normalisation": replaced("head.2", nn.Identity()),
    "head of other parts": replaced(
        "head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(128, 320, 1), nn.Flatten())
    ),
    "no head": lambda net: replaced("head", nn.Identity())(replaced("classifier", nn.Identity())(net)),
    "no classifier": replaced("classifier", nn.Identity()),
    "other classifier": replaced("classifier", nn.Sequential(nn.Dropout(), nn.Linear(320, 7, bias=False))),
    "longer head": lambda net: replaced("head", nn.Sequential(*net.head, nn.ReLU()))(net),
    "own head": lambda net: replaced("head", Doubled(*net.head))(net),
    "hook on pooling": hooked("head.0"),
    "hook on flattening": hooked("head.4"),
    "hook on a spindle": hooked("spindles.2"),
    "hook on the classifier": hooked("classifier"),
    "other pooling": replaced("head.0", nn.AdaptiveMaxPool2d(1)),
    "other stem": replaced("stem", nn.Conv2d(3, 4, 4, 4)),
    "statistics alone": replaced("head.2", nn.BatchNorm2d(320, affine=False)),
}


@pytest.mark.parametrize("change", NETWORKS)
def test_changed_network(change):
    def run():
        net = made(NETWORKS[change](hwnet(0.25, num_classes=5, in_size=32)))
        check(net, images(2, 3, 20, 16), parts=None)
        return True

    assert in_child(run)


def test_subclass_of_a_network():
    check(made(Softmax(0.25, num_classes=5, in_size=32)), images(2, 3, 16, 16), parts=None)


class Negated(nn.Identity):
    def forward(self, x):
        return -x


def spindle_with(**parts):
    spindle = Spindle(8, 24, 8)
    for name, part in parts.items():
        setattr(spindle, name, part)
    return spindle


# The first unit's result is seen twice, or a part is not what stages can do.
SPINDLES = {
    "depthwise first": lambda: spindle_with(fif1=depthwise(8), fif2=FusedFiF(8, 8)),
    "depthwise shortcut": lambda: spindle_with(shortcut=depthwise(8)),
    "depthwise last": lambda: spindle_with(fif2=nn.Sequential(FusedFiF(24, 8), depthwise(8))),
    "nothing but a shortcut": lambda: spindle_with(fif1=nn.Identity(), fif2=nn.Identity()),
    "spindle last": lambda: spindle_with(fif2=Spindle(24, 30, 8, variant="table2")),
    "other shortcut": lambda: spindle_with(shortcut=Negated()),
    "hook on the shortcut": lambda: hooked("shortcut")(spindle_with()),
    "no shortcut": lambda: spindle_with(shortcut=None),
    "unit for a shortcut": lambda: spindle_with(shortcut=FusedFiF(8, 8)),
}


@pytest.mark.parametrize("spindle", SPINDLES)
def test_changed_spindle(spindle):
    check(made(FusedFiF(8, 8), SPINDLES[spindle]()), images(2, 8, 9, 9), parts=None)
    check(made(SPINDLES[spindle]()), images(2, 8, 9, 9), parts=None)


def test_two_depthwise_convolutions():
    check(made(FusedFiF(8, 8), depthwise(8), depthwise(8)), images(2, 8, 9, 9))
    check(made(FusedFiF(8, 8), depthwise(8), nn.ReLU()), images(2, 8, 9, 9))
    check(made(depthwise(8), FusedFiF(8, 8)), images(2, 8, 9, 9))


# ---- modules of other people


class Stranger(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([FusedFiF(8, 8), Spindle(8, 24, 8), nn.Dropout(), conv_norm(8, 8, 3)])
        self.named = nn.ModuleDict({"one": FeatureAugment(8, 8), "two": nn.Sequential(FusedFiF(8, 8), nn.Tanh())})
        self.again = self.blocks[0]
        self.norm = nn.BatchNorm2d(8)
        self.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()).eval())
        self.register_buffer("offset", torch.zeros(1))

    def forward(self, x):
        x = self.norm(self.stem(x)) + self.offset
        for block in self.blocks:
            x = x + block(x)
        return self.scripted(self.again(self.named["two"](self.named["one"](x)) - x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_only_units_of_other_modules_are_frozen():
    stranger = made(Stranger())
    frozen = check(stranger, images(2, 3, 9, 9), parts=None)
    assert type(frozen) is Stranger
    assert frozen_parts(frozen) >= 4
    for name, part in frozen.named_modules():
        if not isinstance(part, Frozen):
            assert type(part) is type(stranger.get_submodule(name))
    kept = frozen.state_dict()
    rest = ("stem", "norm", "scripted", "offset", "blocks.3")
    assert {name for name in stranger.state_dict() if name.startswith(rest)} <= set(kept)
    assert all(torch.equal(value, stranger.state_dict()[name]) for name, value in kept.items())


def test_nothing_to_freeze():
    for module in (nn.Conv2d(3, 4, 3), nn.Identity(), nn.Sequential(), ConvNorm(3, 4, 1), conv_norm(4, 4, 3, groups=4)):
        x = images(1, 4 if "groups=4" in repr(module) else 3, 5, 5)
        frozen = check(made(module), x, parts=0)
        assert type(frozen) is type(module)


def test_frozen_again():
    frozen = freeze(made(FusedFiF(3, 8), nn.Tanh()))
    x = images(1, 3, 5, 5)
    assert torch.equal(freeze(frozen)(x), frozen(x))


class Own(FusedFiF):
    def forward(self, x):
        return super().forward(x) + 1


def own_forward(unit):
    unit.forward = lambda x: x * 2
    return unit


def statistics_of_the_batch(unit):
    unit.primary_conv[1] = nn.BatchNorm2d(4, track_running_stats=False)
    return unit


def parametrised(unit):
    nn.utils.parametrizations.weight_norm(unit.primary_conv[0])
    return unit


def inner_hook(unit):
    unit.cheap_operation[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return unit


UNFROZEN = {
    "hook": lambda: hooked("")(FusedFiF(8, 8)),
    "inner hook": lambda: inner_hook(FusedFiF(8, 8)),
    "own forward": lambda: own_forward(FusedFiF(8, 8)),
    "subclass": lambda: Own(8, 8),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm.convert_sync_batchnorm(FusedFiF(8, 8)),
    "statistics of the batch": lambda: statistics_of_the_batch(FusedFiF(8, 8)),
    "groups": lambda: FusedFiF(8, 8, groups=2),
    "padding": lambda: FusedFiF(8, 8, padding=1),
    "no padding": lambda: FusedFiF(8, 8, 3, padding=0),
    "even kernel": lambda: FusedFiF(8, 8, 2),
    "large cheap kernel": lambda: FusedFiF(8, 8, cheap_kernel_size=9),
    "matrix_channels": lambda: FusedFiF(8, 8, matrix_channels=2),
    "parametrised": lambda: parametrised(FusedFiF(8, 8)),
    "other parts": lambda: replaced("primary_conv.2", nn.Tanh())(FusedFiF(8, 8)),
    "tanh for gelu": lambda: replaced("primary_conv.2", nn.GELU("tanh"))(FusedFiF(8, 8, activation="gelu")),
}


@pytest.mark.parametrize("what", UNFROZEN)
def test_what_is_not_frozen_stays(what):
    x = images(2, 8, 7, 7)
    unit = UNFROZEN[what]()
    frozen = check(made(unit), x, parts=0)
    assert type(frozen) is type(unit)
    frozen = check(made(FusedFiF(8, 8), UNFROZEN[what](), FusedFiF(8, 8)), x, parts=2)
    assert type(frozen[1]) is type(unit)


# ---- the copy and the original


def tensors(module):
    return [*module.parameters(), *module.buffers()]


def test_the_original_is_left_alone():
    for module in (made(FusedFiF(3, 8)), made(FusedFiF(3, 8), nn.Tanh(), nn.Conv2d(8, 4, 1)), made(hwnet(0.25))):
        before = copy.deepcopy(module)
        frozen = freeze(module)
        storages = {t.untyped_storage().data_ptr() for t in tensors(module)}
        assert not storages & {t.untyped_storage().data_ptr() for t in tensors(frozen) if t.numel()}
        x = images(1, 3, 32, 32)
        y = frozen(x)
        assert repr(module) == repr(before)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before.state_dict()[name])
        for t in tensors(module):
            t.zero_()  # the copy does not follow
        assert torch.equal(frozen(x), y)


def test_results_are_fresh():
    for module, x in ((made(FusedFiF(3, 9)), images(2, 3, 5, 5)), (made(hwnet(0.25)), images(1, 3, 32, 32))):
        frozen, given_x = freeze(module), x.clone()
        y = frozen(x)
        assert y.untyped_storage().nbytes() == y.numel() * y.element_size()
        kept = y.clone()
        y.zero_()
        assert torch.equal(frozen(x), kept)
        assert torch.equal(x, given_x)


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "save": saved,
    "channels_last": lambda module: module.to(memory_format=torch.channels_last),
    "float": nn.Module.float,
    "double": nn.Module.double,  # constants stay what they were
    "half": nn.Module.half,
    "train": nn.Module.train,
    "load": lambda module: module.load_state_dict(module.state_dict()) and module,
    "inference": torch.inference_mode()(copy.deepcopy),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies(kind):
    frozen = freeze(made(FusedFiF(3, 8), ConvNorm(8, 4, 3)))
    x = images(1, 3, 5, 5)
    twin = COPIES[kind](copy.deepcopy(frozen))
    assert torch.equal(twin(x), frozen(x))
    assert not twin.state_dict()
    assert not list(twin.parameters())
    assert repr(twin).splitlines()[0].startswith("Frozen(Sequential: 2 stages")


def test_frozen_under_other_modes():
    module, x = made(FusedFiF(3, 8)), images(1, 3, 5, 5)
    wanted = freeze(module)(x)
    with torch.inference_mode():
        frozen = freeze(module)
    with torch.enable_grad():
        assert torch.equal(frozen(x), wanted)
        assert not frozen(x).requires_grad
        assert torch.equal(freeze(module)(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(freeze(module)(x), wanted)
    with torch.device("meta"):
        frozen = freeze(module)
    assert torch.equal(frozen(x), wanted)


# ---- refusals


def test_refusals_to_freeze():
    with pytest.raises(TypeError, match=r"module is a int: must be a torch\.nn\.Module"):
        freeze(3)
    with pytest.raises(ValueError, match=r"call module\.eval\(\)"):
        freeze(FusedFiF(3, 8))
    inner = made(FusedFiF(3, 8), nn.Tanh())
    inner[0].cheap_operation[1].train()
    with pytest.raises(ValueError, match=r"call module\.eval\(\)"):
        freeze(inner)
    with pytest.raises(ValueError, match="not on the cpu"):
        freeze(made(FusedFiF(3, 8)).to("meta"))


BAD_INPUTS = {
    "float64": (lambda x: x.double(), r"x is torch\.float64 on cpu, and this Sequential was frozen in torch\.float32"),
    "int64": (lambda x: x.long(), r"x is torch\.int64"),
    "meta": (lambda x: x.to("meta"), "on meta, and this Sequential was frozen .* on the cpu"),
    "channels": (lambda x: x[:, :2], "takes 3 channels and gets 2"),
    "no channels": (lambda x: x[:, :0], "channels"),
    "no pixels": (lambda x: x[:, :, :0], "pixels"),
    "rank": (lambda x: x[0], "4 dimensions"),
    "gradient": (lambda x: x.requires_grad_(), "x requires a gradient, and a frozen Sequential has none"),
}


@pytest.mark.parametrize("what", BAD_INPUTS)
def test_refused_inputs(what):
    change, words = BAD_INPUTS[what]
    frozen = freeze(made(FusedFiF(3, 8), ConvNorm(8, 4, 3)))
    x = images(2, 3, 5, 5)
    with torch.enable_grad(), pytest.raises(RuntimeError, match=words):
        frozen(change(x.clone()))
    assert frozen(x.requires_grad_()).shape == (2, 4, 5, 5)


def test_parts_that_do_not_fit():
    frozen = freeze(made(FusedFiF(3, 8), FusedFiF(9, 8)))
    with pytest.raises(RuntimeError, match="takes 9 channels and gets 8"):
        frozen(images(1, 3, 5, 5))
    for layer in (nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)):
        mixed = made(FusedFiF(8, 8), layer)
        layer.double()
        with pytest.raises(RuntimeError, match="type"):
            freeze(mixed)(images(1, 8, 5, 5))


def test_constants_on_another_device():
    frozen = freeze(made(FusedFiF(3, 8))).to("meta")
    with pytest.raises(RuntimeError, match="meta"):
        frozen(images(1, 3, 5, 5))


@pytest.mark.parametrize("batch", [1, 2**14], ids=["2^53 bytes", "2^67 bytes"])
def test_maps_larger_than_memory(batch):
    """Between stages: x is one number seen many times, and the result is small."""

    def run():
        frozen = freeze(made(FusedFiF(1, 8), nn.Conv2d(8, 1, 1, stride=2**23)))
        with pytest.raises((RuntimeError, MemoryError)):
            frozen(torch.zeros(1).expand(batch, 1, 2**24 - 1, 2**24 - 1))
        return True

    assert in_child(run)


# ---- the same bits every time


def batch_of_results(dtype=torch.float32, layout="contiguous"):
    """Results of some modules on batches of three, and what makes them of other batches."""
    torch.manual_seed(1)
    yield freeze(made(FusedFiF(6, 40), dtype=dtype)), images(3, 6, 11, 35, dtype=dtype, placement=layout)
    yield freeze(made(FusedFiF(6, 40, 3, ratio=3), dtype=dtype)), images(3, 6, 11, 7, dtype=dtype, placement=layout)
    yield (
        freeze(made(FusedFiF(6, 96), depthwise(96, 5, 2), dtype=dtype)),
        images(3, 6, 45, 40, dtype=dtype, placement=layout),
    )
    yield freeze(made(hwnet(0.25), dtype=dtype)), images(3, 3, 40, 33, dtype=dtype, placement=layout)


@both_layouts
@every_dtype
def test_same_bits(dtype, layout):
    """From run to run, with two threads, and alone or in a batch."""
    for frozen, x in batch_of_results(dtype, layout):
        y = frozen(x)
        assert torch.equal(frozen(x), y)
        with threads(2):
            assert torch.equal(frozen(x), y)
        for i in range(3):
            assert torch.equal(frozen(x[i : i + 1]), y[i : i + 1])


def test_images_keep_apart():
    for frozen, x in batch_of_results():
        y = frozen(x)
        x[1] = float("nan")
        assert torch.equal(frozen(x)[::2], y[::2])
        assert frozen(x)[1].isnan().any()


def digest():
    """Of all bits, in a process of its own."""
    found = hashlib.sha256()
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            for layout in ("contiguous", "channels_last"):
                for frozen, x in batch_of_results(dtype, layout):
                    y = frozen(x)
                    assert y.isfinite().all()
                    found.update(y.contiguous().view(torch.uint8).numpy().tobytes())
                    found.update(
                        pickle.dumps([part.packed.numpy() for part in frozen.modules() if isinstance(part, Frozen)])
                    )
    return found.hexdigest()


def test_memory_that_nobody_wrote_does_not_matter():
    code = "import test_frozen; print(test_frozen.digest())"
    done = [python("-c", code, MALLOC_PERTURB_=fill, OMP_NUM_THREADS="1") for fill in ("1", "128")]
    assert done[0].returncode == 0, report(done[0])
    assert done[0].stdout == done[1].stdout


# ---- spindles and networks that are not frozen follow every change


def negate(net):
    net.spindles[2].fif1.primary_conv[0].weight.neg_()


def double(net):
    net.augment.primary_conv[0].weight.mul_(2)


def swap(net):
    flat = net.classifier.weight.flatten()
    flat[0], flat[1] = flat[1].item(), flat[0].item()


def reverse(net):
    net.head[1].weight.copy_(net.head[1].weight.flip(0))


def move_statistics(net):
    net.spindles[1].depthwise[1].running_mean.add_(1)


def point_elsewhere(net):
    net.stem[0].weight.data = torch.randn_like(net.stem[0].weight)


def change_eps(net):
    net.spindles[0].fif2.cheap_operation[1].eps = 0.5


def hook_inside(net):
    hooked("spindles.4.shortcut")(net)


def drop_shortcut(net):
    net.spindles[4].shortcut = None


CHANGES = (
    negate, double, swap, reverse, move_statistics, point_elsewhere, change_eps, hook_inside, drop_shortcut,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_unfrozen_networks_follow(change):
    net, x = made(hwnet(1.0, num_classes=64, in_size=32)), images(1, 3, 16, 16)
    net(x)
    change(net)
    with backends.use("reference"):
        wanted = copy.deepcopy(net).double()(x.double())
    assert (net(x).double() - wanted).norm() <= 1e-4 * wanted.norm()


def test_dropout_that_is_switched_on():
    net, x = hwnet(0.25, num_classes=8, in_size=32), images(1, 3, 16, 16)
    net.classifier = nn.Sequential(nn.Dropout(), net.classifier)
    made(net)
    wanted = net(x)
    net.classifier[0].train()
    assert not torch.equal(net(x), wanted)
    assert not torch.equal(net(x), net(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*performance drop")
def test_unfrozen_spindles_under_transformations():
    spindles, x = [made(Spindle(8, 24, 8)) for _ in range(2)], images(1, 8, 7, 7)
    wanted = [spindle(x) for spindle in spindles]
    torch.testing.assert_close(torch.jit.trace(spindles[0], x)(x), wanted[0])
    state = torch.func.stack_module_state(spindles)
    empty = copy.deepcopy(spindles[0]).to("meta")
    found = torch.vmap(lambda state, x: torch.func.functional_call(empty, state, x), (0, None))(state, x)
    torch.testing.assert_close(found, torch.stack(wanted))


@both_layouts
def test_units_follow_changes_of_sign(layout):
    """Sums of words alone do not show such a change."""
    unit, x = made(FusedFiF(8, 16)), images(1, 8, 7, 7, placement=layout)
    before = unit(x)
    for weight in (unit.primary_conv[0].weight, unit.cheap_operation[1].weight):
        weight.neg_()
        with backends.use("reference"):
            wanted = unit(x)
        assert not torch.equal(unit(x), before)
        torch.testing.assert_close(unit(x), wanted)


# ---- compiled, exported, checked by torch


@both_layouts
def test_compiled_and_exported(layout):
    for module in (
        made(FusedFiF(3, 8)),
        made(FusedFiF(3, 8), nn.Tanh(), FusedFiF(8, 6)),
        made(hwnet(0.25, num_classes=5)),
    ):
        frozen, x = freeze(module), images(2, 3, 20, 17, placement=layout)
        wanted = frozen(x)
        for found in (
            torch.compile(frozen, fullgraph=True, backend="aot_eager")(x),
            torch.export.export(frozen, (x,)).module()(x),
        ):
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()
        torch.compiler.reset()


def test_exported_with_any_batch_and_size():
    frozen, dim = freeze(made(FusedFiF(3, 8, stride=2), Spindle(8, 24, 8))), torch.export.Dim.DYNAMIC
    exported = torch.export.export(frozen, (images(2, 3, 20, 17),), dynamic_shapes=({0: dim, 2: dim, 3: dim},)).module()
    for size in ((2, 3, 20, 17), (5, 3, 9, 30)):
        x = images(*size)
        assert torch.equal(exported(x), frozen(x))


def arguments(frozen, x):
    return x, frozen.program, frozen.packed, frozen.out_channels, frozen.stride


OPCHECKED = {
    "contiguous": (2, 3, 6, 5),
    "channels_last": (1, 3, 1, 1),
    "every other channel": (2, 3, 1, 4),
    "last: inner columns": (1, 3, 5, 5),
    "one image": (0, 3, 5, 5),
}


@pytest.mark.parametrize("placement", OPCHECKED)
def test_opcheck(placement):
    x = images(*OPCHECKED[placement], placement=placement)
    modules = made(FusedFiF(3, 8)), made(FusedFiF(3, 8), ConvNorm(8, 1, 3, 2)), made(hwnet(0.25, num_classes=5))
    with torch.enable_grad():
        for module in modules:
            x, program, packed, *sizes = arguments(freeze(module), x)
            torch.library.opcheck(torch.ops.fif_ops.run.default, (x, program, packed, *sizes))
            numbers = [program.double(), packed]
            content = torch.ops.fif_ops.fingerprint(numbers)
            torch.library.opcheck(torch.ops.fif_ops.follow.default, (x, program, packed, numbers, content, *sizes))
            with pytest.raises(RuntimeError, match="packed from other numbers"):
                torch.ops.fif_ops.follow(x, program, packed, numbers, content + 1, *sizes)


def test_opcheck_of_pack():
    """How much there will be depends on the numbers in `program`, which a fake kernel does not know."""
    line = freeze(made(FusedFiF(3, 8))).program
    inputs = (line, torch.randn(4, 3, 1, 1), torch.randn(4, 1, 3, 3), None, *torch.randn(4, 4), None, None)
    torch.library.opcheck(
        torch.ops.fif_ops.pack.default, inputs, test_utils=["test_schema", "test_autograd_registration"]
    )


# ---- programs and constants that nobody made


def corrupted(frozen, x, chance):
    """The operator's arguments with a few of them changed; some of these are no less valid than before."""
    x, program, packed, out_channels, stride = arguments(frozen, x)
    program, packed = program.clone(), packed.clone()
    for _ in range(chance.randint(1, 3)):
        near, far = chance.randint(-3, 9), chance.choice((-1, 1)) * (2 ** chance.randint(3, 63) - chance.randint(0, 1))
        number = max(-(2**63), min(2**63 - 1, chance.choice((near, near, far))))
        what = chance.random()
        if what < 0.6:
            program[chance.randrange(len(program)), chance.randrange(program.shape[1])] = number
        elif what < 0.7:
            i = chance.randrange(len(program))
            program = torch.cat([program[:i], program[i + chance.randint(-1, 1) :]])
            program = program if len(program) else frozen.program.clone()
        elif what < 0.8:
            start = chance.choice(frozen.program[:, -1].tolist())
            if start + 64 <= len(packed):
                packed[start + chance.randrange(64)] = chance.randrange(256)
        elif what < 0.9:
            packed = packed[: chance.choice((0, 1, 63, 64, len(packed) // 2, len(packed) - 1))]
        else:
            out_channels, stride = chance.choice(((number, stride), (out_channels, number)))
    if chance.random() < 0.5:
        out_channels = int(program[-1, 7])
    return x, program.contiguous(), packed, out_channels, stride


def test_corrupted_constants_and_programs():
    """Refused, or a result of the size that was asked for; never memory of others."""

    def run():
        torch.set_num_threads(1)
        chance, accepted = random.Random(0), 0
        made_of = [
            (FusedFiF(3, 8),), (FusedFiF(3, 9, 3, ratio=3), depthwise(9, 3, 2), FusedFiF(9, 5)),
            (Spindle(3, 12, 5), Spindle(5, 12, 5)), (hwnet(0.25, num_classes=5),),
        ]  # fmt: skip
        networks = [freeze(made(*parts)) for parts in made_of]
        for _ in range(1000):
            x = images(
                chance.choice((1, 2)),
                3,
                chance.choice((1, 6)),
                7,
                placement=chance.choice(("contiguous", "channels_last")),
            )
            changed = corrupted(chance.choice(networks), x, chance)
            try:
                y = torch.ops.fif_ops.run(*changed)
            except RuntimeError:
                continue
            assert y.shape[:2] == (len(x), changed[3])
            accepted += 1
        return accepted

    assert in_child(run, 300) > 20


def test_misaligned_constants():
    """As a slice of a larger file may be."""
    for frozen, x in batch_of_results():
        moved = copy.deepcopy(frozen)
        moved.packed = torch.cat([torch.zeros(1, dtype=torch.uint8), frozen.packed])[1:]
        assert torch.equal(moved(x), frozen(x))


# ---- other instruction sets, and sanitizers


OTHER_ISA = """
import sys, torch
frozen = torch.load(sys.argv[1], weights_only=False)
try:
    frozen(torch.zeros(1, 3, 5, 5))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(len(ISAS) < 2, reason="this processor has one instruction set")
def test_frozen_for_another_instruction_set(tmp_path):
    torch.save(freeze(made(FusedFiF(3, 8))), tmp_path / "frozen.pt")
    other = next(isa for isa in ISAS if isa != ops.CPU_ISA)
    done = python("-c", OTHER_ISA, str(tmp_path / "frozen.pt"), FIF_OPS_CPU_ISA=other)
    assert f"was frozen for {ops.CPU_ISA} and this process uses {other}: freeze it here" in done.stdout, report(done)


def check_tests(isa, selection, **environment):
    done = run_tests(isa, selection, "-s", file="test_frozen.py", **environment)
    assert done.returncode == 0, report(done)
    assert "runtime error:" not in done.stdout + done.stderr, report(done)


@pytest.mark.slow
@pytest.mark.parametrize("isa", [isa for isa in ISAS if isa != ops.CPU_ISA])
def test_every_other_instruction_set(isa):
    check_tests(isa, EVERY_ISA)


@pytest.mark.slow
@pytest.mark.parametrize("isa", SANITIZED_ISAS)
def test_sanitized_kernels(request, isa):
    check_tests(isa, SANITIZED_BASELINE if isa == "baseline" else SANITIZED, **request.getfixturevalue("sanitizers"))

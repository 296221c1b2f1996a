"""Results and gradients of the kernels against the definition in float64, over every kind of problem they take."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from support import (
    DTYPES,
    EXPANSIONS,
    KINKED,
    PLACEMENTS,
    SMOOTH,
    Problem,
    check,
    check_problem,
    composition_errors,
    definition,
    errors,
    fused_results,
    name_of,
    place,
    problems,
    randomise,
    results,
    threads,
)
from torch import nn
from torch.nn import functional as F

from fif_ops import FeatureAugment, FusedFiF, Norm, feature_augment, ops
from fif_ops.reference import compose

pytestmark = pytest.mark.usefixtures("one_thread")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])


def problem(**options):
    fields = {
        "in_channels": 5, "out_channels": 12, "ratio": 2, "cheap_kernel_size": 3, "splice": True, "activation": "silu",
        "norm": "batch", "bias": False, "batch": 2, "height": 6, "width": 7,
    }  # fmt: skip
    return Problem(**{**fields, **options})


def check_both(chosen, dtype=torch.float32):
    check_problem(chosen, dtype, training=False)
    check_problem(chosen, dtype, training=True)


# ---- primary convolutions that torch does, before the kernels


@every_dtype
@both_layouts
@both_modes
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"stride": 2},
        {"kernel_size": 5, "stride": 2, "ratio": 3},
        {"groups": 2, "splice": False, "ratio": 1},
        {"kernel_size": 3, "groups": 6, "bias": True, "norm": None},
        {"kernel_size": 3, "out_channels": 71, "cheap_kernel_size": 5, "bias": True},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_other_primary_convolutions(options, training, layout, dtype):
    torch.manual_seed(3)
    for height, width in ((9, 7), (5, 33)):
        unit = FeatureAugment(6, **{"out_channels": 24, "activation": "silu", **options})
        unit = randomise(unit).to(dtype).train(training)
        x = place(torch.randn(4, 6, height, width).to(dtype), layout)
        grad = torch.randn(unit(x).shape).to(dtype) if training else None
        check(unit, x, grad)


# ---- random problems


@every_dtype
def test_random_inference(dtype):
    @settings(max_examples=120 if dtype == torch.float32 else 50)
    @given(problems(training=False))
    def run(chosen):
        check_problem(chosen, dtype, training=False)

    run()


@every_dtype
def test_random_training(dtype):
    wide = dtype in (torch.float32, torch.float64)

    @settings(max_examples=120 if dtype == torch.float32 else 50)
    # In 16 bits the rounding of a gradient that is one number is chance, for the composition too.
    @given(problems(training=True, activations=SMOOTH + KINKED if wide else SMOOTH, fewest=1 if wide else 16))
    def run(chosen):
        check_problem(chosen, dtype, training=True)

    run()


@pytest.mark.parametrize("placement", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_large_training(dtype, placement):
    """Of the size where torch may do the products of bfloat16."""
    chosen = problem(
        in_channels=160, out_channels=256, batch=4, height=14, width=14, activation="silu", placement=placement,
        grad_placement=placement,
    )  # fmt: skip
    check_problem(chosen, dtype, training=True)


@pytest.mark.parametrize("norm", ["batch", None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_kinked_activations_in_16_bit(dtype, norm):
    """Rounding decides on which side of a kink a value lies, and single gradients jump: compared over many problems."""
    ours, plain = [], []
    for seed in range(40):
        chosen = problem(
            activation=KINKED[seed % 3], norm=norm, bias=bool(seed & 1), splice=bool(seed & 2), batch=3, seed=seed,
            in_channels=3 + seed % 9, out_channels=10 + seed % 13, cheap_kernel_size=(3, 5, 7)[seed // 3 % 3],
            frozen=(bool(seed & 4), bool(seed & 8)), placement=("contiguous", "channels_last")[seed // 16 % 2],
        )  # fmt: skip
        unit, x, grad = chosen.training_unit().to(dtype), chosen.input(dtype), chosen.gradient(dtype)
        wanted = definition(unit, x, grad)
        for errors_of, found in ((ours, fused_results(unit, x, grad)), (plain, results(unit, x, grad))):
            errors_of += [error for name, error in errors(found, wanted).items() if wanted[name].any()]
    assert math.hypot(*ours) <= 2 * math.hypot(*plain)


# ---- every combination of small things


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@both_layouts
def test_every_width(layout, kernel):
    """Vectors that hold several rows, one row in part, and many vectors a row."""
    for width, height in itertools.product([*range(1, 19), 23, 31, 32, 33, 47, 65], (1, 2, 4, 9)):
        chosen = problem(
            width=width, height=height, cheap_kernel_size=kernel, placement=layout, in_channels=3, out_channels=5,
            ratio=2 + width % 2, batch=2 if height * width > 1 else 9,
        )  # fmt: skip
        check_both(chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=name_of)
@both_layouts
def test_every_width_in_other_formats(layout, dtype):
    for width, kernel in itertools.product(range(1, 19), (3, 7)):
        chosen = problem(
            width=width, height=5, cheap_kernel_size=kernel, placement=layout, in_channels=3, out_channels=5, seed=width
        )
        check_both(chosen, dtype)


@every_dtype
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@both_layouts
def test_every_format_and_layout(layout, kernel, dtype):
    """Small enough for the sanitizers' runs (test_isa.py): vectors in part on all sides, with and without a splice."""
    sizes = ((1, 1), (1, 4), (3, 2), (8, 5), (17, 3), (34, 1))
    for (width, height), (out_channels, ratio, splice) in zip(
        sizes * 2,
        itertools.cycle([(9, 2, True), (34, 3, False), (71, 4, True), (16, 1, False), (101, 2, True)]),
        strict=False,
    ):
        chosen = problem(
            width=width, height=height, cheap_kernel_size=kernel, placement=layout, in_channels=1 + out_channels % 19,
            out_channels=out_channels, ratio=ratio, splice=splice, batch=9 if width == height else 2,
        )  # fmt: skip
        check_both(chosen, dtype)
    for placement in ("inner columns", "last: inner channels", "one image", "batch innermost"):
        check_both(problem(cheap_kernel_size=kernel, placement=placement, batch=9, grad_placement="one row"), dtype)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3, 15, 16, 17, 30, 31, 32, 33, 64, 65, 72, 80, 184])
def test_every_depth_of_products_in_16_bits(depth, stride):
    """Chunks of the depth, whole and padded, and rows of pixels, fewer than a tile has and some more."""
    torch.manual_seed(depth)
    for maps, size in ((4, 1), (8, 3), (17, 4), (20, 7), (36, 5), (65, 9)):
        unit = FeatureAugment(depth, 2 * maps, 3 if depth < 20 else 1, stride=stride, activation="relu").eval()
        batch = 2 if size < 9 else 1
        x = place(torch.randn(batch, depth, size, size).to(torch.bfloat16), "channels_last")
        check(unit.to(torch.bfloat16), x)
        # Beside x lie numbers that must not get into it.
        wide = torch.full((batch, depth + 3, size, size), math.nan, dtype=torch.bfloat16)
        inner = wide.contiguous(memory_format=torch.channels_last)[:, 1 : 1 + depth]
        inner.copy_(x)
        with torch.no_grad():
            assert torch.equal(FusedFiF.from_reference(unit)(inner), FusedFiF.from_reference(unit)(x))


# ---- products of float32 numbers in parts, where the processor multiplies bfloat16 by tiles


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"kernel_size": 3}, {"kernel_size": 3, "stride": 2}], ids=str)
@pytest.mark.parametrize("depth", [24, 25, 31, 32, 33, 64, 65, 80, 97])
def test_every_depth_of_products_in_parts(depth, options):
    """Chunks of the depth, tiles of rows and of lanes, whole and in part, and blocks with one of either left over."""
    torch.manual_seed(depth)
    in_channels = depth if "kernel_size" not in options else depth // 5
    for maps, height, width in ((49, 1, 1), (65, 3, 5), (97, 7, 7), (64, 4, 14), (80, 9, 17)):
        unit = FeatureAugment(in_channels, 2 * maps, cheap_kernel_size=1, activation="relu", **options).eval()
        for layout in ("contiguous", "channels_last"):
            x = place(torch.randn(2, in_channels, height, width), layout)
            check(randomise(unit), x)
            # Beside x lie numbers that must not get into it.
            inner = place(torch.full((2, in_channels + 3, height, width), math.nan), layout)[:, 1 : 1 + in_channels]
            inner.copy_(x)
            with torch.no_grad():
                assert torch.equal(FusedFiF.from_reference(unit)(inner), FusedFiF.from_reference(unit)(x))


@pytest.mark.parametrize(("in_channels", "maps", "size"), [(64, 64, 28), (256, 256, 7), (72, 200, 14), (384, 192, 7)])
@both_layouts
def test_large_products_are_as_exact_as_those_of_the_framework(layout, in_channels, maps, size):
    torch.manual_seed(in_channels)
    unit = randomise(FeatureAugment(in_channels, 2 * maps, activation=None)).eval()
    x = place(torch.randn(2, in_channels, size, size).relu(), layout)
    with torch.no_grad():
        wanted = definition(unit, x)["output"]
        ours, theirs = ((run(x) - wanted).square().mean().sqrt() for run in (FusedFiF.from_reference(unit), unit))
    # A chain of multiply-adds over the whole depth loses more than sums in blocks, as the framework's are.
    assert ours <= (1.1 if ops.CPU_ISA == "amx" else 2.0) * theirs


@both_layouts
def test_products_of_numbers_of_any_size(layout):
    """Against the sum of magnitudes, which is what rounding errors are in proportion to."""
    torch.manual_seed(7)
    unit = FeatureAugment(70, 160, activation=None, norm=None, cheap_kernel_size=1).eval()
    x = place(torch.randn(2, 70, 9, 17) * 10.0 ** torch.randint(-12, 13, (2, 70, 9, 17)), layout)
    with torch.no_grad():
        unit.primary_conv[0].weight.mul_(10.0 ** torch.randint(-12, 13, (80, 70, 1, 1)))
        found = FusedFiF.from_reference(unit)(x)[:, :80].double()
        weight = unit.primary_conv[0].weight.double()
        wanted, scale = F.conv2d(x.double(), weight), F.conv2d(x.double().abs(), weight.abs())
    assert ((found - wanted).abs() <= 2.0**-20 * scale).all()


@pytest.mark.parametrize("options", [{}, {"kernel_size": 3}], ids=str)
@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
@both_layouts
def test_infinity_in_products_in_parts(layout, activation, options):
    """Where a sum is not finite it is what multiply-adds make of it, and all others stay as they were."""
    torch.manual_seed(1)
    fields = {"activation": activation, "norm": None, "cheap_kernel_size": 1, **options}
    unit = FeatureAugment(40, 112, **fields).eval()
    x = place(torch.randn(2, 40, 6, 17), layout)
    with torch.no_grad():
        clean = FusedFiF.from_reference(unit)(x)
        for bad in (math.inf, -math.inf, math.nan, 3.4e38):
            with_bad = x.clone()
            with_bad[0, 3, 2, 5] = with_bad[1, 39, 5, 16] = bad
            found = FusedFiF.from_reference(unit)(with_bad)
            wanted = unit(with_bad.contiguous())
            # Pixels that no bad number reaches.
            free = F.max_pool2d((with_bad != x).amax(1, keepdim=True).float(), 3, 1, 1).expand_as(found) == 0
            assert torch.equal(found[free], clean[free])
            for kind in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(kind(found), kind(wanted)), (bad, kind)
        unit.primary_conv[0].weight[5, 7] = math.inf
        found, wanted = FusedFiF.from_reference(unit)(x), unit(x.contiguous())
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(wanted)), kind
        others = [m for m in range(112) if m not in (5, 61)]
        assert torch.equal(found[:, others], clean[:, others])


@both_layouts
def test_every_last_piece_of_a_tall_map_in_16_bits(layout):
    """Pieces of maps of few pixels, behind large ones."""
    for height in range(338, 350):
        check_both(
            problem(in_channels=9, out_channels=32, height=height, width=3, placement=layout, batch=2), torch.bfloat16
        )


@pytest.mark.parametrize("kernel", [1, 3])
@both_layouts
def test_every_small_result_in_16_bits(layout, kernel):
    """Subnormal ones are rounded, not taken for zeros, whatever the processor's instruction does with them."""
    x = 2.0 ** -torch.arange(98.0, 126.0) * torch.tensor([1.0, -1.34375, 1.9921875]).repeat_interleave(28).view(3, 28)
    x = place(x.view(1, 3, 4, 7).repeat(1, 7, 1, 1).to(torch.bfloat16), layout)
    one = torch.eye(21, dtype=torch.bfloat16)[:, :, None, None]
    norm = Norm(torch.full((21,), 2.0**-12), None, torch.zeros(21), torch.ones(21), False, 0.1, 0.0)
    cheap = torch.zeros(21, 1, kernel, kernel, dtype=torch.bfloat16)
    cheap[:, :, kernel // 2, kernel // 2] = 1
    out = feature_augment(x, one, cheap, primary_norm=norm, activation=None, backend="cpu")
    wanted = (x.float() * 2.0**-12).to(torch.bfloat16)
    assert wanted.abs()[wanted != 0].min() <= 2.0**-133
    assert torch.equal(out, torch.cat([wanted, wanted], 1))


@pytest.mark.parametrize("splice", [True, False])
@both_layouts
def test_every_number_of_maps(layout, splice):
    """Tiles and blocks of channels, whole and in part, on both sides of the product."""
    for maps in [*range(1, 27), 31, 32, 33, 36, 37, 47, 48, 49, 64, 65, 97]:
        ratio = 2 + maps % 3 if splice else 1 + maps % 3
        chosen = problem(
            in_channels=1 + 7 * maps % 37, out_channels=maps * ratio - maps % 2, ratio=ratio, splice=splice,
            placement=layout, height=3, width=5, seed=maps,
        )  # fmt: skip
        check_both(chosen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@both_layouts
def test_every_cut_of_the_output(layout, dtype):
    """Odd out_channels: cheap maps that are computed in part, or not at all."""
    for ratio, splice in ((2, True), (3, True), (5, True), (8, True), (9, True), (1, False), (3, False)):
        for out_channels in range(1, 23):
            chosen = problem(
                out_channels=out_channels, ratio=ratio, splice=splice, placement=layout, height=4, width=3, batch=3
            )
            check_both(chosen, dtype)


@every_dtype
@pytest.mark.parametrize("activation", SMOOTH + KINKED, ids=str)
@both_layouts
def test_every_activation(layout, activation, dtype):
    """Over their whole range, the far ends included."""
    x = place(torch.linspace(-14, 14, 4 * 3 * 41).view(2, 6, 1, 41).to(dtype), layout)
    unit = FeatureAugment(6, 12, cheap_kernel_size=1, activation=activation, norm=None)
    with torch.no_grad():
        unit.primary_conv[0].weight.copy_(torch.eye(6)[:, :, None, None])
        unit.cheap_operation[0].weight.fill_(-1)
    unit = unit.to(dtype)
    check(unit, x)
    if dtype in (torch.float32, torch.float64) or activation in SMOOTH:
        check(unit, x, torch.ones_like(unit(x)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@both_layouts
@both_modes
def test_every_16_bit_number(training, layout, dtype):
    """Read, multiplied, rounded to nearest even and written as torch does: subnormal, infinite, too large, and NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    norm = Norm(torch.tensor([1.3125]), None, torch.zeros(1), torch.ones(1), False, 0.1, 0.0)
    one = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=training)
    for size, count in (((256, 256), 2**16), ((255, 257), 2**16 - 1), ((13, 5041), 13 * 5041)):
        x = place(numbers[:count].view(1, 1, *size), layout)
        wanted = (x.float() * 1.3125).to(dtype)
        out = feature_augment(x, one, one, primary_norm=norm, activation=None, backend="cpu").detach()
        assert torch.equal(out.isnan(), wanted.isnan().expand(1, 2, *size))
        assert torch.equal(out.nan_to_num(0.0), wanted.nan_to_num(0.0).expand(1, 2, *size))


@pytest.mark.parametrize("activation", KINKED)
def test_slopes_on_the_kinks(activation):
    """On a kink itself the slope is the one that torch takes."""
    x = torch.tensor([-3.0, -0.0, 0.0, 3.0, 6.0]).view(1, 1, 1, 5)
    unit = FeatureAugment(1, 2, cheap_kernel_size=1, activation=activation, norm=None)
    with torch.no_grad():
        unit.primary_conv[0].weight.fill_(1)
        unit.cheap_operation[0].weight.fill_(1)
    for dtype in DTYPES:
        unit = unit.to(dtype)
        grad = torch.tensor([1.0, 0.0], dtype=dtype).view(1, 2, 1, 1).expand(1, 2, 1, 5)
        wanted = results(unit, x.to(dtype), grad)
        assert torch.equal(fused_results(unit, x.to(dtype), grad)["gradient of x"], wanted["gradient of x"])


@every_dtype
@pytest.mark.parametrize("frozen", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_frozen_normalisation(bias, frozen, dtype):
    for layout in ("contiguous", "channels_last"):
        check_problem(problem(frozen=frozen, bias=bias, placement=layout), dtype, training=True)


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@both_modes
def test_normalisation_in_a_wider_format(training, dtype, norm_dtype):
    """As torch's mixed recipes keep it; the gradients and statistics stay in that format."""
    chosen = problem()
    unit = (chosen.training_unit() if training else chosen.unit().eval()).to(dtype)
    for stage in (unit.primary_conv, unit.cheap_operation):
        stage[1].to(norm_dtype)
    x, grad = chosen.input(dtype), chosen.gradient(dtype) if training else None
    wanted, found = definition(unit, x, grad), fused_results(unit, x, grad)
    assert found["output"].dtype == dtype
    for name, error in errors(found, wanted).items():
        assert error <= 1e-2, name
        if ".1." in name and "tracked" not in name:
            assert found[name].dtype == norm_dtype, name


# ---- memory layouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_of_the_input(placement, dtype):
    for size in ((2, 6, 7), (3, 1, 9), (3, 8, 1), (9, 1, 1), (1, 5, 4)):
        batch, height, width = size
        chosen = problem(batch=batch, height=height, width=width, placement=placement)
        check_problem(chosen, dtype, training=False)
        if placement not in EXPANSIONS:
            check_problem(chosen, dtype, training=True)
    for dim in (1, 2, 3):
        check_problem(problem(placement=placement, frozen=(True, True), **{("", "in_channels", "height", "width")[dim]: 1}),
                      dtype, training=True)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("grad_placement", PLACEMENTS)
@both_layouts
def test_every_placement_of_the_gradient(layout, grad_placement, dtype):
    for height, width, frozen in ((6, 7, False), (1, 9, True), (8, 1, False), (1, 1, True)):
        chosen = problem(
            height=height,
            width=width,
            placement=layout,
            grad_placement=grad_placement,
            frozen=(frozen, frozen),
            batch=3,
        )
        check_problem(chosen, dtype, training=True)


WEIGHTS = torch.randn(3, 30, 40, 40, generator=torch.Generator().manual_seed(5))
LOSSES = {
    "cat": lambda y: (torch.cat([y, y[:, :3] * 2, y.flip(1)], 1) * WEIGHTS[:, : 2 * y.shape[1] + 3, :6, :7]).sum(),
    "every other channel": lambda y: (y[:, ::2] * WEIGHTS[:, : -(-y.shape[1] // 2), :6, :7]).sum(),
    "inner pixels": lambda y: (y[:, :, 1:-1, 2:-1] * WEIGHTS[:, : y.shape[1], :4, :4]).sum(),
    "expand": lambda y: (y[:1].expand(3, -1, -1, -1) * WEIGHTS[:, : y.shape[1], :6, :7]).sum(),
    "transpose": lambda y: (y.transpose(1, 3) * WEIGHTS[:, :7, :6, : y.shape[1]]).sum(),
    "sum": lambda y: y.sum(),
    "mean over pixels": lambda y: (y.mean((2, 3)) * WEIGHTS[:, : y.shape[1], 0, 0]).sum(),
    "channels_last reader": lambda y: (
        F.conv2d(y.contiguous(memory_format=torch.channels_last), WEIGHTS[:, : y.shape[1], :3, :3].to(y.dtype)) ** 2
    ).sum(),
    "contiguous reader": lambda y: (F.conv2d(y.contiguous(), WEIGHTS[:, : y.shape[1], :3, :3].to(y.dtype)) ** 2).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
@both_layouts
def test_gradients_that_arrive_as_views(layout, loss):
    """What autograd hands to the backward pass in real programs: slices of a concatenation, expanded scalars, transposes."""
    for frozen in (True, False):
        chosen = problem(out_channels=11, batch=3, placement=layout, frozen=(frozen, frozen), activation="relu")
        plain = chosen.training_unit()
        found = []
        for unit in (plain.double(), FusedFiF.from_reference(plain).float()):
            dtype = next(unit.parameters()).dtype
            x = chosen.input(torch.float32).to(dtype).detach().requires_grad_()
            value = LOSSES[loss](unit(x))
            found.append(torch.autograd.grad(value, [x, *unit.parameters()]))
        total = torch.stack([g.norm() for g in found[0]]).norm()
        for wanted, ours in zip(*found, strict=True):
            assert (ours - wanted).norm() <= 1e-4 * (wanted.norm() + 1e-2 * total)


# ---- values that are not numbers


@pytest.mark.parametrize("activation", SMOOTH + KINKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@both_modes
def test_nan_and_infinity_pass_as_in_the_reference(training, dtype, activation):
    """Against float64: torch's own 16-bit convolutions, and its float32 gelu, make NaN of more than that."""
    for layout, kernel, bad in itertools.product(
        ("contiguous", "channels_last"), (1, 3, 7), (float("nan"), float("inf"), -float("inf"))
    ):
        chosen = problem(activation=activation, cheap_kernel_size=kernel, width=9, height=7, placement=layout)
        unit = (chosen.training_unit() if training else chosen.unit().eval()).to(dtype)
        x = chosen.input(dtype)
        x[0, 2, 3, 4] = bad
        x[1, 0, 0, 8] = bad
        found, wanted = fused_results(unit, x)["output"], definition(unit, x)["output"]
        for kind in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(kind(found), kind(wanted)), (layout, kernel, bad, kind)


@both_layouts
def test_nan_in_a_gradient_stays_where_the_reference_has_it(layout):
    chosen = problem(activation="relu", width=9, placement=layout, frozen=(True, True))
    unit, x = chosen.training_unit(), chosen.input(torch.float32)
    for bad in (float("nan"), float("inf")):
        for channel in (1, 8):
            grad = chosen.gradient(torch.float32)
            grad[1, channel, 2, 5] = bad
            wanted, found = definition(unit, x, grad), fused_results(unit, x, grad)
            for name in wanted:
                assert torch.equal(found[name].isfinite(), wanted[name].isfinite()), name


# ---- the halo


@every_dtype
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@both_layouts
def test_halo_is_zero_after_the_activation(layout, kernel, dtype):
    """With x = 0 and a positive shift the maps are constant, and only the zeros around them tell border from middle."""
    maps, size = 3, 9
    shift = torch.tensor([1.0, 2.0, 0.5], dtype=dtype)
    norm = Norm(torch.ones_like(shift), shift, torch.zeros_like(shift), torch.ones_like(shift), False, 0.1, 0.0)
    x = place(torch.zeros(2, 4, size, size, dtype=dtype), layout)
    cheap = torch.ones(maps, 1, kernel, kernel, dtype=dtype)
    primary = torch.randn(maps, 4, 1, 1, dtype=dtype, requires_grad=True)
    inside = F.conv2d(torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel), padding=kernel // 2)
    wanted = torch.cat([torch.ones(2, maps, size, size), inside.expand(2, maps, -1, -1)], 1)
    wanted = wanted * shift.float().repeat(2)[:, None, None]
    with torch.no_grad():
        assert torch.equal(feature_augment(x, primary, cheap, primary_norm=norm).float(), wanted)
    assert torch.equal(feature_augment(x, primary, cheap, primary_norm=norm).float(), wanted)


# ---- sizes and threads


@both_layouts
@both_modes
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_rows_that_fill_a_tile_alone(kernel, training, layout):
    for width, maps in ((1500, 12), (403, 41)):
        chosen = problem(
            in_channels=3,
            out_channels=2 * maps,
            cheap_kernel_size=kernel,
            placement=layout,
            height=4,
            width=width,
            batch=1,
        )
        check_problem(chosen, torch.float32, training)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@both_layouts
def test_large_maps_with_threads(layout, dtype, count):
    """Maps cut into tiles of rows, with the halo between them computed ahead; one image and several."""
    with threads(count):
        for in_channels, out_channels, batch, height, width, kernel, splice in (
            (130, 12, 1, 40, 40, 7, True),
            (130, 70, 1, 40, 40, 3, False),
            (96, 26, 2, 39, 40, 5, True),
            (64, 50, 3, 33, 37, 3, False),
            (130, 6, 1, 3, 400, 5, True),
            (3, 20, 1, 2, 1500, 3, False),
        ):
            chosen = problem(
                in_channels=in_channels, out_channels=out_channels, batch=batch, height=height, width=width,
                cheap_kernel_size=kernel, splice=splice, placement=layout,
            )  # fmt: skip
            check_problem(chosen, dtype, training=False)
            if out_channels < 20:
                check_problem(chosen, dtype, training=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@both_layouts
def test_training_on_units_beyond_the_cache(layout, dtype):
    """Maps of a whole batch that are too large to be kept between two rounds."""
    for ratio, splice, frozen in ((2, True, (False, False)), (3, True, (True, False)), (2, False, (False, True))):
        chosen = problem(
            in_channels=3, out_channels=5, batch=2, height=185, width=187, ratio=ratio, splice=splice, frozen=frozen,
            placement=layout, cheap_kernel_size=5,
        )  # fmt: skip
        check_problem(chosen, dtype, training=True)


@both_layouts
def test_large_batches_and_many_maps(layout):
    """Beyond 65,535 images, and beyond 65,535 maps of all images together."""
    check_both(problem(in_channels=3, out_channels=4, batch=65_536, height=1, width=2, placement=layout))
    check_both(problem(in_channels=1, out_channels=16_401, batch=9, height=1, width=1, placement=layout))


# ---- numbers in difficult places


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@both_layouts
@both_modes
def test_a_bias_that_cancels_a_large_mean(training, layout, dtype):
    """Nothing of the small difference is rounded away before the bias is added."""
    unit = FeatureAugment(16, 16, norm=None, bias=True, activation="silu")
    with torch.no_grad():
        unit.primary_conv[0].weight.normal_(1 / 16, 0.01)
        unit.primary_conv[0].bias.copy_(-4.5 * unit.primary_conv[0].weight.sum((1, 2, 3)))
    x = place(torch.rand(2, 16, 8, 8) + 4, layout).to(dtype)
    check(unit.to(dtype), x, torch.randn(2, 16, 8, 8).to(dtype) if training else None)


@both_layouts
def test_batch_statistics_of_a_large_mean(layout):
    """A mean of a thousand deviations: squares around it, not a difference of squares."""
    chosen = problem(batch=4, height=8, width=9, placement=layout)
    x = place(chosen.input(torch.float32) + 1000, layout)
    check(chosen.training_unit(), x, chosen.gradient(torch.float32))


@both_layouts
def test_batch_statistics_with_images_far_apart(layout):
    """No image is typical of the batch: the first one lies far from the rest, or every one does."""
    chosen = problem(batch=300, height=2, width=3, placement=layout)
    offsets = torch.zeros(300, 1, 1, 1)
    offsets[0] = 1000
    for offset in (offsets, torch.linspace(-1000, 1000, 300).view(300, 1, 1, 1)):
        x = place(chosen.input(torch.float32) + offset, layout)
        check(chosen.training_unit(), x, chosen.gradient(torch.float32))


@pytest.mark.parametrize("batch", [2, 3, 7])
@both_layouts
def test_few_values_a_channel(layout, batch):
    """Statistics of some numbers only: exact in float64, and in float32 as good as the composition on the whole."""
    for seed in range(8):
        chosen = problem(batch=batch, height=1, width=1, placement=layout, cheap_kernel_size=3, seed=seed)
        unit, x, grad = chosen.training_unit(), chosen.input(torch.float32), chosen.gradient(torch.float32)
        wanted = definition(unit, x, grad)
        ours = errors(fused_results(unit, x, grad), wanted)
        assert ours["output"] <= 1e-4
        plain = composition_errors(unit, x, grad, wanted)
        assert max(ours.values()) <= max(1e-4, 2 * max(plain.values()))
        check_problem(chosen, torch.float64, training=True)


@pytest.mark.parametrize("value", [0.0, 3.0])
@both_layouts
def test_constant_maps_have_no_variance(layout, value):
    chosen = problem(placement=layout, activation="relu")
    x = place(torch.full((2, 5, 6, 7), value), layout)
    unit = chosen.training_unit()
    wanted, found = (
        definition(unit, x, chosen.gradient(torch.float32)),
        fused_results(unit, x, chosen.gradient(torch.float32)),
    )
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert errors(found, wanted)["output"] <= 1e-3


def test_functional_form_takes_what_the_module_has():
    """Without running statistics, without weight or bias, with one of them, and with a batch in which nothing is tracked."""
    x = torch.randn(3, 4, 5, 6)
    primary, cheap = torch.randn(5, 4, 1, 1), torch.randn(10, 1, 3, 3)
    for w1, b1, w2, b2, stats in itertools.product([False, True], repeat=5):
        norms = []
        for maps, weight, bias in ((5, w1, b1), (10, w2, b2)):
            mean, var = (torch.randn(maps), torch.rand(maps) + 0.5) if stats else (None, None)
            affine = [torch.randn(maps) if given else None for given in (weight, bias)]
            norms.append(Norm(*affine, mean, var, not stats, 0.1, 1e-3))
        options = {"primary_norm": norms[0], "cheap_norm": norms[1], "out_channels": 13, "activation": "hardswish"}
        wanted = compose(x.double(), primary.double(), cheap.double(), **{
            **options, "primary_norm": widened(norms[0]), "cheap_norm": widened(norms[1])
        })  # fmt: skip
        ours = feature_augment(x, primary, cheap, backend="cpu", **options)
        assert (ours - wanted).norm() <= 1e-5 * wanted.norm()


def widened(norm):
    return norm._replace(**{
        field: value.double() for field, value in norm._asdict().items() if isinstance(value, torch.Tensor)
    })  # fmt: skip


def test_weights_and_statistics_with_odd_strides():
    """Slices of larger tensors, as a pruned or stacked model holds them; running statistics are updated in place."""
    plain = randomise(FeatureAugment(4, 10, bias=True))
    fused = FusedFiF.from_reference(plain)
    for module in fused.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.dim() > 0:
                    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
                    view = wide[..., 1::2]
                    view.copy_(tensor.data)
                    held[name] = nn.Parameter(view) if held is module._parameters else view
    assert not fused.primary_conv[1].running_mean.is_contiguous()
    x = torch.randn(3, 4, 5, 6)
    grad = torch.randn(3, 10, 5, 6)
    found, wanted = results(fused, x, grad), definition(plain, x, grad)
    for name, error in errors(found, wanted).items():
        assert error <= 1e-4, name

"""The CUDA operators, run on the CPU thread by thread, against the definition in float64."""

import contextlib
import ctypes
import itertools
import re
import warnings
from typing import NamedTuple

import cuda_module
import pytest
import torch
from torch.nn import functional as F

from fif_ops import FusedFiF, Norm, backends, explain, feature_augment, ops
from fif_ops.reference import compose

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        cuda_module.toolchain.cuda_include() is None, reason="CUDA's host headers (cuda_fp16.h) are not here"
    ),
    pytest.mark.usefixtures("one_thread", "unwritten_memory_is_nan", "device"),
]
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
FORWARD = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
BACKWARD = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
every_format = pytest.mark.parametrize("dtype", FORMATS, ids=str)
both_layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])


class Unit(NamedTuple):
    batch: int
    channels: int
    maps: int
    multiplier: int  # cheap maps of a primary one
    height: int
    width: int
    kernel: int = 3
    activation: str | None = "silu"
    splice: bool = True
    cut: int = 0  # cheap maps left out
    primary: int = 1  # size of the primary kernel
    stride: int = 1
    groups: int = 1
    norms: bool = True
    bias: bool = True


# All widths of tiles, loads and channel blocks; maps that are no multiple of anything; S > 1; 5 x 5.
UNITS = [
    Unit(2, 16, 8, 1, 14, 14),
    Unit(3, 33, 20, 1, 7, 7, activation="hardswish"),
    Unit(1, 40, 36, 2, 9, 30, 5, activation="gelu", cut=1),
    Unit(1, 72, 70, 1, 15, 16, bias=False),
    Unit(5, 7, 5, 3, 1, 1, splice=False),
    Unit(29, 9, 17, 1, 3, 4),
    Unit(1, 64, 64, 1, 12, 28, 5, activation=None),
    Unit(1, 24, 12, 1, 5, 56),
    Unit(4, 8, 3, 3, 8, 17, splice=False, cut=4),
]
OTHERS = {
    "stride 2": Unit(2, 16, 24, 1, 9, 7, stride=2),
    "stride 3, 5x5": Unit(1, 6, 5, 2, 8, 11, 5, stride=3, norms=False),
    "two groups": Unit(2, 24, 40, 1, 6, 8, groups=2),
    "four groups, stride 2": Unit(1, 12, 32, 1, 7, 6, groups=4, stride=2),
    "many groups": Unit(1, 8, 8, 1, 5, 4, groups=4),
    "3x3 primary": Unit(2, 6, 10, 1, 8, 7, primary=3),
    "5x5 primary, stride 2": Unit(1, 4, 9, 2, 9, 8, 5, primary=5, stride=2, groups=1, splice=False),
    "no norms": Unit(2, 9, 8, 1, 6, 6, norms=False),
    "no norms, no bias": Unit(2, 9, 8, 1, 6, 6, norms=False, bias=False),
}
RELU = Unit(2, 16, 24, 1, 8, 8, activation="relu")


@pytest.fixture(scope="module")
def simulator():
    return cuda_module.load()


@pytest.fixture
def device(simulator, monkeypatch):
    """The simulated GPU as the only backend beside the reference; so small that its blocks go round."""
    chosen = cuda_module.Simulated()
    monkeypatch.setitem(backends.BACKENDS, "cuda", chosen)
    monkeypatch.setattr(backends, "_ORDER", (chosen, backends.REFERENCE))
    simulator.set_device(cuda_module.MULTIPROCESSORS, 227 << 10, 228 << 10)
    simulator.reset_launches()
    return simulator


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def names_of_launches(simulator):
    return [re.sub(r"<.*", "", name).strip("(") for name, _, _ in simulator.launches()]


def random_norm(channels, training):
    return Norm(
        torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels) * 0.3, torch.rand(channels) + 0.5,
        training=training, momentum=0.1, eps=1e-5,
    )  # fmt: skip


def random_like(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(3))


class Case:
    """A unit's tensors: leaves of autograd, and norms whose statistics a run updates."""

    def __init__(self, unit, dtype, layout=torch.contiguous_format, training=(True, True)):
        self.unit, self.dtype = unit, dtype
        k, d = unit.primary, unit.kernel
        x = torch.randn(unit.batch, unit.channels, unit.height, unit.width)
        cheap = unit.maps * unit.multiplier
        fan = unit.channels // unit.groups * k * k
        self.tensors = {
            "x": x.to(dtype).contiguous(memory_format=layout),
            "primary_weight": (torch.randn(unit.maps, unit.channels // unit.groups, k, k) / fan**0.5).to(dtype),
            "cheap_weight": (torch.randn(cheap, 1, d, d) / d).to(dtype),
        }
        if unit.bias:
            self.tensors |= {
                "primary_bias": torch.randn(unit.maps).to(dtype),
                "cheap_bias": torch.randn(cheap).to(dtype),
            }
        self.norms = {}
        if unit.norms:
            self.norms = {
                "primary_norm": random_norm(unit.maps, training[0]),
                "cheap_norm": random_norm(cheap, training[1]),
            }
        self.out_channels = (unit.maps if unit.splice else 0) + cheap - unit.cut

    def run(self, function, wide, gradients=True, upstream=random_like):
        """Everything that ``function`` computes and updates, by name; in float64 if ``wide``."""

        def leaf(t):
            t = t.detach().double() if wide else t.detach().clone(memory_format=torch.preserve_format)
            return t.requires_grad_(gradients)

        leaves = {name: leaf(t) for name, t in self.tensors.items()}
        norms = {}
        for name, norm in self.norms.items():
            fields = {f: getattr(norm, f).double() if wide else getattr(norm, f).clone() for f in Norm._fields[:4]}
            for field in ("weight", "bias"):
                leaves[f"{name}.{field}"] = fields[field] = leaf(fields[field])
            norms[name] = norm._replace(**fields)
        unit = self.unit
        out = function(
            **{name: leaves[name] for name in self.tensors}, **norms, out_channels=self.out_channels,
            activation=unit.activation, splice=unit.splice, stride=unit.stride, groups=unit.groups,
        )  # fmt: skip
        found = {"output": out}
        if gradients:
            given = upstream(out.detach()).to(out.dtype)
            if not wide and self.tensors["x"].is_contiguous(memory_format=torch.channels_last):
                given = given.contiguous(memory_format=torch.channels_last)
            found |= dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), given), strict=True))
        for name, norm in norms.items():
            found |= {f"{name}.mean": norm.running_mean, f"{name}.var": norm.running_var}
        return found


@contextlib.contextmanager
def without_onednn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about TF32
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def check(case, gradients=True, limits=None, **options):
    ours = case.run(feature_augment, wide=False, gradients=gradients, **options)
    truth = case.run(compose, wide=True, gradients=gradients, **options)
    scale = max((truth[name].norm() for name in truth if name.endswith("bias")), default=0)
    forward, backward = limits or (FORWARD[case.dtype], BACKWARD[case.dtype])
    # In 16 bits some small case may be hard: then torch's own error there is the bar, the larger one of its two paths,
    # since what oneDNN rounds depends on the processor.
    torchs = []
    if case.dtype != torch.float32:
        torchs.append(case.run(compose, wide=False, gradients=gradients, **options))
        with without_onednn():
            torchs.append(case.run(compose, wide=False, gradients=gradients, **options))
    for name, expected in truth.items():
        limit = backward if name in case.tensors or name.endswith(("weight", "bias")) else forward
        error, *torch_errors = ((found[name].double() - expected).norm() for found in (ours, *torchs))
        # Before batch statistics a bias has no gradient: nothing to be relative to.
        size = scale if name.endswith("bias") else expected.norm()
        assert error <= max(limit * size, 1.5 * max(torch_errors, default=0)) + 1e-30, (name, (error / size).item())
    layout = torch.channels_last if case.tensors["x"].is_contiguous(memory_format=torch.channels_last) else None
    if layout is not None and case.unit.channels > 1:
        assert ours["output"].is_contiguous(memory_format=layout)


# ---- accuracy


@pytest.mark.parametrize("unit", UNITS, ids=str)
@both_layouts
@every_format
def test_inference(device, unit, layout, dtype):
    check(Case(unit, dtype, layout, training=(False, False)), gradients=False)
    assert names_of_launches(device) == ["infer_kernel"]


@pytest.mark.parametrize("unit", UNITS, ids=str)
@both_layouts
@every_format
def test_training(device, unit, layout, dtype):
    check(Case(unit, dtype, layout))
    assert names_of_launches(device) == [
        "raw_kernel", "moments_kernel", "apply_kernel",
        "sums_kernel", "gradient_kernel", "weight_kernel", "input_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("unit", OTHERS.values(), ids=OTHERS)
@both_layouts
def test_other_primary_convolutions_and_no_norms(device, unit, layout):
    training = (unit.norms, unit.norms)
    check(Case(unit, torch.float32, layout, training))
    fused = unit.primary == 1 and (unit.groups == 1 or unit.maps >= 8 * unit.groups)
    names = names_of_launches(device)
    assert ("raw_kernel" in names) == ("input_kernel" in names) == fused
    assert len(names) <= 7
    for dtype in (torch.bfloat16, torch.float16):
        check(Case(unit, dtype, layout, training))
    device.reset_launches()
    check(Case(unit, torch.float16, layout, (False, False)), gradients=False)
    assert names_of_launches(device) == ["infer_kernel" if fused else "apply_kernel"]


@pytest.mark.parametrize("maps", [10, 20, 40])
@pytest.mark.parametrize("kernel", [3, 5])
@both_layouts
def test_every_width_of_a_block(layout, kernel, maps):
    for dtype in FORMATS:
        check(Case(Unit(2, 9, maps, 1, 5, 6, kernel), dtype, layout, (False, False)), gradients=False)


@pytest.mark.parametrize("training", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("primary", [1, 3])
def test_frozen_norms(device, training, primary):
    """Statistics that are frozen need no launch of their own."""
    for layout in LAYOUTS:
        device.reset_launches()
        check(Case(UNITS[0]._replace(primary=primary), torch.float32, layout, training))
        names = names_of_launches(device)
        forward = names[: names.index("sums_kernel")]
        assert len(forward) == 1 + (primary == 1) + training[1] + (training[0] and primary != 1)


@both_layouts
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_kinks(layout, activation):
    """In 16 bits a value near a kink may lie on its other side: f32 alone has the bars of the others."""
    check(Case(RELU._replace(activation=activation), torch.float32, layout))
    for dtype in (torch.bfloat16, torch.float16):
        check(Case(RELU._replace(activation=activation), dtype, layout), limits=(FORWARD[dtype], 0.1))


@both_layouts
def test_tf32_where_torch_allows_it(device, layout, monkeypatch):
    """The kernels take it from the operators' argument; the switch reaches that on CUDA tensors only."""
    operators = {name: getattr(torch.ops.fif_ops_simulated, name) for name in ("infer", "train", "backward")}

    def with_tf32(_options, name):
        return lambda *tensors, **numbers: operators[name](*tensors, **{**numbers, "tf32": True})

    from fif_ops.autograd import Options

    case = Case(UNITS[1], torch.float32, layout)
    exact = case.run(feature_augment, wide=False)
    monkeypatch.setattr(Options, "operator", with_tf32)
    check(case, limits=(1e-3, 4e-3))
    assert not torch.equal(exact["output"], case.run(feature_augment, wide=False)["output"])
    check(Case(UNITS[3], torch.float32, layout), limits=(1e-3, 4e-3))
    for kernel, maps in itertools.product((3, 5), (10, 20, 40)):
        check(Case(Unit(2, 9, maps, 1, 5, 6, kernel), torch.float32, layout), limits=(1e-3, 4e-3))
        evaluated = Case(Unit(2, 40, maps, 1, 5, 6, kernel), torch.float32, layout, (False, False))
        check(evaluated, gradients=False, limits=(1e-3, 0))


def test_halo_is_zero_after_the_activation():
    """With x = 0 and a positive shift the primary maps are positive to the edge, and zero beyond it."""
    ones, zeros = torch.ones(16), torch.zeros(16)
    norm = Norm(ones, ones, zeros, ones, False, 0.0, 0.0)
    rows, columns = torch.tensor([2.0, 3, 3, 3, 2]), torch.tensor([2.0, 3, 3, 3, 3, 2])
    for layout, primary in itertools.product(LAYOUTS, (1, 3)):
        x = torch.zeros(1, 16, 5, 6).contiguous(memory_format=layout)
        out = feature_augment(
            x, torch.zeros(16, 16, primary, primary), torch.ones(16, 1, 3, 3), primary_norm=norm,
            cheap_norm=norm._replace(bias=zeros), backend="cuda",
        )  # fmt: skip
        assert torch.equal(out[0, 20], rows[:, None] * columns)
        assert torch.equal(out[0, 3], torch.ones(5, 6))


def test_a_large_mean_costs_no_digits_of_the_variance():
    torch.manual_seed(1)
    case = Case(UNITS[0]._replace(bias=True), torch.float32)
    case.tensors["primary_bias"] += 3000
    ours, truth = case.run(feature_augment, wide=False, gradients=False), case.run(compose, wide=True, gradients=False)
    # raw holds about 3000 in float32, so that its own rounding is 1e-4 of the spread; the variance adds nothing to that
    for name in ("output", "primary_norm.var"):
        assert (ours[name] - truth[name]).norm() <= 2e-4 * truth[name].norm()


def test_nan_and_infinity_pass():
    case = Case(RELU, torch.float32, training=(False, False))
    case.tensors["x"][0, 3, 2, 2], case.tensors["x"][1, 3, 5, 5] = float("nan"), float("inf")
    for layout in LAYOUTS:
        case.tensors["x"] = case.tensors["x"].contiguous(memory_format=layout)
        ours = case.run(feature_augment, wide=False, gradients=False)["output"]
        truth = case.run(compose, wide=True, gradients=False)["output"].float()
        assert torch.equal(ours.isnan(), truth.isnan())
        assert ours.isnan().any()


# ---- memory


@both_layouts
def test_inputs_that_start_anywhere(layout):
    """Narrow loads where the address or a stride rules out wide ones; the memory around the input is NaN."""
    last = layout == torch.channels_last
    for offset, maps in itertools.product((1, 2, 4), (8, 12)):
        case = Case(Unit(2, 16, maps, 1, 8, 8), torch.float16, layout)
        memory = torch.full((2 * 16 * 8 * 8 + 16,), float("nan"), dtype=torch.float16)
        strides = (16 * 64, 1, 8 * 16, 16) if last else (16 * 64, 64, 8, 1)
        case.tensors["x"] = memory.as_strided((2, 16, 8, 8), strides, offset).copy_(case.tensors["x"])
        check(case)


@both_layouts
def test_slices_of_channels_are_read_where_they_are(layout):
    """Channels of a wider tensor, whose other channels are NaN; and as raw maps, before a kernel of ours."""
    for primary in (1, 3):
        case = Case(Unit(2, 8, 8, 1, 6, 8, primary=primary), torch.float32, layout)
        wide = torch.full((2, 20, 6, 8), float("nan")).contiguous(memory_format=layout)
        wide[:, 4:12] = case.tensors["x"]
        case.tensors["x"] = wide[:, 4:12]
        check(case)


UPSTREAM = {
    "expanded": lambda y: torch.ones(()).expand(y.shape),
    "transposed": lambda y: torch.linspace(-1, 1, y.numel()).view(*y.shape[:2], y.shape[3], y.shape[2]).mT,
    "every other": lambda y: torch.linspace(-1, 1, 2 * y.numel()).view(y.shape[0], 2 * y.shape[1], *y.shape[2:])[
        :, ::2
    ],
    "one of a stack": lambda y: torch.linspace(-1, 1, 3 * y.numel()).view(3, *y.shape)[1],
}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM)
@both_layouts
def test_upstream_gradients_of_any_strides(layout, upstream):
    check(Case(UNITS[0], torch.float32, layout), upstream=upstream)


@both_layouts
def test_far_addresses(layout):
    """Images that lie over 2^32 elements apart: no address is computed in 32 bits."""
    torch.use_deterministic_algorithms(False)  # the memory between is not to be touched
    case = Case(Unit(2, 16, 8, 1, 5, 4), torch.float16, layout)
    far = (1 << 32) + 64
    memory = torch.empty(far + 16 * 20, dtype=torch.float16)
    strides = (far, 1, 4 * 16, 16) if layout == torch.channels_last else (far, 20, 4, 1)
    case.tensors["x"] = memory.as_strided((2, 16, 5, 4), strides).copy_(case.tensors["x"])
    check(case)


def test_few_gradients_wanted(device):
    """What nobody asks for is not computed, and its memory not touched."""
    for needed in (("x",), ("primary_weight",), ("cheap_weight",), ("cheap_norm.bias",)):
        case = Case(UNITS[0], torch.float32)
        truth = case.run(compose, wide=True)
        leaves = {name: t.clone().requires_grad_(name in needed) for name, t in case.tensors.items()}
        norms = {name: norm._replace(running_mean=None, running_var=None) for name, norm in case.norms.items()}
        if needed == ("cheap_norm.bias",):
            bias = norms["cheap_norm"].bias.clone().requires_grad_()
            norms["cheap_norm"] = norms["cheap_norm"]._replace(bias=bias)
            leaves_needed = [bias]
        else:
            leaves_needed = [leaves[name] for name in needed]
        out = feature_augment(**leaves, **norms, activation="silu")
        (found,) = torch.autograd.grad(out, leaves_needed, random_like(out))
        assert (found - truth[needed[0]]).norm() <= 1e-5 * truth[needed[0]].norm()


# ---- plans


@pytest.mark.parametrize(
    ("multiprocessors", "per_block", "per_multiprocessor"),
    [(1, 99, 100), (3, 163, 164), (400, 227, 228)],
)
def test_devices_of_every_size(device, multiprocessors, per_block, per_multiprocessor):
    """Many blocks or few, large tiles or small: the results hold."""
    device.set_device(multiprocessors, per_block << 10, per_multiprocessor << 10)
    for layout in LAYOUTS:
        check(Case(Unit(2, 20, 12, 1, 13, 19), torch.float16, layout))
        for kernel, multiplier in ((5, 1), (3, 3)):
            wide = Unit(1, 20, 70, multiplier, 6, 9, kernel)
            check(Case(wide, torch.float32, layout))
            check(Case(wide, torch.float32, layout, (False, False)), gradients=False)


@pytest.mark.parametrize("kernel", [3, 5])
def test_the_largest_multiplier_fits_the_smallest_gpu(device, kernel):
    device.set_device(2, 99 << 10, 100 << 10)
    most = cuda_module.Simulated.most_cheap[kernel]
    for dtype, layout in itertools.product((torch.float16, torch.float32), LAYOUTS):
        check(Case(Unit(1, 4, 3, most, 5, 6, kernel), dtype, layout))
    x = torch.randn(1, 4, 5, 5)
    with pytest.raises(ValueError, match=f"more than {most}"):
        feature_augment(x, torch.randn(2, 4, 1, 1), torch.randn(2 * most + 2, 1, kernel, kernel), backend="cuda")


def test_deterministic_whatever_the_order(device):
    results = []
    for _ in range(3):
        torch.manual_seed(0)
        results.append(Case(UNITS[1], torch.float16, torch.channels_last).run(feature_augment, wide=False))
    for other in results[1:]:
        assert all(torch.equal(other[name], t) for name, t in results[0].items())


PLANNED = {
    "usual": {},
    "stride, 5x5": {"stride": 2, "cheap_kernel_size": 5},
    "two groups": {"groups": 2},
    "3x3 primary": {"kernel_size": 3},
    "ratio 4": {"ratio": 4},
}


@pytest.mark.parametrize("options", PLANNED.values(), ids=PLANNED)
@both_layouts
def test_the_plan_that_is_explained_is_the_one_that_runs(device, monkeypatch, layout, options):
    monkeypatch.setattr(ops, "_LIBRARY", ctypes.CDLL(device.__file__))
    unit = FusedFiF(8, 40, activation="silu", **options)
    x = torch.randn(2, 8, 9, 12, requires_grad=True).contiguous(memory_format=layout)
    for training in (False, True):
        device.reset_launches()
        with torch.set_grad_enabled(training):
            plan = explain(unit.train(training), x).plan
            out = unit(x)
        if training:
            out.sum().backward()
        launched = [(name, x * y) for name, (_, x, y) in zip(names_of_launches(device), device.launches(), strict=True)]
        assert [(launch.kernel.split()[0], launch.blocks) for launch in plan] == launched
        read, written = sum(launch.bytes_read for launch in plan), sum(launch.bytes_written for launch in plan)
        kernels = unit.primary_conv[0].kernel_size[0]
        assert read >= (x.numel() * 4 if kernels == 1 else 0)
        assert written >= out.numel() * 4
        assert str(launched[0][1]) in str(plan[0])


def test_huge_batches_and_many_channels_fit_the_grid(device):
    """Launched without running: 65,536 images, and more channels than gridDim.y has room for if misused."""
    device.set_dry_run(True)
    try:
        for batch, channels, layout in ((65536, 2, LAYOUTS[0]), (65536, 2, LAYOUTS[1]), (2, 65536, LAYOUTS[1])):
            x = torch.empty(batch, 2, 2, 2).contiguous(memory_format=layout)
            weight = torch.empty(channels, 2, 1, 1, requires_grad=True)
            out = feature_augment(x, weight, torch.empty(channels, 1, 3, 3), backend="cuda")
            out.backward(torch.empty_like(out))
        assert all(y < 65536 for _, _, y in device.launches())
    finally:
        device.set_dry_run(False)


# ---- the module around them


@both_layouts
def test_module_trains_as_the_reference(device, layout):
    torch.manual_seed(0)
    unit = FusedFiF(6, 20, ratio=2, activation="silu")
    twin = unit.to_reference().double()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (unit, twin)]
    for _ in range(3):
        x = torch.randn(4, 6, 9, 9).contiguous(memory_format=layout)
        for module, data, optimizer in ((unit, x, optimizers[0]), (twin, x.double(), optimizers[1])):
            optimizer.zero_grad()
            F.mse_loss(module(data), torch.ones(4, 20, 9, 9, dtype=data.dtype)).backward()
            optimizer.step()
    assert len(device.launches()) == 3 * 7
    for (name, ours), truth in zip(unit.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.allclose(ours.double(), truth.double(), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_converted_whole(device, dtype):
    """Parameters and statistics in 16 bits too: read as they are, running statistics updated in their own format."""
    unit, twin = (m.to(dtype) for m in (FusedFiF(8, 16, activation="silu"), FusedFiF(8, 16, activation="silu")))
    twin.load_state_dict(unit.state_dict())
    x = torch.randn(4, 8, 6, 6).to(dtype)
    ours = unit(x)
    with backends.use("reference"):
        truth = twin.double()(x.double())
    assert (ours.double() - truth).norm() <= 2 * FORWARD[dtype] * truth.norm()
    for name, buffer in unit.named_buffers():
        assert torch.allclose(buffer.double(), twin.get_buffer(name).double(), rtol=1e-2, atol=1e-2), name
    ours.sum().backward()
    assert unit.primary_conv[1].weight.grad.dtype == dtype
    assert torch.equal(unit.eval()(x).isnan(), torch.zeros_like(ours, dtype=torch.bool))


def test_every_operator_starts_on_its_tensors_device():
    source = (cuda_module.ROOT / "csrc/cuda/ops_cuda.cpp").read_text()
    bodies = re.findall(r"^(?:Tensor|std::tuple<.*>) \w+\([^{]*\{\n(.*)\n", source, re.MULTILINE)
    assert len(bodies) == 3
    assert all(body.strip() == "const DeviceGuard guard(x.get_device_index());" for body in bodies)


@both_layouts
@pytest.mark.parametrize("primary", [1, 3], ids=["1x1", "given maps"])
def test_opcheck(layout, primary):
    """Schemas, fake kernels and their strides, with and without a primary convolution of ours."""
    x = torch.randn(2, 6, 7, 5).contiguous(memory_format=layout)
    weight = torch.randn(10, 3, 1, 1) if primary == 1 else None
    maps = 10 if primary == 1 else 6
    geometry = {"stride": 2, "groups": 2} if primary == 1 else {}
    cheap = torch.randn(2 * maps, 1, 3, 3)
    norms = [t for c in (maps, 2 * maps) for t in random_norm(c, True)[:4]]
    forward = (x, weight, cheap, None, None, *norms, 1e-5, 1e-5, 3 * maps - 1, 4, True)
    training = (*forward, True, True, 0.1, 0.1)
    operators = torch.ops.fif_ops_simulated
    # The schema test calls twice and wants the same: memory that is full of NaN is not equal to itself.
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(operators.infer.default, forward, geometry)
    torch.library.opcheck(operators.train.default, training, geometry)
    out, raw, *statistics = operators.train(*training, **geometry)
    norm = [norms[0], norms[1], norms[4], norms[5]]
    for needs in itertools.product([False, True], repeat=2):
        backward = (
            torch.randn_like(out), x, weight, cheap, raw if primary == 1 else x, *statistics, *norm, 4, True, True, True,
            *needs,
        )  # fmt: skip
        torch.library.opcheck(operators.backward.default, backward, geometry)


def test_operators_of_gpus_say_what_they_lack():
    x = torch.randn(1, 4, 5, 5)
    arguments = (torch.randn(4, 4, 1, 1), torch.randn(4, 1, 3, 3), *[None] * 10, 0.0, 0.0, 8, 1, True)
    infer = torch.ops.fif_ops_simulated.infer
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16 on a GPU"):
        infer(x.double(), *(t.double() if isinstance(t, torch.Tensor) else t for t in arguments))
    with pytest.raises(RuntimeError, match="cheap_weight's d must be 3 or 5 on a GPU, got 7"):
        infer(x, arguments[0], torch.randn(4, 1, 7, 7), *arguments[2:])
    with pytest.raises(RuntimeError, match="groups is 3: must divide x's 4 channels"):
        infer(x, *arguments, groups=3)
    with pytest.raises(RuntimeError, match="stride is 0: must be positive"):
        infer(x, *arguments, stride=0)
    with pytest.raises(RuntimeError, match="must be 1 without a primary_weight"):
        infer(x, None, *arguments[1:], stride=2)
    with pytest.raises(RuntimeError, match="must have one group on the CPU"):
        torch.ops.fif_ops.infer(x, arguments[0][:, :2], *arguments[1:], groups=2)

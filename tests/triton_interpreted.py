"""The Triton kernels, interpreted on the CPU, against the definition in float64.

Run by test_triton_kernels.py in a process of its own, since TRITON_INTERPRET must be set before Triton is imported. By
hand: TRITON_INTERPRET=1 pytest tests/triton_interpreted.py
"""

import copy
import importlib.util
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import LAYOUTS, PLACEMENTS, name_of, place
from triton_interpreter import Violation, checked, repair

from fif_ops import FeatureAugment, FusedFiF, backends, ops, tune
from fif_ops.backends import triton as backend
from fif_ops.backends.triton import backward, config, forward, host
from fif_ops.reference import Norm, compose, memory_format_of

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"
repair()

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=name_of)
FORMATS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
TOLERANCE = {F32: 1e-5, F16: 1e-2, BF16: 1e-2}


@pytest.fixture
def poisoned():
    """Fresh tensors are full of NaN, so that what a kernel leaves out, or reads too early, shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    names: list[str] = []
    for module in (forward, backward):

        def counted(kernel: Any, *arguments: Any, **options: Any) -> None:
            names.append(kernel.fn.__name__)
            host.launch(kernel, *arguments, **options)

        monkeypatch.setattr(module, "launch", counted)
    return names


class Unit(NamedTuple):
    """A unit's parameters and options; ``run`` and ``exact`` do the same with the kernels and in float64."""

    x: torch.Tensor
    w1: torch.Tensor | None
    w2: torch.Tensor
    b1: torch.Tensor | None
    b2: torch.Tensor | None
    norm1: list[torch.Tensor | None]
    norm2: list[torch.Tensor | None]
    out_channels: int
    activation: str | None
    splice: bool
    stride: int
    groups: int

    @property
    def options(self) -> tuple[Any, ...]:
        return (1e-5, 1e-4, self.out_channels, ops.ACTIVATION_CODES[self.activation], self.splice)

    @property
    def tensors(self) -> tuple[Any, ...]:
        return (self.x, self.w1, self.w2, self.b1, self.b2, *self.norm1, *self.norm2)

    def infer(self) -> torch.Tensor:
        return torch.ops.fif_ops_triton.infer(*self.tensors, *self.options, stride=self.stride, groups=self.groups)

    def train(self, batch=(True, True), momentum=(0.1, 0.2)):
        return torch.ops.fif_ops_triton.train(
            *self.tensors, *self.options, *batch, *momentum, stride=self.stride, groups=self.groups
        )

    def gradients(self, grad, trained, batch=(True, True), need=(True, True)):
        _, raw, stats1, stats2 = trained
        shift2 = self.b2 if self.norm2[2] is None and not batch[1] else self.norm2[1]
        return torch.ops.fif_ops_triton.backward(
            grad,
            self.x,
            self.w1,
            self.w2,
            self.x if self.w1 is None else raw,
            stats1,
            stats2,
            *self.norm1[:2],
            self.norm2[0],
            shift2,
            ops.ACTIVATION_CODES[self.activation],
            self.splice,
            *batch,
            *need,
            stride=self.stride,
            groups=self.groups,
        )

    def composed(self, dtype, batch=(False, False), momentum=(0.1, 0.2)):
        """The output, and the tensors it is made of, all in ``dtype``: the first five, then both norms."""

        def copy(t):
            return None if t is None else t.detach().to(dtype, copy=True)

        x, w1, w2, b1, b2 = (copy(t) for t in (self.x, self.w1, self.w2, self.b1, self.b2))
        norms = [
            [copy(t) if dtype == torch.float64 else (None if t is None else t.clone()) for t in n]
            for n in (self.norm1, self.norm2)
        ]
        for t in (x, w1, w2, b1, b2, *norms[0][:2], *norms[1][:2]):
            if t is not None:
                t.requires_grad_()
        primary = w1
        if primary is None:
            primary = torch.eye(x.shape[1], dtype=dtype)[:, :, None, None]
        present = [batch[i] or norms[i][2] is not None for i in (0, 1)]
        given = [Norm(*n, batch[i], momentum[i], (1e-5, 1e-4)[i]) if present[i] else None for i, n in enumerate(norms)]
        out = compose(
            x,
            primary,
            w2,
            primary_bias=b1,
            cheap_bias=b2,
            primary_norm=given[0],
            cheap_norm=given[1],
            out_channels=self.out_channels,
            activation=self.activation,
            splice=self.splice,
            stride=self.stride,
            groups=self.groups,
        )
        return out, (x, w1, w2, b1, b2), norms


def unit(
    dtype=F32, layout="contiguous", *, images=2, channels=20, maps=12, size=(7, 9), multiplier=1, kernel=3, stride=1,
    groups=1, activation="silu", splice=True, cut=0, primary=True, norm=True, bias=False,
) -> Unit:  # fmt: skip
    x = torch.randn(images, channels if primary else maps, *size).to(dtype)
    w1 = torch.randn(maps, channels // groups, 1, 1) * (channels // groups) ** -0.5
    cheap = maps * multiplier
    norms: list[list[torch.Tensor | None]] = [[None] * 4, [None] * 4]
    if norm:
        norms = [[*torch.randn(3, n), torch.rand(n) + 0.5] for n in (maps, cheap)]
    return Unit(
        place(x, layout),
        w1.to(dtype) if primary else None,
        (torch.randn(cheap, 1, kernel, kernel) / kernel).to(dtype),
        torch.randn(maps).to(dtype) if bias and primary else None,
        torch.randn(cheap).to(dtype) if bias else None,
        *norms,
        cheap + (maps if splice else 0) - cut,
        activation,
        splice,
        stride,
        groups,
    )


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    distance = (found.double() - wanted.double()).norm().item()
    return distance if distance == 0 else distance / max(wanted.double().norm().item(), 1e-300)


def check_infer(u: Unit) -> None:
    out = u.infer()
    wanted = u.composed(torch.float64)[0]
    assert out.dtype == u.x.dtype and out.shape == wanted.shape
    assert out.is_contiguous(memory_format=memory_format_of(u.x)) and out.untyped_storage().nbytes() == out.nbytes
    assert error(out, wanted) <= TOLERANCE[u.x.dtype]


def check_training(u: Unit, batch=(True, True), momentum=(0.1, 0.2), grad_placement="contiguous") -> None:
    """Output, running statistics and gradients; where 16 bits do not do better, twice the composition's error may be."""
    results = []
    grad = None
    for dtype in (torch.float64, u.x.dtype):
        out, tensors, norms = u.composed(dtype, batch, momentum)
        if grad is None:
            grad = place(torch.randn(out.shape).to(u.x.dtype), grad_placement)
        out.backward(grad.to(dtype))
        values = {"output": out.detach()}
        values |= {f"gradient {i}": t.grad for i, t in enumerate(tensors[:3]) if t is not None}
        for i, n in enumerate(norms):
            if n[2] is not None:
                values |= {f"norm {i}.{k}": t.grad if k < 2 else t for k, t in enumerate(n)}
        results.append(values)
    exact, plain = results
    trained = u.train(batch, momentum)
    grads = u.gradients(grad, trained, batch)
    found = {"output": trained[0]}
    found |= {f"gradient {i}": t for i, t in enumerate(grads[:3]) if i != 1 or u.w1 is not None}
    for i, n in enumerate((u.norm1, u.norm2)):
        if n[2] is not None:
            found |= {f"norm {i}.{k}": t for k, t in enumerate((*grads[3 + i], *n[2:]))}
    assert found.keys() == exact.keys()
    assert memory_format_of(trained[0]) == memory_format_of(u.x)
    tolerance = TOLERANCE[u.x.dtype]
    bad = {
        k: error(found[k], v)
        for k, v in exact.items()
        if not error(found[k], v) <= max(tolerance, 2 * error(plain[k], v))
    }
    assert not bad


# ---- inference


@pytest.fixture(params=["fused", "split"])
def way(request, monkeypatch):
    one_launch = lambda unit, device: config._fused(unit)[0]  # noqa: E731
    monkeypatch.setattr(config, "inference", one_launch if request.param == "fused" else lambda unit, device: None)
    return request.param


@DTYPES
@FORMATS
def test_inference(dtype, layout, way, launches):
    check_infer(unit(dtype, layout))
    assert launches == (["fused_kernel"] if way == "fused" else ["product_kernel", "expand_kernel"])


VARIANTS: dict[str, dict[str, Any]] = {
    "5x5": {"kernel": 5, "multiplier": 2, "activation": "gelu", "images": 1},
    "ratio 4": {"multiplier": 3, "activation": "hardswish", "cut": 2},
    "not spliced": {"multiplier": 2, "splice": False, "activation": "relu", "cut": 5},
    "cut to some primary maps": {"cut": 15, "activation": "relu6"},
    "stride and groups": {"stride": 2, "groups": 2, "activation": None},
    "biases alone": {"norm": False, "bias": True, "activation": "relu6"},
    "bias and norm": {"bias": True, "maps": 33, "channels": 8},
}


@pytest.mark.parametrize("variant", VARIANTS)
@FORMATS
def test_inference_options(variant, layout, way):
    check_infer(unit(F32, layout, **VARIANTS[variant]))


@pytest.mark.parametrize("activation", ops.ACTIVATION_CODES)
@FORMATS
def test_maps_of_another_convolution(activation, layout, launches):
    check_infer(unit(F32, layout, primary=False, activation=activation))
    assert launches == ["expand_kernel"]


SIZES = {
    "one pixel": (1, 1),
    "one row": (1, 9),
    "one column": (9, 1),
    "7 x 7": (7, 7),
    "wide": (2, 67),
    "16 x 32": (16, 32),
}


@pytest.mark.parametrize("size", SIZES)
@FORMATS
def test_sizes(size, layout, way):
    check_infer(unit(F32, layout, size=SIZES[size], images=3, maps=8, channels=16))


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p not in ("contiguous", "channels_last")])
def test_strided_input(placement):
    with checked():
        check_infer(unit(F32, placement, images=3, channels=6, maps=4, size=(5, 4)))


def test_empty_batch(launches):
    u = unit(images=0)
    assert u.infer().shape == (0, 24, 7, 9)
    trained = u.train()
    assert [tuple(t.shape) for t in trained] == [(0, 24, 7, 9), (0, 12, 7, 9), (2, 12), (2, 12)]
    grads = u.gradients(trained[0], trained)
    assert grads[0].shape == u.x.shape and all(not t.any() for t in grads)
    assert launches == []


def test_halo_is_zero_after_the_activation(way):
    """A positive shift makes relu(shift) of x = 0, but nothing of what lies outside the map."""
    u = unit(activation="relu")
    u.x.zero_()
    for t in (u.norm1[1], u.norm1[3]):
        t.fill_(3.0)
    u.norm1[2].zero_()
    check_infer(u)


@pytest.mark.parametrize("activation", ops.ACTIVATION_CODES)
def test_nan_passes(activation, way):
    u = unit(activation=activation, images=1, size=(5, 6))
    u.x[0, 3, 2, 2] = math.nan
    assert torch.equal(u.infer().isnan(), u.composed(torch.float64)[0].isnan())


# ---- training

TRAINING: dict[str, tuple[tuple[bool, bool], dict[str, Any]]] = {
    "usual": ((True, True), {}),
    "frozen": ((False, False), {"bias": True, "activation": "gelu"}),
    "no norm": ((False, False), {"bias": True, "norm": False, "activation": "hardswish"}),
    "cheap frozen, stride, groups": ((True, False), {"stride": 2, "groups": 2, "bias": True, "size": (10, 12)}),
    "primary frozen, ratio 3, cut": ((False, True), {"multiplier": 2, "cut": 3, "bias": True}),
    "5x5, not spliced": ((True, True), {"kernel": 5, "splice": False, "activation": None, "size": (6, 7), "maps": 5}),
    "maps of another convolution": ((True, True), {"primary": False, "maps": 17}),
    "many channels": ((True, True), {"channels": 40, "maps": 20, "size": (3, 3), "images": 4}),
}


@pytest.mark.parametrize("case", TRAINING)
@FORMATS
def test_training(case, layout):
    batch, options = TRAINING[case]
    check_training(unit(F32, layout, **options), batch)


@pytest.mark.parametrize("activation", [a for a in ops.ACTIVATION_CODES if a not in (None, "silu")])
def test_training_activations(activation):
    check_training(unit(F32, activation=activation, images=3, channels=6, maps=5, size=(6, 5)))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=name_of)
@FORMATS
def test_training_16_bits(dtype, layout):
    check_training(unit(dtype, layout, images=3, maps=8))


@pytest.mark.parametrize("placement", [p for p in PLACEMENTS if p not in ("one pixel", "one number", "contiguous")])
def test_strided_gradient(placement):
    check_training(unit(F32, images=3, channels=3, maps=2, size=(5, 4)), grad_placement=placement)


def test_launches_of_training(launches):
    u = unit(images=1, channels=3, maps=2)
    trained = u.train()
    assert launches == ["product_kernel", "expand_kernel", "expand_kernel"]
    launches.clear()
    grad = torch.randn_like(trained[0])
    u.gradients(grad, trained)
    assert launches == ["sums_kernel", "cheap_backward_kernel", "primary_backward_kernel", "reduce_kernel"]
    launches.clear()
    grad_x, grad_w1, *_ = u.gradients(grad, trained, need=(False, False))
    assert (
        launches == ["sums_kernel", "cheap_backward_kernel", "reduce_kernel"] and grad_x.numel() == grad_w1.numel() == 0
    )


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_only_one_of_the_primary_gradients(need):
    u = unit(images=1, channels=3, maps=2)
    trained = u.train()
    grad = torch.randn_like(trained[0])
    both, one = u.gradients(grad, trained), u.gradients(grad, trained, need=need)
    assert all(torch.equal(b, o) for b, o, n in zip(both, one, (*need, True, True, True), strict=True) if n)


def test_running_statistics_of_other_kinds():
    """Strided ones, float64, 16 bits, and a momentum of 0, which leaves them alone."""
    u = unit(images=3)
    strided = torch.zeros(24)[::2]
    u.norm1[2], u.norm1[3] = strided, u.norm1[3].double()
    u.norm2[2:] = [t.to(BF16) for t in u.norm2[2:]]
    before = [t.clone() for t in u.norm2[2:]]
    exact = u.composed(torch.float64, (True, True), (0.1, 0.0))[2]
    u.train(momentum=(0.1, 0.0))
    assert error(strided, exact[0][2]) <= 1e-5 and error(u.norm1[3], exact[0][3]) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(before, u.norm2[2:], strict=True))
    u.train(momentum=(0.1, 0.5))
    assert not torch.equal(before[0], u.norm2[2]) and u.norm2[2].dtype == BF16


@pytest.mark.parametrize(("batch", "momentum"), [((False, False), 0.1), ((True, True), 0.0)])
def test_frozen_statistics_keep_every_digit(batch, momentum):
    """Also where kernels read a copy of them, in another format."""
    u = unit(images=1)
    u.norm1[2:] = [t.double() + 1e-12 for t in u.norm1[2:]]
    u.norm2[2] = torch.randn(24)[::2]
    before = [t.clone() for t in (*u.norm1[2:], *u.norm2[2:])]
    u.train(batch, (momentum, momentum))
    assert all(map(torch.equal, before, (*u.norm1[2:], *u.norm2[2:])))


def test_statistics_of_values_far_from_zero():
    """Differences from the mean are summed, not squares: mean 1000, deviation 1 keeps its digits."""
    u = unit(primary=False, images=4, maps=3, activation=None)
    u.x.add_(1000)
    _, _, stats1, _ = u.train()
    values = u.x.double().transpose(0, 1).flatten(1)
    assert error(stats1[0], values.mean(1)) < 1e-6
    assert error(stats1[1], (values.var(1, correction=0) + 1e-5) ** -0.5) < 1e-5


# ---- memory


@pytest.mark.parametrize(
    "case", ["usual", "primary frozen, ratio 3, cut", "cheap frozen, stride, groups", "maps of another convolution"]
)
@FORMATS
def test_memory_of_training(case, layout):
    batch, options = TRAINING[case]
    with checked():
        check_training(unit(F32, layout, **{**options, "size": (7, 9)}), batch)


@pytest.mark.parametrize("variant", ["ratio 4", "cut to some primary maps", "stride and groups", "bias and norm"])
@FORMATS
def test_memory_of_inference(variant, layout, way):
    with checked():
        check_infer(unit(BF16, layout, **{**VARIANTS[variant], "activation": "silu"}))


# (file, operator, text, what replaces it, what the checker says)
PLANTED = {
    "no barrier before the cheap part": ("fused", "infer", "tl.debug_barrier()\n        for s", "pass\n        for s", "with no barrier between"),
    "no barrier before the next tile": ("fused", "infer", "element_ty), mask=mask)\n        tl.debug_barrier()", "element_ty), mask=mask)", "with no barrier between"),
    "halo stored too": ("fused", "infer", "kept_primary))[:, None] & own[None, :]", "kept_primary))[:, None] & inside[None, :]", "write one element"),
    "shared scratch": ("fused", "infer", "tl.program_id(0).to(tl.int64) * (BC * BP)", "0", "write one element"),
    "pixels beyond the batch": ("product", "train", "mask = ok[:, None] & inside[None, :]", "mask = ok[:, None] & (inside | (image >= 0))[None, :]", "outside"),
    "every cheap map writes the primary one": ("expand", "train", " & (s == 0))[:, None]", ")[:, None]", "write one element"),
    "no barrier before dz is read": ("cheap_backward", "backward", "tl.debug_barrier()\n            v = ", "v = ", "with no barrier between"),
    "no barrier before coefficients are read": ("primary_backward", "backward", "    tl.debug_barrier()\n    for tile", "    for tile", "with no barrier between"),
    "shared coefficients": ("primary_backward", "backward", "program.to(tl.int64) * 4 * maps", "0", "write one element"),
    "weight parts of one slot": ("primary_backward", "backward", "slot.to(tl.int64) * maps * groups + row", "row", "write one element"),
    "gradient beyond the batch": ("primary_backward", "backward", "mask=ok[:, None] & inside[None, :])", "mask=ok[:, None] & (x_pixel >= 0)[None, :])", "store outside"),
    "gradient read beyond the map": ("cheap_backward", "backward", "cheap < kept_cheap))[:, None] & inside[None, :]", "cheap < kept_cheap))[:, None]", "load outside"),
    "no barrier before the next dz": ("cheap_backward", "backward", "            tl.debug_barrier()\n        v = ", "        v = ", "with no barrier between"),
}  # fmt: skip
KERNELS = {
    "fused": (forward, "fused_kernel"),
    "product": (forward, "product_kernel"),
    "expand": (forward, "expand_kernel"),
    "cheap_backward": (backward, "cheap_backward_kernel"),
    "primary_backward": (backward, "primary_backward_kernel"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_are_caught(bug, tmp_path, monkeypatch):
    name, operator, text, replacement, message = PLANTED[bug]
    source = (Path(host.__file__).parent / f"{name}.py").read_text()
    assert source.count(text) == 1
    broken = tmp_path / f"{name}_broken.py"
    broken.write_text(source.replace(text, replacement))
    spec = importlib.util.spec_from_file_location(f"{backend.__name__}.{name}_broken", broken)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launcher, kernel = KERNELS[name]
    monkeypatch.setattr(launcher, kernel, getattr(module, kernel))
    monkeypatch.setattr(config, "inference", lambda unit, device: config._fused(unit)[0])
    u = unit(images=3, maps=8, multiplier=2, size=(15, 17), channels=8)
    trained = u.train() if operator == "backward" else ()
    run = getattr(u, "infer" if operator == "infer" else "train")
    if operator == "backward":
        run = lambda: u.gradients(torch.randn_like(trained[0]), trained)  # noqa: E731
    with checked(), pytest.raises(Violation, match=message):
        run()


# ---- from the public functions


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.BACKENDS.get("triton", backend.Triton()))
    with backends.use("triton"):
        yield


MODULES = {"1x1": {}, "3x3 primary": {"kernel_size": 3}, "stride, ratio 3": {"stride": 2, "ratio": 3}}


@pytest.mark.parametrize("case", MODULES)
def test_module_trains(case, registered):
    reference = FeatureAugment(6, 10, activation="silu", **MODULES[case])
    fused = FusedFiF.from_reference(reference)
    x = torch.randn(3, 6, 7, 6)
    grad = torch.randn_like(copy.deepcopy(reference)(x))
    check_module(reference, fused, x, grad)


def test_module_trains_in_one_graph(registered):
    reference = FeatureAugment(4, 6, activation="silu")
    fused = FusedFiF.from_reference(reference)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 5, 4)
    check_module(reference, compiled, x, torch.randn(3, 6, 5, 4))


def check_module(reference, fused, x, grad) -> None:
    exact = copy.deepcopy(reference).double()
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    outs = [fused(leaves[0]), exact(leaves[1])]
    for out in outs:
        out.backward(grad.to(out.dtype))
    assert error(outs[0], outs[1]) <= 1e-5 and error(leaves[0].grad, leaves[1].grad) <= 1e-5
    wanted = dict(exact.named_parameters())
    for name, parameter in fused.named_parameters():
        assert error(parameter.grad, wanted[name.removeprefix("_orig_mod.")].grad) <= 1e-5, name
    for buffer, other in zip(fused.buffers(), exact.buffers(), strict=True):
        assert error(buffer, other) <= 1e-5


def test_tuning_keeps_the_fastest_that_is_right(monkeypatch):
    times = iter(range(100, 0, -1))  # each candidate is faster than the one before
    monkeypatch.setattr(tune, "milliseconds", lambda run, rounds, flush: float(next(times)))
    shape = tune.Shape(8, 8, 5, 2, F32, True)
    known: dict[str, int] = {}
    inputs = tune.random_inputs(shape, torch.device("cpu"))
    tune.measure(shape, inputs, 1, torch.empty(0), known)
    assert len(known) == 5 and max(known.values()) > 0
    x = torch.empty(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    u = host.unit_of(x, torch.empty(8, 8, 1, 1), torch.empty(8, 1, 3, 3), 16, 4, True, 1, 1, False)
    assert all(known[config.bucket(k, u)] == config.candidate_count(k, u) - 1 for k in ("infer", *config.CANDIDATES))
    monkeypatch.setattr(tune, "wrong", lambda *_: True)
    with pytest.raises(RuntimeError, match="gives the right result"):
        tune.measure(shape, inputs, 1, torch.empty(0), {})


@pytest.fixture(autouse=True)
def rules_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("FIF_OPS_CACHE", str(tmp_path / "none.json"))
    config.reset()
    yield
    monkeypatch.undo()
    config.reset()


# ---- operators


OPCHECKS = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("layout", [*LAYOUTS][:4])
def test_opcheck(layout):
    u = unit(F32, layout, images=2, channels=3, maps=2, size=(4, 3), cut=1)
    named = {"stride": 1, "groups": 1, "tf32": False}
    operators = torch.ops.fif_ops_triton
    torch.library.opcheck(operators.infer.default, (*u.tensors, *u.options), named, test_utils=OPCHECKS)
    arguments = (*u.tensors, *u.options, True, True, 0.1, 0.2)
    torch.library.opcheck(operators.train.default, arguments, named, test_utils=OPCHECKS)
    out, raw, stats1, stats2 = u.train()
    arguments = (torch.randn_like(out), u.x, u.w1, u.w2, raw, stats1, stats2, *u.norm1[:2], *u.norm2[:2])
    arguments += (4, True, True, True, True, True)
    torch.library.opcheck(operators.backward.default, arguments, named, test_utils=OPCHECKS)


def test_compiled_graph_has_no_breaks():
    u = unit(channels=3, maps=2, size=(4, 5), stride=2, images=1)
    compiled = torch.compile(lambda: u.infer() * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), u.infer() * 2)


def test_bad_arguments_are_refused():
    u = unit()
    for change, message in (
        ({"x": u.x.double()}, "float32, bfloat16 or float16"),
        ({"w2": u.w2[:, :, :1, :1]}, "d must be 3 or 5"),
        ({"w2": u.w2[:-1]}, "cheap_weight must be"),
        ({"w1": u.w1[:, :-1]}, "primary_weight must be"),
        ({"groups": 3}, "groups is 3"),
        ({"stride": 0}, "stride is 0"),
        ({"out_channels": 25}, "out_channels is 25"),
        ({"norm1": [u.norm1[0][:-1], *u.norm1[1:]]}, "must have 12 values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            u._replace(**change).infer()

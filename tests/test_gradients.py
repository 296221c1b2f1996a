"""What autograd users do: second derivatives, frozen parameters, checkpointing, autocast, in-place changes."""

import itertools

import pytest
import torch
from support import Problem, name_of, place, randomise, results
from torch import nn
from torch.utils.checkpoint import checkpoint

from fif_ops import FeatureAugment, FusedFiF, autograd, backends, feature_augment, functional

pytestmark = pytest.mark.usefixtures("one_thread")
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
both_modes = pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])

UNITS = {
    "relu": {"activation": "relu"},
    "relu6, ratio 3": {"activation": "relu6", "ratio": 3, "out_channels": 8},
    "hardswish, d 5": {"activation": "hardswish", "cheap_kernel_size": 5},
    "silu, cut": {"activation": "silu", "out_channels": 5},
    "gelu, not spliced": {"activation": "gelu", "splice": False},
    "linear, d 1": {"activation": None, "cheap_kernel_size": 1},
    "bias, no norm": {"activation": "silu", "norm": None, "bias": True},
    "bias": {"activation": "silu", "bias": True},
}
every_unit = pytest.mark.parametrize("unit", UNITS)


def make(training=True, kind=FusedFiF, dtype=torch.float32, **options):
    unit = randomise(kind(**{"in_channels": 3, "out_channels": 6, **options}))
    return unit.to(dtype).train(training)


def tensors_of(unit, x):
    """x and the parameters as leaves, and the unit as a function of them alone."""
    names = [name for name, _ in unit.named_parameters()]
    buffers = dict(unit.named_buffers())

    def function(x, *parameters):
        fresh = {name: buffer.clone() for name, buffer in buffers.items()}
        return torch.func.functional_call(unit, {**fresh, **dict(zip(names, parameters, strict=True))}, (x,))

    leaves = [x.detach().requires_grad_(), *(p.detach().clone().requires_grad_() for p in unit.parameters())]
    return function, leaves


@pytest.fixture
def kernels_alone(monkeypatch):
    """Neither forward nor backward may go through the composition."""

    def refuse(*_arguments, **_options):
        raise AssertionError("ran the composition")

    monkeypatch.setattr(functional, "compose", refuse)
    monkeypatch.setattr(autograd, "compose", refuse)


# ---- first and second derivatives


@both_layouts
@both_modes
@every_unit
def test_gradcheck_of_the_kernels(kernels_alone, unit, training, layout):
    function, leaves = tensors_of(
        make(training, dtype=torch.float64, **UNITS[unit]), place(torch.randn(2, 3, 4, 3, dtype=torch.float64), layout)
    )
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("frozen", ["primary_conv", "cheap_operation"])
def test_gradcheck_with_one_normalisation_frozen(kernels_alone, frozen):
    unit = make(dtype=torch.float64, activation="silu", bias=True)
    unit.get_submodule(frozen)[1].eval()
    assert torch.autograd.gradcheck(*tensors_of(unit, torch.randn(2, 3, 4, 3, dtype=torch.float64)))


@both_modes
@every_unit
def test_gradgradcheck(unit, training):
    function, leaves = tensors_of(
        make(training, dtype=torch.float64, **UNITS[unit]), torch.randn(2, 3, 3, 2, dtype=torch.float64)
    )
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradgradcheck_with_one_normalisation_frozen():
    for frozen in ("primary_conv", "cheap_operation"):
        unit = make(dtype=torch.float64, activation="silu", bias=True)
        unit.get_submodule(frozen)[1].eval()
        assert torch.autograd.gradgradcheck(*tensors_of(unit, torch.randn(2, 3, 3, 2, dtype=torch.float64)))


@both_layouts
@both_modes
def test_penalty_on_the_gradient(training, layout):
    """Double backward through a unit that is applied twice, so that its weights count on two ways."""
    plain = make(training, FeatureAugment, torch.float64, in_channels=6, activation="silu")
    found = []
    for unit in (plain, FusedFiF.from_reference(plain)):
        x = place(torch.randn(3, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), layout)
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(unit(unit(x)).square().sum(), x, create_graph=True)
        (slope.square().mean() + unit(x).mean()).backward()
        found.append([slope.detach(), x.grad, *(p.grad for p in unit.parameters())])
    for ours, wanted in zip(found[1], found[0], strict=True):
        assert (ours - wanted).norm() <= 1e-9 * wanted.norm()


def test_first_gradients_are_the_same_with_and_without_a_second():
    for training in (True, False):
        function, leaves = tensors_of(make(training, activation="gelu"), torch.randn(3, 3, 5, 4))
        plain = torch.autograd.grad(function(*leaves).square().sum(), leaves)
        again = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        for one, other in zip(plain, again, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-4, atol=1e-4)


# ---- which gradients are wanted


@both_modes
def test_every_choice_of_frozen_tensors(training):
    unit = make(training, bias=True, activation="silu")
    x = torch.randn(3, 3, 5, 4)
    grad = torch.randn(3, 6, 5, 4)
    buffers = {name: buffer.clone() for name, buffer in unit.named_buffers()}
    names = ["x", *(name for name, _ in unit.named_parameters())]

    def gradients(wanted):
        unit.load_state_dict(buffers, strict=False)
        leaf = x.clone().requires_grad_("x" in wanted)
        for name, parameter in unit.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in wanted)
        unit(leaf).backward(grad)
        return [leaf.grad, *(p.grad for p in unit.parameters())]

    everything = dict(zip(names, gradients(names), strict=True))
    assert all(gradient is not None for gradient in everything.values())
    choices = [set(choice) for size in (1, 2, len(names) - 1) for choice in itertools.combinations(names, size)]
    for wanted in choices:
        for name, gradient in zip(names, gradients(wanted), strict=True):
            if name in wanted:
                assert torch.equal(gradient, everything[name]), (name, wanted)
            else:
                assert gradient is None, (name, wanted)


def test_nothing_wants_a_gradient():
    unit = make().requires_grad_(False)
    assert not unit(torch.randn(2, 3, 4, 4)).requires_grad
    with torch.no_grad():
        assert not make()(torch.randn(2, 3, 4, 4)).requires_grad
    with torch.inference_mode():
        assert make()(torch.randn(2, 3, 4, 4)).is_inference()


@pytest.mark.parametrize("norm", ["batch", None])
def test_biases_in_front_of_batch_statistics_get_zero(norm):
    unit = make(bias=True, norm=norm, activation="silu")
    unit(torch.randn(3, 3, 5, 4)).sum().backward()
    for stage in (unit.primary_conv, unit.cheap_operation):
        assert stage[0].bias.grad.shape == stage[0].bias.shape
        assert bool(stage[0].bias.grad.any()) == (norm is None)


# ---- graphs


def test_backward_twice():
    unit = make(activation="silu")
    x = torch.randn(3, 3, 5, 4, requires_grad=True)
    out = unit(x)
    grad = torch.randn_like(out)
    leaves = [x, *unit.parameters()]
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    second = torch.autograd.grad(out, leaves, grad)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, grad)


def test_gradients_accumulate_and_are_zeroed_in_place():
    unit = make(activation="silu").eval()
    x = torch.randn(3, 3, 5, 4)
    unit(x).sum().backward()
    once = [p.grad.clone() for p in unit.parameters()]
    unit(x).sum().backward()
    for parameter, gradient in zip(unit.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    unit.zero_grad(set_to_none=False)
    unit(x).sum().backward()
    for parameter, gradient in zip(unit.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


CHANGED = {
    "input": lambda unit, x: x,
    "primary weight": lambda unit, x: unit.primary_conv[0].weight,
    "cheap weight": lambda unit, x: unit.cheap_operation[0].weight,
    "scale of the primary normalisation": lambda unit, x: unit.primary_conv[1].weight,
    "shift of the cheap normalisation": lambda unit, x: unit.cheap_operation[1].bias,
}


@both_modes
@pytest.mark.parametrize("changed", CHANGED)
def test_in_place_change_before_backward_is_detected(changed, training):
    unit = make(training)
    x = torch.randn(2, 3, 4, 4)
    unit(x)
    out = unit(x)
    with torch.no_grad():
        CHANGED[changed](unit, x).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_output_and_running_statistics_may_change_before_backward():
    """Neither is read again; a second forward changes the statistics between the first one and its backward."""
    unit = make(activation="relu")
    x = torch.randn(2, 3, 4, 4)
    plain = torch.autograd.grad(unit(x).sum(), list(unit.parameters()))
    out = unit(x)
    unit(2 * x)
    changed = torch.autograd.grad(out.mul_(1).add_(1).sum(), list(unit.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, changed, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    found = []
    plain = make(kind=FeatureAugment, dtype=torch.float64)
    for unit in (plain, FusedFiF.from_reference(plain)):
        x = torch.linspace(-2, 2, 120, dtype=torch.float64).view(2, 3, 4, 5).requires_grad_()
        checkpoint(unit, x, use_reentrant=reentrant).square().sum().backward()
        found.append([x.grad, *(p.grad for p in unit.parameters()), *unit.buffers()])
    for wanted, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)


def test_anomaly_mode_and_saved_tensors_on_disk(tmp_path):
    unit = make(activation="silu").eval()
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(unit(x).sum(), x)
    names = itertools.count()

    def pack(tensor):
        path = tmp_path / str(next(names))
        torch.save(tensor, path)
        return path

    with (
        torch.autograd.set_detect_anomaly(True, check_nan=True),
        torch.autograd.graph.saved_tensors_hooks(pack, torch.load),
    ):
        assert torch.equal(torch.autograd.grad(unit(x).sum(), x)[0], plain)


# ---- function transforms: not there, and said so


def test_vmap_without_gradients():
    unit = make(training=False)
    x = torch.randn(4, 2, 3, 5, 5)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(unit)(x), torch.stack([unit(part) for part in x]))


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda t: f(t[None]).sum()))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_function_transforms_want_the_reference(transform):
    """The kernels refuse them in torch's words; on the reference path they work."""
    unit = make(training=False, activation="silu")
    x = torch.randn(2, 3, 5, 5)
    with pytest.raises(RuntimeError, match="setup_context"):
        TRANSFORMS[transform](unit, x)
    plain = unit.to_reference()
    with backends.use("reference"):
        torch.testing.assert_close(TRANSFORMS[transform](unit, x), TRANSFORMS[transform](plain, x))


def test_forward_mode_is_refused():
    unit = make(training=False)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((RuntimeError, NotImplementedError), match=r"forward AD|jvp"),
    ):
        unit(torch.autograd.forward_ad.make_dual(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)))


# ---- autocast


def relative(one, other):
    return ((one.double() - other.double()).norm() / other.double().norm().clamp_min(1e-30)).item()


@both_layouts
@both_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("given", [torch.float32, "lower"], ids=str)
def test_autocast(given, dtype, training, layout):
    """Output in autocast's dtype; float32 gradients of float32 parameters; no worse than the reference under autocast."""
    chosen = Problem(6, 11, 2, 3, True, "silu", "batch", True, 3, 7, 5, placement=layout)
    plain = chosen.training_unit() if training else chosen.unit().eval()
    x = chosen.input(dtype if given == "lower" else given)
    grad = chosen.gradient(dtype)
    wanted = results(FeatureAugment._copy_of(plain).double(), x.double(), grad.double())
    found = []
    for unit in (FeatureAugment._copy_of(plain), FusedFiF.from_reference(plain)):
        with torch.autocast("cpu", dtype=dtype):
            leaf = x.detach().requires_grad_()
            out = unit(leaf)
            assert unit(leaf.detach()).dtype == dtype
        out.backward(grad)
        found.append({"output": out.detach(), "gradient of x": leaf.grad})
        found[-1].update((f"gradient of {name}", p.grad) for name, p in unit.named_parameters())
    reference, ours = found
    for name, tensor in reference.items():
        assert ours[name].dtype == tensor.dtype, name
        if name.endswith(".0.bias") and training:
            assert not ours[name].any()
            continue
        assert relative(ours[name], wanted[name]) <= max(1e-2, 2 * relative(tensor, wanted[name])), name
    for name, parameter in plain.named_parameters():
        assert ours[f"gradient of {name}"].dtype == parameter.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_autocast_runs_the_kernels_and_can_be_switched_off(kernels_alone, dtype):
    unit = make(training=False)
    x = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", dtype=dtype):
        assert unit(x).dtype == dtype
        with torch.autocast("cpu", enabled=False):
            assert unit(x).dtype == torch.float32
        assert unit.double()(x.double()).dtype == torch.float64


REFUSED_UNDER_AUTOCAST = {
    "integers": (torch.int64, torch.float32),
    "complex": (torch.complex64, torch.float32),
    "float64 weights": (torch.float32, torch.float64),
    "float64 input": (torch.float64, torch.float32),
}


@pytest.mark.parametrize("mix", REFUSED_UNDER_AUTOCAST)
def test_autocast_casts_only_what_torch_would(mix):
    """Whatever the reference refuses under autocast is no silent cast here either."""
    x_dtype, weight_dtype = REFUSED_UNDER_AUTOCAST[mix]
    x = torch.ones(2, 3, 4, 4).to(x_dtype)
    plain = make(False, FeatureAugment, weight_dtype)
    for unit in (plain, FusedFiF.from_reference(plain)):
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises((TypeError, ValueError, RuntimeError)):
            unit(x)


# ---- 16-bit models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("norms", ["same", "float32"])
def test_models_cast_as_a_whole_or_but_for_normalisation(dtype, norms):
    plain = make(kind=FeatureAugment, activation="silu").to(dtype)
    if norms == "float32":
        for stage in (plain.primary_conv, plain.cheap_operation):
            stage[1].float()
    unit = FusedFiF.from_reference(plain)
    x = torch.randn(4, 3, 6, 5).to(dtype).requires_grad_()
    optimiser = torch.optim.SGD(unit.parameters(), lr=0.1)
    before = {name: tensor.clone() for name, tensor in unit.state_dict().items()}
    out = unit(x)
    out.sum().backward()
    optimiser.step()
    assert out.dtype == x.grad.dtype == dtype
    for name, tensor in unit.state_dict().items():
        assert tensor.dtype == before[name].dtype == plain.state_dict()[name].dtype
        assert not torch.equal(tensor, before[name]), name
    assert all(p.grad.dtype == p.dtype for p in unit.parameters())


def test_functional_form_differentiates_through_tensors_made_from_others():
    """Weights that are no leaves, one of them expanded: their gradients flow on to what they were made of."""
    base = torch.randn(3, 1, 1, requires_grad=True)
    kernel = torch.randn(1, 1, 3, 3, requires_grad=True)
    x = torch.randn(2, 3, 4, 5)
    found = []
    for backend in ("reference", "cpu"):
        out = feature_augment(
            x, torch.sin(base).expand(4, 3, 1, 1), kernel.expand(8, 1, 3, 3), activation="silu", backend=backend
        )
        found.append(torch.autograd.grad(out.square().sum(), [base, kernel]))
    for wanted, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_gradients_own_their_values():
    """What one parameter's gradient holds is not changed with another's, nor by the next backward pass."""
    unit = make(activation="silu").eval()
    x = torch.randn(3, 3, 5, 4, requires_grad=True)
    leaves = [x, *unit.parameters()]
    first = torch.autograd.grad(unit(x).sum(), leaves)
    kept = [gradient.clone() for gradient in first]
    torch.autograd.grad(unit(2 * x).sum(), leaves)
    for index, gradient in enumerate(first):
        others = [g for i, g in enumerate(first) if i != index]
        expected = [g.clone() for g in others]
        gradient.add_(1)
        assert all(torch.equal(one, other) for one, other in zip(others, expected, strict=True))
        torch.testing.assert_close(gradient - 1, kept[index], rtol=1e-5, atol=1e-5)


def test_modules_around_a_unit_see_ordinary_gradients():
    """In the middle of a network, with something else in front and behind."""
    found = []
    for fused in (False, True):
        torch.manual_seed(1)
        unit = make(kind=FusedFiF if fused else FeatureAugment, in_channels=4, out_channels=7, dtype=torch.float64)
        torch.manual_seed(2)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), unit, nn.MaxPool2d(2), nn.Conv2d(7, 2, 1), nn.Flatten()).double()
        x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        net(x).logsumexp(1).sum().backward()
        found.append([p.grad for p in net.parameters()])
    for wanted, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)

"""FusedFiF is FeatureAugment: results, gradients, state, and everything that people do to modules."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from fif_ops import FeatureAugment, FusedFiF

UNITS = {
    "plain": {},
    "no activation": {"activation": None},
    "silu": {"activation": "silu"},
    "odd out": {"out_channels": 11},
    "ratio 3, d 5": {"ratio": 3, "cheap_kernel_size": 5},
    "not spliced": {"splice": False},
    "bias": {"bias": True},
    "no norm": {"norm": None, "bias": True},
    "shared": {"shared": True},
    "matrices": {"matrix_channels": 2, "shared": True},
    "3x3 stride 2 groups": {"kernel_size": 3, "stride": 2, "groups": 2},
}

# What may be done to a normalisation layer before use.
NORMS = {
    "usual": {},
    "cumulative": {"momentum": None},
    "momentum": {"momentum": 0.7, "eps": 1e-2},
    "untracked": {"track_running_stats": False},
    "not affine": {"affine": False},
    "cumulative, untracked": {"momentum": None, "track_running_stats": False},
}


def make(norm_options=None, **arguments):
    """A reference unit with random state, its normalisations made with ``norm_options``."""
    unit = FeatureAugment(**{"in_channels": 6, "out_channels": 12, **arguments})
    for stage in (unit.primary_conv, unit.cheap_operation):
        if isinstance(stage[1], nn.BatchNorm2d):
            stage[1] = nn.BatchNorm2d(stage[1].num_features, **(norm_options or {}))
    for name, tensor in (*unit.named_parameters(), *unit.named_buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5) if "running_var" in name else tensor.data.normal_()
    return unit


def relative(one, other):
    return ((one - other).norm() / other.norm().clamp_min(1e-30)).item()


def check_same_state(fused, plain):
    assert list(fused.state_dict()) == list(plain.state_dict())
    for (name, one), other in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def normalises_by_batch(norm):
    return isinstance(norm, nn.BatchNorm2d) and (norm.training or norm.running_mean is None)


def check_same(fused, plain, x, tolerance=1e-5):
    """Equal results, gradients of the input and of all parameters, and state afterwards."""
    results = []
    for unit in (fused, plain):
        unit.zero_grad()
        leaf = x.detach().clone().requires_grad_()
        out = unit(leaf)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (out * weights).sum().backward()
        results.append((out.detach(), leaf.grad))
    (out, grad), (expected, expected_grad) = results
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    assert relative(out, expected) <= tolerance
    assert relative(grad, expected_grad) <= 10 * tolerance
    total = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None).sqrt()
    for (name, one), other in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if other.grad is not None:
            # Of a bias in front of batch statistics the gradient is zero, and the reference's is rounding.
            stage, _, what = name.partition(".")
            zero = what == "0.bias" and normalises_by_batch(fused.get_submodule(stage)[1])
            expected = torch.zeros_like(other.grad) if zero else other.grad
            assert (one.grad - expected).norm() <= 10 * tolerance * (expected.norm() + 1e-2 * total), name
    check_same_state(fused, plain)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("unit", UNITS)
def test_same_as_reference(unit, training):
    plain = make(**UNITS[unit]).train(training)
    check_same(FusedFiF.from_reference(plain), plain, torch.randn(3, 6, 7, 5))


@pytest.mark.parametrize("cheap", NORMS)
@pytest.mark.parametrize("primary", NORMS)
def test_normalisation_as_torch_does_over_steps_and_switches(primary, cheap):
    plain = make(norm_options=NORMS[primary])
    plain.cheap_operation[1] = nn.BatchNorm2d(6, **NORMS[cheap])
    fused = FusedFiF.from_reference(plain)
    for training in (True, True, False, True, False):
        fused.train(training)
        plain.train(training)
        check_same(fused, plain, torch.randn(4, 6, 5, 6) + 1)


@pytest.mark.parametrize("frozen", ["primary_conv", "cheap_operation"])
def test_one_normalisation_frozen(frozen):
    plain = make().train()
    plain.get_submodule(frozen)[1].eval()
    check_same(FusedFiF.from_reference(plain), plain, torch.randn(4, 6, 5, 6))


def test_tracking_switched_off_later():
    plain = make().train()
    for stage in (plain.primary_conv, plain.cheap_operation):
        stage[1].track_running_stats = False
    fused = FusedFiF.from_reference(plain)
    for training in (True, False):
        fused.train(training)
        plain.train(training)
        check_same(fused, plain, torch.randn(4, 6, 5, 6))


@pytest.mark.parametrize("norm", NORMS)
def test_one_value_per_channel(norm):
    """Refused in training as torch does, in its words, and without counting a batch that was not normalised."""
    plain = make(norm_options=NORMS[norm])
    fused = FusedFiF.from_reference(plain)
    x = torch.randn(1, 6, 1, 1)
    for unit in (fused, plain):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            unit.train()(x)
    plain = make(norm_options=NORMS[norm]).eval()
    fused = FusedFiF.from_reference(plain)
    if plain.primary_conv[1].track_running_stats:
        check_same(fused, plain, x)
    else:
        for unit in (fused, plain):
            with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
                unit(x)


def test_failed_call_changes_no_state():
    fused = FusedFiF.from_reference(make().train())
    before = copy.deepcopy(fused.state_dict())
    for bad in (torch.randn(1, 6, 1, 1), torch.randn(2, 5, 4, 4), torch.randn(6, 4, 4)):
        with pytest.raises((ValueError, RuntimeError)):
            fused(bad)
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize("training", [True, False])
def test_empty_batch(training):
    plain = make().train(training)
    fused = FusedFiF.from_reference(plain)
    for unit in (fused, plain):
        x = torch.randn(0, 6, 5, 4, requires_grad=True)
        out = unit(x)
        out.sum().backward()
        assert out.shape == (0, 12, 5, 4)
        assert x.grad.shape == x.shape
        assert all(not p.grad.any() for p in unit.parameters())
    if not training:
        check_same_state(fused, plain)


@pytest.mark.parametrize("unit", UNITS)
def test_conversion_both_ways_copies_everything(unit):
    plain = make(norm_options=NORMS["momentum"], **UNITS[unit]).double().eval()
    plain.primary_conv.train()
    plain.cheap_operation[0].weight.requires_grad_(False)
    before = torch.random.get_rng_state()
    fused = FusedFiF.from_reference(plain)
    again = fused.to_reference()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (type(fused), type(again)) == (FusedFiF, FeatureAugment)
    for twin in (fused, again):
        assert twin.config() == plain.config()
        assert [m.training for m in twin.modules()] == [m.training for m in plain.modules()]
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in plain.parameters()]
        check_same_state(twin, plain)
        tensors = zip(twin.state_dict().values(), plain.state_dict().values(), strict=True)
        assert all(one.dtype == other.dtype and one.data_ptr() != other.data_ptr() for one, other in tensors)
    assert str(fused).replace("FusedFiF", "FeatureAugment") == str(plain)


def test_conversion_wants_a_unit():
    with pytest.raises(TypeError, match="unit is a Conv2d: must be a FeatureAugment"):
        FusedFiF.from_reference(nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize("unit", UNITS)
def test_checkpoints_both_ways(unit):
    plain, fused = make(**UNITS[unit]).eval(), FusedFiF(**{"in_channels": 6, "out_channels": 12, **UNITS[unit]}).eval()
    x = torch.randn(2, 6, 5, 5)
    fused.load_state_dict(plain.state_dict())
    assert relative(fused(x), plain(x)) < 1e-5
    nn.init.normal_(fused.primary_conv[0].weight)
    assert relative(fused(x), plain(x)) > 1e-3
    plain.load_state_dict(fused.state_dict())
    assert relative(fused(x), plain(x)) < 1e-5


def swap_norm(unit):
    unit.cheap_operation[1] = nn.SyncBatchNorm.convert_sync_batchnorm(unit.cheap_operation[1])


def double_input(unit):
    unit.primary_conv.register_forward_pre_hook(lambda _m, args: (2 * args[0],))


def own_forward(unit):
    conv = unit.primary_conv[0]
    conv.forward = lambda x: 3 * nn.Conv2d.forward(conv, x)


CHANGES = {
    "spectral norm": (lambda u: parametrizations.spectral_norm(u.primary_conv[0]), "primary_conv.0 is a Parametrized"),
    "weight norm": (lambda u: parametrizations.weight_norm(u.cheap_operation[0]), "cheap_operation.0 is a Parametriz"),
    "pruning": (lambda u: prune.l1_unstructured(u.primary_conv[0], "weight", 0.5), "primary_conv.0 has hooks"),
    "synchronised": (swap_norm, "cheap_operation.1 is a SyncBatchNorm, not a BatchNorm2d"),
    "forward hook": (
        lambda u: u.cheap_operation[2].register_forward_hook(lambda _m, _i, out: -out),
        "_operation.2 has",
    ),
    "pre hook": (double_input, "primary_conv has hooks"),
    "backward hook": (
        lambda u: u.primary_conv[1].register_full_backward_hook(lambda _m, grads, _o: (2 * grads[0],)),
        "primary_conv.1 has hooks",
    ),
    "own forward": (own_forward, "primary_conv.0 has a forward of its own"),
    "activation": (lambda u: u.primary_conv.__setitem__(2, nn.Tanh()), "primary_conv.2 is a Tanh, not a ReLU"),
    "no activation": (lambda u: u.primary_conv.__delitem__(2), "primary_conv has 2 parts"),
    "dilation": (
        lambda u: u.cheap_operation.__setitem__(0, nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6)),
        "cheap_operation.0 has other settings",
    ),
    "padding mode": (lambda u: setattr(u.cheap_operation[0], "padding_mode", "reflect"), "other settings"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules_run_one_by_one(change):
    """Hooks, parametrisations and replacements keep their effect, and the reason is told."""
    alter, reason = CHANGES[change]
    plain = make().eval()
    fused = FusedFiF.from_reference(plain)
    assert fused._fallback_reason() is None
    for unit in (fused, plain):
        torch.manual_seed(1)
        alter(unit)
    fused.eval()
    plain.eval()
    assert reason in fused._fallback_reason()
    x = torch.randn(2, 6, 5, 5)
    check_same(fused, plain, x)
    assert relative(fused(x), plain(x)) == 0


def test_tanh_gelu_is_noticed():
    fused = FusedFiF(6, 12, activation="gelu")
    assert fused._fallback_reason() is None
    fused.primary_conv[2] = nn.GELU("tanh")
    assert "approximates gelu by tanh" in fused._fallback_reason()


def test_replacements_that_fit_stay_fused():
    """Normalisation folded into the convolutions, as tools for inference do it."""
    plain = make().eval()
    fused = FusedFiF.from_reference(plain)
    for stage in (fused.primary_conv, fused.cheap_operation):
        stage[0] = nn.utils.fusion.fuse_conv_bn_eval(stage[0], stage[1])
        stage[1] = nn.Identity()
    assert fused._fallback_reason() is None
    x = torch.randn(2, 6, 5, 5)
    assert relative(fused(x), plain(x)) < 1e-5


def test_tensors_in_place_of_parameters():
    plain = make().eval()
    fused = FusedFiF.from_reference(plain)
    x = torch.randn(2, 6, 5, 5)
    state = {key: value + 0.1 for key, value in plain.state_dict().items() if value.is_floating_point()}
    swapped = torch.func.functional_call(fused, state, (x,))
    assert relative(swapped, torch.func.functional_call(plain, state, (x,))) < 1e-5
    for unit in (fused, plain):
        for part in (unit.primary_conv[0], unit.primary_conv[1]):
            weight = part.weight.detach() * 2
            del part.weight
            part.weight = weight
        mean = unit.primary_conv[1].running_mean + 1
        del unit.primary_conv[1].running_mean
        unit.primary_conv[1].running_mean = mean
    assert relative(fused(x), plain(x)) < 1e-5


def test_casting_and_copying_need_no_refresh():
    fused = FusedFiF.from_reference(make().eval())
    x = torch.randn(2, 6, 5, 5)
    expected = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), expected)
        assert twin._fallback_reason() is None
    assert relative(fused.double()(x.double()), expected.double()) < 1e-5
    assert relative(fused.bfloat16()(x.bfloat16()).float(), expected) < 3e-2


@pytest.mark.parametrize("training", [True, False])
def test_traced_whole_by_the_compiler_front_end(training):
    plain = make().train(training)
    fused = FusedFiF.from_reference(plain)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 7, 5)
    assert relative(compiled(x), plain(x)) < 1e-5
    check_same_state(fused, plain)

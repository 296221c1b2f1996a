"""What a unit keeps between calls never outlives what it was made from."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from fif_ops import FeatureAugment, FusedFiF, backends, ops
from fif_ops.prepared import PreparedTraining

pytestmark = [
    pytest.mark.skipif(not ops.LOADED, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]
X = torch.randn(2, 6, 5, 5)


def pair(*args, **kwargs):
    """A fused unit that has become a chain, and the plain unit with the same values."""
    torch.manual_seed(0)
    plain = FeatureAugment(*(args or (6, 20)), **kwargs).eval()
    fused = FusedFiF.from_reference(plain)
    with torch.inference_mode():
        fused(X), fused(X)
    assert is_chain(fused)
    return fused, plain


def is_chain(fused):
    return fused._prepared.operator == ops.at_once("follow")


def agree(fused, plain, x=X):
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-5)


def scale_data(unit):
    unit.primary_conv[0].weight.data.mul_(3.0)


def scale_in_place(unit):
    with torch.no_grad():
        unit.cheap_operation[0].weight.mul_(-2.0)


def swap_two(unit):
    flat = unit.primary_conv[0].weight.data.flatten()
    flat[0], flat[16] = flat[16].item(), flat[0].item()


def replace_parameter(unit):
    unit.primary_conv[1].weight = nn.Parameter(torch.full((10,), 0.3))


def point_elsewhere(unit):
    unit.primary_conv[1].bias.data = torch.full((10,), 0.7)


def move_statistics(unit):
    unit.cheap_operation[1].running_mean.data.add_(1.0)


def replace_buffer(unit):
    unit.cheap_operation[1].running_var = torch.full((10,), 4.0)


def load(unit):
    unit.load_state_dict({name: value * 0.5 for name, value in unit.state_dict().items()})


def change_eps(unit):
    unit.primary_conv[1].eps = 0.5


def other_activation(unit):
    unit.primary_conv[2] = nn.Identity()


def append(unit):
    unit.cheap_operation.append(nn.Sigmoid())


def drop_norm(unit):
    unit.cheap_operation[1] = nn.Identity()


def hook(unit):
    unit.primary_conv[0].register_forward_hook(lambda module, args, out: out + 1)


def own_forward(unit):
    unit.cheap_operation[0].forward = lambda y: y[:, :10] * 2


def statistics_of_the_batch(unit):
    unit.primary_conv[1].train()
    unit.primary_conv[1].momentum = 0.0


@pytest.mark.parametrize(
    "change",
    [
        scale_data, scale_in_place, swap_two, replace_parameter, point_elsewhere, move_statistics, replace_buffer, load,
        change_eps, other_activation, append, drop_norm, hook, own_forward, statistics_of_the_batch,
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_every_change_takes_effect(change, layout):
    fused, plain = pair()
    x = X.contiguous(memory_format=layout)
    agree(fused, plain, x)
    for unit in (fused, plain):
        change(unit)
    for _ in range(4):
        agree(fused, plain, x)


@pytest.mark.parametrize("change", [scale_data, scale_in_place, swap_two, point_elsewhere, move_statistics, load])
def test_changes_before_every_call(change):
    """The unit stays with the operator that reads all parameters, and becomes a chain when they rest."""
    fused, plain = pair()
    for _ in range(3):
        for unit in (fused, plain):
            change(unit)
        agree(fused, plain)
        assert not is_chain(fused) or change in (point_elsewhere, load)  # the same values again
    agree(fused, plain)
    agree(fused, plain)
    assert is_chain(fused)


class TestSameBits:
    """A unit gives the same bits in its first call, which folds in C++, and in later ones, as a chain."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
    @pytest.mark.parametrize("statistics", [None, torch.float32, torch.float64], ids=["own", "float", "double"])
    def test_dtypes(self, dtype, layout, statistics):
        fused = self.unit((24, 36), dtype)
        if statistics is not None:
            for stage in (fused.primary_conv, fused.cheap_operation):
                stage[1].to(statistics)
        self.check(fused, torch.randn(2, 24, 17, 17, dtype=dtype).contiguous(memory_format=layout))

    @pytest.mark.parametrize(
        "options",
        [{"norm": None, "bias": True}, {"bias": True}, {"ratio": 4}, {"splice": False}, {"activation": "gelu"},
         {"kernel_size": 3}, {"stride": 2}],
        ids=str,
    )  # fmt: skip
    def test_options(self, options):
        self.check(self.unit((12, 40), torch.float32, **options), torch.randn(2, 12, 9, 9))

    def unit(self, sizes, dtype, **options):
        torch.manual_seed(0)
        fused = FusedFiF(*sizes, **options)
        for stage in (fused.primary_conv, fused.cheap_operation):
            if options.get("norm", "batch"):
                for values in (stage[1].weight, stage[1].running_var):
                    nn.init.uniform_(values, 0.1, 3.0)
                for values in (stage[1].bias, stage[1].running_mean):
                    nn.init.normal_(values)
        return fused.to(dtype).eval()

    def check(self, fused, x):
        with torch.inference_mode():
            first = fused(x)
            assert fused._prepared is not None and not is_chain(fused)
            assert torch.equal(first, fused(x))
            assert is_chain(fused)
            assert torch.equal(first, fused(x))


def test_a_network_of_units_follows_each_change():
    torch.manual_seed(0)
    plain = nn.Sequential(FeatureAugment(6, 20), nn.AvgPool2d(2), FeatureAugment(20, 8, stride=2)).eval()
    net = nn.Sequential(FusedFiF.from_reference(plain[0]), plain[1], FusedFiF.from_reference(plain[2]))
    for step in range(5):
        for _ in range(3):
            agree(net, plain)
        with torch.no_grad():
            for both in zip(net.parameters(), plain.parameters(), strict=True):
                noise = torch.randn_like(both[0])
                for values in both:
                    values.add_(noise if step % 2 else 0.1 * noise)


def test_other_inputs():
    fused, plain = pair()
    for x in (X[:1], X.double()[:, :, :1], X.new_empty(0, 6, 5, 5), torch.randn(3, 6, 9, 1), X[:, :, ::2]):
        if x.dtype == torch.float64:
            fused.double(), plain.double()
        agree(fused, plain, x)
        fused.float(), plain.float()
    agree(fused.bfloat16(), plain.bfloat16(), torch.zeros(1, 6, 5, 5, dtype=torch.bfloat16))


def test_modes():
    fused, plain = pair()
    assert not fused._prepared.takes(X)  # gradients are recorded
    x = X.clone().requires_grad_()
    fused(x).sum().backward()
    assert x.grad is not None
    agree(fused, plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert not fused._prepared.takes(X)
        assert fused(X).dtype == torch.bfloat16
    with torch.no_grad():
        fused(X)
        assert fused._prepared.takes(X)
        with backends.use("reference"):
            assert not fused._prepared.takes(X)
        with backends.use("cpu"):
            assert fused._prepared.takes(X)
    assert fused.train()(X).grad_fn is not None
    assert fused.primary_conv[1].num_batches_tracked == 1


def test_errors_stay_in_words():
    fused, plain = pair()
    with torch.inference_mode():
        with pytest.raises(ValueError, match="channels"):
            fused(torch.randn(2, 5, 5, 5))
        with pytest.raises(TypeError, match="must be the same"):
            fused(X.double())
    agree(fused, plain)


def test_copies_prepare_for_themselves():
    fused, plain = pair()
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert twin._prepared is None
        agree(twin, plain)
        scale_data(twin)
        agree(fused, plain)
        with torch.inference_mode():
            assert not torch.allclose(twin(X), plain(X))


def test_kernels_that_are_shared_by_maps():
    """The operator gets a repeated copy of such kernels, which must not be kept."""
    torch.manual_seed(0)
    plain = FeatureAugment(6, 20, shared=True).eval()
    fused = FusedFiF.from_reference(plain)
    agree(fused, plain)
    for unit in (fused, plain):
        scale_in_place(unit)
    agree(fused, plain)


def test_compiled_and_called_plainly():
    fused, plain = pair()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for unit in (compiled, fused, compiled):
            torch.testing.assert_close(unit(X), plain(X), rtol=1e-4, atol=1e-5)
            for each in (fused, plain):
                scale_in_place(each)


def test_packed_weights_are_found_by_content_alone():
    """More units than are kept, from several threads, in place of each other's memory."""
    torch.manual_seed(1)
    units = [FeatureAugment(40, 64).eval() for _ in range(6)]
    fused = [FusedFiF.from_reference(unit) for unit in units]
    x = torch.randn(1, 40, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        truth = [unit(x) for unit in units]
    wrong = []

    def work():
        with torch.inference_mode():
            for _ in range(30):
                for unit, right in zip(fused, truth, strict=True):
                    if not torch.allclose(unit(x), right, rtol=1e-4, atol=1e-5):
                        wrong.append(unit)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- training


def training_pair(**kwargs):
    """A fused unit that has kept its call in training, and the plain unit with the same values."""
    torch.manual_seed(0)
    plain = FeatureAugment(6, 20, activation="silu", **kwargs).train()
    fused = FusedFiF.from_reference(plain)
    train_alike(fused, plain)
    assert isinstance(fused._prepared, PreparedTraining)
    return fused, plain


def train_alike(fused, plain, x=X):
    """A step of both: results, gradients, statistics and counters agree."""
    upstream = torch.linspace(-1, 1, x.numel() // x.shape[1] * 20)
    results = []
    for unit in (fused, plain):
        given = x.detach().requires_grad_()
        out = unit(given)
        wanted = [given, *(p for p in unit.parameters() if p.requires_grad)]
        gradients = torch.autograd.grad(out, wanted, upstream.to(out.dtype).view_as(out), allow_unused=True)
        results.append([out, *gradients, *(b.clone() for b in unit.buffers())])
    assert [r is None for r in results[0]] == [r is None for r in results[1]]
    for ours, theirs in zip(*results, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-5)


def change_momentum(unit):
    unit.cheap_operation[1].momentum = 0.7


def mean_of_all_batches(unit):
    unit.primary_conv[1].momentum = None


def freeze_a_weight(unit):
    unit.cheap_operation[0].weight.requires_grad_(False)


def norm_in_evaluation(unit):
    unit.primary_conv[1].eval()


def stop_tracking(unit):
    unit.cheap_operation[1].track_running_stats = False


@pytest.mark.parametrize(
    "change",
    [
        scale_data, scale_in_place, swap_two, replace_parameter, point_elsewhere, move_statistics, replace_buffer, load,
        change_eps, other_activation, append, drop_norm, hook, change_momentum, mean_of_all_batches, freeze_a_weight,
        norm_in_evaluation, stop_tracking, lambda unit: unit.double(),
    ],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_every_change_takes_effect_in_training(change):
    fused, plain = training_pair()
    for unit in (fused, plain):
        change(unit)
    x = X.to(fused.primary_conv[0].weight.dtype)
    for _ in range(3):
        train_alike(fused, plain, x)


def test_training_on_other_inputs_and_in_other_modes():
    fused, plain = training_pair()
    for x in (X[:1], X, X.contiguous(memory_format=torch.channels_last), X[:, :, ::2], torch.randn(3, 6, 9, 1), X):
        train_alike(fused, plain, x)
        train_alike(fused, plain, x)
    kept = fused._prepared
    with torch.no_grad():
        assert not kept.takes(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kept.takes(X)
    with backends.use("reference"):
        assert not kept.takes(X)
    for p in fused.parameters():
        p.requires_grad_(False)
    assert not kept.takes(X)
    assert kept.takes(X.clone().requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(X), plain.eval()(X), rtol=1e-4, atol=1e-5)


def test_calls_that_fail_in_training_are_not_counted():
    fused, _ = training_pair()
    before = fused.primary_conv[1].num_batches_tracked.item()
    with pytest.raises(ValueError, match="more than 1 value"):
        fused(X[:1, :, :1, :1])
    with pytest.raises(TypeError, match="must be the same"):
        fused(X.double())
    fused.primary_conv[0].weight.data = fused.primary_conv[0].weight.data.double()
    with pytest.raises(TypeError):
        fused(X)
    assert fused.primary_conv[1].num_batches_tracked.item() == before
    assert fused.cheap_operation[1].num_batches_tracked.item() == before

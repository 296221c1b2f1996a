"""The operators themselves: schemas, fake kernels, torch.compile, and what becomes of bad input."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from support import PLACEMENTS, in_child, name_of, place, randomise, results
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fif_ops import FeatureAugment, FusedFiF, Norm, feature_augment, ops

pytestmark = pytest.mark.usefixtures("one_thread")
RELU, SILU = ops.ACTIVATION_CODES["relu"], ops.ACTIVATION_CODES["silu"]


def arguments(x, *, maps=4, multiplier=1, kernel=3, out_channels=None, norm=True, bias=False, splice=True):
    """Positional arguments of ``infer`` up to and with ``splice``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cheap = maps * multiplier
    norms = []
    for channels in (maps, cheap):
        if norm:
            norms += [torch.randn(channels, dtype=wide) for _ in range(3)] + [torch.rand(channels, dtype=wide) + 0.5]
        else:
            norms += [None] * 4
    return (
        x,
        torch.randn(maps, x.shape[1], 1, 1, dtype=x.dtype),
        torch.randn(cheap, 1, kernel, kernel, dtype=x.dtype),
        torch.randn(maps, dtype=x.dtype) if bias else None,
        torch.randn(cheap, dtype=x.dtype) if bias else None,
        *norms,
        1e-5,
        1e-4,
        out_channels or cheap + splice * maps,
        SILU,
        splice,
    )


def train_arguments(x, batch=(True, True), **options):
    return (*arguments(x, **options), *batch, 0.1, 0.2)


def backward_arguments(x, grad_placement="contiguous", batch=(True, True), need=(True, True), **options):
    inputs = train_arguments(x, batch, **options)
    out, raw, stats1, stats2 = torch.ops.fif_ops.train(*inputs)
    grad = place(torch.randn(out.shape).to(x.dtype), grad_placement)
    weight1, bias1, weight2, bias2 = inputs[5], inputs[6], inputs[9], inputs[10]
    splice = inputs[17]
    return (grad, *inputs[:3], raw, stats1, stats2, weight1, bias1, weight2, bias2, SILU, splice, *batch, *need)


OPERATORS = {"infer": arguments, "train": train_arguments, "backward": backward_arguments}
VARIANTS = {
    "plain": {},
    "odd out_channels": {"multiplier": 2, "out_channels": 11},
    "not spliced": {"splice": False, "multiplier": 2},
    "bias, no norm": {"norm": False, "bias": True, "kernel": 5},
}
SIZES = {
    "usual": (2, 3, 5, 4),
    "one image": (1, 3, 4, 3),
    "one pixel": (4, 3, 1, 1),
    "one channel": (2, 1, 4, 4),
    "empty": (0, 3, 4, 4),
}


def build(operator, x, **options):
    if operator != "infer" and options.get("norm") is False:
        options["batch"] = (False, False)
    return OPERATORS[operator](x, **options)


# ---- schema, fake kernels, compilation machinery

CHECKED = ("contiguous", "channels_last", "every other channel", "last: inner columns", "one image")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("placement", CHECKED)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator, placement, size):
    x = place(torch.randn(SIZES[size]), placement)
    torch.library.opcheck(getattr(torch.ops.fif_ops, operator).default, build(operator, x))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck_of_variants(operator, dtype, variant):
    inputs = build(operator, torch.randn(2, 3, 5, 4).to(dtype), **VARIANTS[variant])
    torch.library.opcheck(getattr(torch.ops.fif_ops, operator).default, inputs)


def test_opcheck_of_backward_without_some_gradients():
    for need in itertools.product([False, True], repeat=2):
        for batch in ((False, True), (False, False)):
            inputs = backward_arguments(torch.randn(2, 3, 5, 4), "channels_last", batch, need)
            torch.library.opcheck(torch.ops.fif_ops.backward.default, inputs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_results_are_laid_out_as_real_ones(operator, variant):
    """Shapes, dtypes and strides, for every way in which the input may lie in memory."""
    for placement, size in itertools.product(PLACEMENTS, SIZES.values()):
        inputs = build(operator, place(torch.randn(size), placement), **VARIANTS[variant])
        function = getattr(torch.ops.fif_ops, operator)
        real = function(*inputs)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in inputs))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for one, other in pairs:
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype), placement


def test_layout_of_the_output_is_the_references():
    """Strides along dimensions of one element mean nothing and may differ."""
    for placement, size in itertools.product(PLACEMENTS, ((2, 3, 5, 4), (1, 3, 4, 4), (3, 3, 1, 1), (2, 1, 4, 4))):
        x = place(torch.randn(size), placement)
        plain = FeatureAugment(size[1], 7).eval()
        ours, wanted = FusedFiF.from_reference(plain)(x), plain(x)
        strides = zip(ours.shape, ours.stride(), wanted.stride(), strict=True)
        assert all(one == other for extent, one, other in strides if extent > 1), (placement, size)


def test_statistics_that_are_written_have_their_version_counted():
    inputs = train_arguments(torch.randn(2, 3, 4, 4))
    versions = [t._version for t in inputs[5:13]]
    torch.ops.fif_ops.train(*inputs)
    changed = [t._version != before for t, before in zip(inputs[5:13], versions, strict=True)]
    assert changed == [False, False, True, True] * 2


# ---- torch.compile


def compare_compiled(x, training, backend, tolerance=1e-5, dynamic=None, steps=1, **options):
    plain = randomise(FeatureAugment(x.shape[1], 11, **options)).train(training)
    eager, traced = FusedFiF.from_reference(plain), FusedFiF.from_reference(plain)
    compiled = torch.compile(traced, fullgraph=True, backend=backend, dynamic=dynamic)
    for step in range(steps):
        found = []
        for unit, function in ((eager, eager), (traced, compiled)):
            unit.zero_grad()
            leaf = x.detach().clone().requires_grad_()
            out = function(leaf)
            out.square().sum().backward()
            found.append([out.detach(), leaf.grad, *(p.grad for p in unit.parameters()), *unit.buffers()])
        assert found[0][0].stride() == found[1][0].stride()
        for wanted, ours in zip(*found, strict=True):
            torch.testing.assert_close(
                ours, wanted, rtol=tolerance, atol=tolerance, msg=lambda m, s=step: f"step {s}: {m}"
            )


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every other channel"])
def test_compiled_whole(layout, training):
    x = place(torch.randn(3, 4, 6, 5), layout)
    compare_compiled(x, training, "aot_eager", steps=2, activation="silu")


@pytest.mark.parametrize(
    "options",
    [{"norm": None, "bias": True}, {"splice": False, "ratio": 3}, {"bias": True, "cheap_kernel_size": 7}],
    ids=["no norm", "not spliced", "bias"],
)
def test_compiled_variants(options):
    compare_compiled(torch.randn(3, 4, 6, 5), True, "aot_eager", **options)


def test_compiled_for_inference():
    unit = FusedFiF(4, 9).eval()
    compiled = torch.compile(unit, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        assert torch.equal(compiled(x), unit(x))


@pytest.mark.slow
def test_compiled_by_inductor():
    compare_compiled(
        torch.randn(3, 4, 6, 5).contiguous(memory_format=torch.channels_last), True, "inductor", activation="silu"
    )


def test_dynamic_shapes_compile_once():
    counter = CompileCounterWithBackend("aot_eager")
    unit = FusedFiF(4, 9)
    compiled = torch.compile(unit, fullgraph=True, backend=counter, dynamic=True)
    twin = FusedFiF.from_reference(unit)
    first = 0
    for batch, height, width in ((2, 5, 6), (3, 7, 6), (4, 9, 11), (7, 12, 5)):
        x = torch.randn(batch, 4, height, width)
        torch.testing.assert_close(compiled(x), twin(x))
        first = first or counter.frame_count
        assert counter.frame_count == first > 0


def test_no_graph_breaks_in_a_network():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), FusedFiF(4, 8), FusedFiF(8, 12, splice=False))
    explained = torch._dynamo.explain(net)(torch.randn(2, 3, 8, 8))
    assert explained.graph_break_count == 0
    assert explained.graph_count == 1


def test_exported_program_holds_the_operator():
    unit = FusedFiF(4, 9).eval()
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        program = torch.export.export(unit, (x,))
    assert [str(node.target) for node in program.graph.nodes if node.op == "call_function"] == ["fif_ops.infer.default"]
    torch.testing.assert_close(program.module()(x), unit(x))


# ---- bad input to the operators: an exception, whatever it is

X = torch.randn(2, 3, 4, 4)
ODD_TENSORS = {
    "scalar": torch.tensor(1.0),
    "vector": torch.randn(4),
    "three dimensions": torch.randn(3, 4, 4),
    "five dimensions": torch.randn(1, 2, 3, 4, 4),
    "integers": torch.ones(2, 3, 4, 4, dtype=torch.int64),
    "bool": torch.ones(2, 3, 4, 4, dtype=torch.bool),
    "complex": torch.ones(2, 3, 4, 4, dtype=torch.complex64),
    "float8": torch.ones(2, 3, 4, 4).to(torch.float8_e4m3fn),
    "other dtype": torch.randn(2, 3, 4, 4, dtype=torch.float64),
    "other channels": torch.randn(2, 5, 4, 4),
    "other batch": torch.randn(3, 3, 4, 4),
    "other size": torch.randn(2, 3, 5, 4),
    "no channels": torch.randn(2, 0, 4, 4),
    "no rows": torch.randn(2, 3, 0, 4),
    "no columns": torch.randn(2, 3, 4, 0),
    "meta": torch.empty(2, 3, 4, 4, device="meta"),
    "sparse": torch.randn(2, 3, 4, 4).to_sparse(),
    "oneDNN": torch.randn(2, 3, 4, 4).to_mkldnn(),
    "kernels": torch.randn(4, 3, 1, 1),
    "even kernels": torch.randn(4, 1, 2, 2),
    "oblong kernels": torch.randn(4, 1, 3, 5),
    "large kernels": torch.randn(4, 1, 9, 9),
    "no kernels": torch.randn(0, 1, 3, 3),
    "too few kernels": torch.randn(3, 1, 3, 3),
    "deep kernels": torch.randn(4, 4, 3, 3),
    "no values": torch.randn(0),
    "too few values": torch.randn(3),
    "statistics": torch.randn(2, 5),
}
ODD_NUMBERS = [-1, 0, 1, 5, 9, 2**31, 2**62, -(2**63), 0.5, float("nan"), "text", None, True]


def accepted(operator, index, odd):
    """Whether the operator takes ``odd`` as its argument number ``index``, all others being right."""
    inputs = [t.clone() if isinstance(t, torch.Tensor) else t for t in build(operator, X)]
    names = names_of(operator)
    keywords = {names[index]: odd} if index >= len(inputs) else {}  # what has a default
    if not keywords:
        inputs[index] = odd
    try:
        getattr(torch.ops.fif_ops, operator)(*inputs, **keywords)
    except (RuntimeError, TypeError, ValueError, NotImplementedError, OverflowError):
        return False
    return True


def names_of(operator):
    return [argument.name for argument in getattr(torch.ops.fif_ops, operator).default._schema.arguments]


def takes_a_tensor(operator, index):
    inputs = build(operator, X)
    return index < len(inputs) and isinstance(inputs[index], torch.Tensor)


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_refuse_odd_tensors(operator):
    """Every tensor in turn is replaced by every odd thing; what does not fit must be refused."""

    def all_accepted():
        return {
            (name, odd)
            for (index, name), odd in itertools.product(enumerate(names_of(operator)), ODD_TENSORS)
            if takes_a_tensor(operator, index) and accepted(operator, index, ODD_TENSORS[odd])
        }

    fits = {(name, "meta") for name in names_of(operator)} | {("primary_weight", "kernels")}
    fits |= {(f"{name}{stage}", "vector") for name in ("weight", "bias", "mean", "var") for stage in (1, 2)}
    if operator == "backward":
        fits |= {("grad", "other channels")}
    else:  # nothing but x has a batch and a size
        fits |= {("x", "other batch"), ("x", "other size"), ("x", "kernels")}
    assert in_child(all_accepted) <= fits


@pytest.mark.parametrize("operator", OPERATORS)
def test_operators_survive_odd_numbers(operator):
    def tensors_accepted():
        return [
            (name, odd)
            for (index, name), odd in itertools.product(enumerate(names_of(operator)), ODD_NUMBERS)
            if accepted(operator, index, odd) and takes_a_tensor(operator, index) and odd is not None
        ]

    assert in_child(tensors_accepted) == []


def test_operators_refuse_impossible_numbers():
    for out_channels in (-1, 0, 3, 9, 2**40):
        with pytest.raises(RuntimeError, match=f"out_channels is {out_channels}: must be from 4 to 8"):
            torch.ops.fif_ops.infer(*(*arguments(X)[:15], out_channels, RELU, True))
    for code in (-1, 6, 1000):
        with pytest.raises(RuntimeError, match="activation must be a code from 0 to 5"):
            torch.ops.fif_ops.infer(*(*arguments(X)[:16], code, True))


def test_operators_refuse_half_a_normalisation():
    for missing in (7, 8):
        inputs = list(arguments(X))
        inputs[missing] = None
        with pytest.raises(RuntimeError, match="primary_norm needs both"):
            torch.ops.fif_ops.infer(*inputs)


# ---- bad input to feature_augment: an exception that names argument, value and remedy

W1, W2, V4, V8 = torch.randn(4, 3, 1, 1), torch.randn(8, 1, 3, 3), torch.ones(4), torch.ones(8)


def norm(values=V4, **fields):
    return Norm(**{
        "weight": values, "bias": values, "running_mean": values.clone(), "running_var": values.clone(),
        "training": False, "momentum": 0.1, "eps": 1e-5, **fields,
    })  # fmt: skip


# what is wrong: (arguments, exception, words of its message)
BAD = {
    "x no tensor": ({"x": [1.0]}, TypeError, ["x", "list", "must be a torch.Tensor"]),
    "x an array": ({"x": X.numpy()}, TypeError, ["x", "ndarray", "must be a torch.Tensor"]),
    "x missing": ({"x": None}, TypeError, ["x", "NoneType"]),
    "x of three dimensions": ({"x": X[0]}, ValueError, ["x", "(3, 4, 4)", "4 dimensions"]),
    "x of five dimensions": ({"x": X[None]}, ValueError, ["x", "(1, 2, 3, 4, 4)", "4 dimensions"]),
    "x of other channels": ({"x": torch.randn(2, 5, 4, 4)}, ValueError, ["5 channels", "(4, 3, 1, 1)"]),
    "x of integers": ({"x": X.long()}, TypeError, ["x", "torch.int64", "float"]),
    "x of booleans": ({"x": X > 0}, TypeError, ["x", "torch.bool", "float"]),
    "x complex": ({"x": X.cfloat()}, TypeError, ["x", "torch.complex64"]),
    "x of another dtype": ({"x": X.double()}, TypeError, ["primary_weight", "torch.float32", "torch.float64", "cast"]),
    "x on another device": ({"x": X.to("meta")}, ValueError, ["primary_weight", "cpu", "meta", "same device"]),
    "x sparse": ({"x": X.to_sparse()}, (TypeError, ValueError), ["x", "sparse"]),
    "primary_weight no tensor": ({"primary_weight": 3}, TypeError, ["primary_weight", "int"]),
    "primary_weight of two dimensions": ({"primary_weight": W1[:, :, 0, 0]}, ValueError, ["primary_weight", "(4, 3)"]),
    "primary_weight oblong": ({"primary_weight": torch.randn(4, 3, 1, 3)}, ValueError, ["primary_weight", "(4, 3, 1, 3)"]),
    "primary_weight empty": ({"primary_weight": W1[:0]}, ValueError, ["primary_weight", "(0, 3, 1, 1)"]),
    "primary_weight of another dtype": ({"primary_weight": W1.bfloat16()}, TypeError, ["primary_weight", "bfloat16"]),
    "cheap_weight no tensor": ({"cheap_weight": "w"}, TypeError, ["cheap_weight", "str"]),
    "cheap_weight of three dimensions": ({"cheap_weight": W2[0]}, ValueError, ["cheap_weight", "(1, 3, 3)"]),
    "cheap_weight even": ({"cheap_weight": torch.randn(8, 1, 2, 2)}, ValueError, ["cheap_weight", "(8, 1, 2, 2)", "odd"]),
    "cheap_weight oblong": ({"cheap_weight": torch.randn(8, 1, 3, 1)}, ValueError, ["cheap_weight", "(8, 1, 3, 1)", "square"]),
    "cheap_weight of too few": ({"cheap_weight": W2[:6]}, ValueError, ["cheap_weight", "(6, 1, 3, 3)", "multiple of 4"]),
    "cheap_weight empty": ({"cheap_weight": W2[:0]}, ValueError, ["cheap_weight", "(0, 1, 3, 3)"]),
    "cheap_weight over no divisor": ({"cheap_weight": torch.randn(8, 3, 3, 3)}, ValueError, ["cheap_weight", "(8, 3, 3, 3)"]),
    "cheap_weight over nothing": ({"cheap_weight": torch.randn(8, 0, 3, 3)}, ValueError, ["cheap_weight", "(8, 0, 3, 3)"]),
    "cheap_weight of another dtype": ({"cheap_weight": W2.double()}, TypeError, ["cheap_weight", "torch.float64"]),
    "cheap_weight on another device": ({"cheap_weight": W2.to("meta")}, ValueError, ["cheap_weight", "meta", "cpu"]),
    "primary_bias too long": ({"primary_bias": V8}, ValueError, ["primary_bias", "(8,)", "(4,)"]),
    "primary_bias no tensor": ({"primary_bias": 1.0}, TypeError, ["primary_bias", "float"]),
    "primary_bias of another dtype": ({"primary_bias": V4.double()}, TypeError, ["primary_bias", "torch.float64"]),
    "primary_bias of integers": ({"primary_bias": V4.long()}, TypeError, ["primary_bias", "torch.int64"]),
    "cheap_bias too short": ({"cheap_bias": V4}, ValueError, ["cheap_bias", "(4,)", "(8,)"]),
    "cheap_bias on another device": ({"cheap_bias": V8.to("meta")}, ValueError, ["cheap_bias", "meta", "cpu"]),
    "cheap_bias of another dtype": ({"cheap_bias": V8.half()}, TypeError, ["cheap_bias", "torch.float16"]),
    "primary_norm no Norm": ({"primary_norm": "batch"}, TypeError, ["primary_norm", "str", "Norm"]),
    "cheap_norm a plain tuple": ({"cheap_norm": (V8, V8)}, TypeError, ["cheap_norm", "tuple", "Norm"]),
    "primary_norm too long": ({"primary_norm": norm(V8)}, ValueError, ["primary_norm.weight", "(8,)", "(4,)"]),
    "cheap_norm's mean too short": ({"cheap_norm": norm(V8, running_mean=V4)}, ValueError, ["cheap_norm.running_mean", "(4,)"]),
    "primary_norm's bias a number": ({"primary_norm": norm(bias=0.0)}, TypeError, ["primary_norm.bias", "float"]),
    "primary_norm's weight on another device": ({"primary_norm": norm(weight=V4.to("meta"))}, ValueError, ["primary_norm.weight", "meta"]),
    "primary_norm's weight of integers": ({"primary_norm": norm(weight=V4.long())}, TypeError, ["primary_norm.weight", "torch.int64"]),
    "cheap_norm's variance complex": ({"cheap_norm": norm(V8, running_var=V8.cfloat())}, TypeError, ["cheap_norm.running_var", "complex64"]),
    "primary_norm without statistics": (
        {"primary_norm": norm(running_mean=None, running_var=None)}, ValueError, ["primary_norm", "running statistics"],
    ),
    "primary_norm with half of them": ({"primary_norm": norm(running_var=None)}, ValueError, ["primary_norm", "running statistics"]),
    "training with half of them": (
        {"primary_norm": norm(running_var=None, training=True)}, ValueError, ["primary_norm", "running_var"],
    ),
    "primary_norm without momentum": (
        {"primary_norm": norm(momentum=None, training=True)}, TypeError, ["primary_norm.momentum", "None"],
    ),
    "cheap_norm with text for eps": ({"cheap_norm": norm(V8, eps="small")}, TypeError, ["cheap_norm.eps", "small"]),
    "out_channels zero": ({"out_channels": 0}, ValueError, ["out_channels=0", "from 1 to 12"]),
    "out_channels negative": ({"out_channels": -3}, ValueError, ["out_channels=-3", "from 1 to 12"]),
    "out_channels too many": ({"out_channels": 13}, ValueError, ["out_channels=13", "from 1 to 12"]),
    "out_channels too many, not spliced": ({"out_channels": 9, "splice": False}, ValueError, ["out_channels=9", "from 1 to 8"]),
    "out_channels broken": ({"out_channels": 3.5}, TypeError, ["out_channels", "3.5"]),
    "out_channels text": ({"out_channels": "8"}, TypeError, ["out_channels", "8"]),
    "activation unknown": ({"activation": "tanh"}, ValueError, ["activation='tanh'", "'relu'", "'gelu'"]),
    "activation a module": ({"activation": torch.nn.ReLU()}, (TypeError, ValueError), ["activation=ReLU()", "'relu'"]),
    "activation a list": ({"activation": ["relu"]}, (TypeError, ValueError), ["activation", "['relu']"]),
    "stride zero": ({"stride": 0}, ValueError, ["stride", "0"]),
    "stride negative": ({"stride": -1}, ValueError, ["stride", "-1"]),
    "stride broken": ({"stride": 1.5}, TypeError, ["stride", "1.5"]),
    "padding negative": ({"padding": -1}, ValueError, ["padding", "-1"]),
    "padding text": ({"padding": "same"}, TypeError, ["padding", "same"]),
    "groups zero": ({"groups": 0}, ValueError, ["groups=0"]),
    "groups negative": ({"groups": -1}, ValueError, ["groups=-1"]),
    "groups too many": ({"groups": 3}, ValueError, ["groups=3", "(4, 3, 1, 1)"]),
    "groups broken": ({"groups": 1.5}, TypeError, ["groups", "1.5"]),
    "backend unknown": ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "'cpu'", "'reference'"]),
    "backend unable": (
        {"backend": "cpu", "cheap_weight": torch.zeros(len(W1), 1, 9, 9)}, ValueError, ["backend='cpu'", "size is 9"]
    ),
    "backend unable to cut": ({"backend": "cpu", "out_channels": 3}, ValueError, ["backend='cpu'", "out_channels"]),
    "backend no name": ({"backend": 3}, (TypeError, ValueError), ["backend", "3"]),
    "no rows": ({"x": X[:, :, :0]}, (RuntimeError, ValueError), ["0 x 4"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_feature_augment_names_what_is_wrong(case):
    options, exception, words = BAD[case]
    with pytest.raises(exception) as caught:
        feature_augment(**{"x": X, "primary_weight": W1, "cheap_weight": W2, **options})
    message = str(caught.value)
    assert all(word in message for word in words), message


BAD_FOR_MODULES = {
    "rank": (X[0], (ValueError, RuntimeError), ["(3, 4, 4)", "4 dimensions"]),
    "channels": (torch.randn(2, 4, 4, 4), (ValueError, RuntimeError), ["4 channels", "3"]),
    "dtype": (X.double(), (TypeError, RuntimeError), ["float64", "float32"]),
    "integers": (X.long(), (TypeError, RuntimeError), ["int64"]),
    "device": (X.to("meta"), (ValueError, RuntimeError), ["meta", "cpu"]),
    "no tensor": (None, (TypeError, RuntimeError), ["NoneType"]),
}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("case", BAD_FOR_MODULES)
def test_module_names_what_is_wrong(case, training):
    x, exception, words = BAD_FOR_MODULES[case]
    unit = FusedFiF(3, 8).train(training)
    with pytest.raises(exception) as caught:
        unit(x)
    assert all(word in str(caught.value) for word in words), caught.value


def test_meta_tensors_give_shapes():
    with torch.device("meta"):
        unit = FusedFiF(3, 8)
        out = unit(torch.empty(2, 3, 5, 6))
    assert out.is_meta and out.shape == (2, 8, 5, 6)


def test_empty_batches_and_maps_are_the_references():
    for size in ((0, 3, 4, 5), (0, 3, 1, 1)):
        unit = FusedFiF(3, 7).eval()
        assert results(unit, torch.randn(size), torch.randn(size[0], 7, *size[2:]))["output"].shape == (0, 7, *size[2:])
    for size in ((2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 4, 4)):
        with pytest.raises((RuntimeError, ValueError)):
            FusedFiF(3, 7)(torch.randn(size))


def test_broken_switches_are_named():
    """Environment variables with a wrong value: said in words, and never a crash."""
    code = "import torch, fif_ops, json; print(json.dumps(str(fif_ops.FusedFiF(3, 8)(torch.randn(2, 3, 4, 4)).shape)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FIF_OPS_BACKEND": "gpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "FIF_OPS_BACKEND is 'gpu': must be one of" in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FIF_OPS_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "8, 4, 4" in json.loads(done.stdout)

"""What calls leave out on their way to the kernels, and what of a call may be kept: never so that anybody notices."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode

from fif_ops import FusedFiF, freeze, ops
from fif_ops.models import Spindle

pytestmark = [
    pytest.mark.skipif(not ops.LOADED, reason="needs the compiled kernels"),
    pytest.mark.usefixtures("one_thread"),
]
X = torch.randn(2, 6, 5, 5)
KINDS = ("frozen", "unit", "spindle")


@pytest.fixture
def module(request):
    torch.manual_seed(0)
    made = Spindle(6, 12, 6) if request.param == "spindle" else FusedFiF(6, 20)
    made = freeze(made.eval()) if request.param == "frozen" else made.eval()
    with torch.no_grad():
        for _ in range(3):  # so that what can be kept is
            made(X)
        yield made


every_kind = pytest.mark.parametrize("module", KINDS, indirect=True)
frozen_only = pytest.mark.parametrize("module", KINDS[:1], indirect=True)


@every_kind
def test_hooks(module):
    before, seen = module(X), []
    for register in (module.register_forward_hook, torch_module.register_module_forward_hook):
        handle = register(lambda called, args, y: y + 1 if called is module else None)
        assert torch.equal(module(X), before + 1)
        handle.remove()
        assert torch.equal(module(X), before)
    for register in (module.register_forward_pre_hook, torch_module.register_module_forward_pre_hook):
        handle = register(lambda called, args: seen.append(called))
        module(X)
        assert seen.pop(0) is module
        handle.remove()
        seen.clear()
    handle = module.register_forward_pre_hook(lambda called, args, named: ((-args[0],), named), with_kwargs=True)
    assert torch.equal(module(-X), before)
    handle.remove()


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks(register):
    unit, seen = FusedFiF(6, 20), []
    getattr(unit, register)(lambda called, *gradients: seen.append(called))
    unit(X.clone().requires_grad_()).sum().backward()
    assert seen == [unit]


@every_kind
def test_a_forward_of_its_own(module):
    module.forward = lambda x: x + 1
    assert torch.equal(module(X), X + 1)


@every_kind
def test_by_name(module):
    assert torch.equal(module(x=X), module(X))


def test_a_subclass_with_more_arguments():
    class Scaled(FusedFiF):
        def forward(self, x, factor=1.0):
            return super().forward(x) * factor

    unit = Scaled(6, 20).eval()
    with torch.no_grad():
        assert torch.equal(unit(X, 2.0), 2 * unit(X))
        assert torch.equal(unit(X, factor=2.0), 2 * unit(X))


@every_kind
def test_compiled_in_place(module):
    before, count = module(X), []

    def backend(graph, inputs):
        count.append(graph)
        return graph.forward

    module.compile(backend=backend)
    torch.testing.assert_close(module(X), before)
    assert count
    torch.compiler.reset()


@every_kind
def test_traced(module):
    traced = torch.jit.trace(module, X, check_trace=False)
    torch.testing.assert_close(traced(X + 1), module(X + 1))
    leaves = type("Leaves", (torch.fx.Tracer,), {"is_leaf_module": lambda self, part, name: part is module})
    graph = leaves().trace(nn.Sequential(module))
    assert [node.op for node in graph.nodes] == ["placeholder", "call_module", "output"]


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@every_kind
def test_modes_and_profiler_see_the_operator(module):
    before = module(X)
    with Seen() as seen:
        assert torch.equal(module(X), before)
    assert any(name.startswith("fif_ops::") for name in seen.names)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(X)
    assert any(event.name.startswith("fif_ops::") for event in profile.events())


@every_kind
def test_tensors_that_are_more_than_their_memory(module):
    torch.testing.assert_close(module(torch._neg_view(X)), module(-X))
    torch.testing.assert_close(torch.vmap(module)(X[None])[0], module(X))
    zeros = torch._efficientzerotensor(X.shape)
    torch.testing.assert_close(module(zeros), module(torch.zeros_like(X)))


@frozen_only
def test_bad_inputs_after_good_ones(module):
    before = module(X)
    for x, words in (
        (X.double(), "was frozen in torch.float32"),
        (X.to("meta"), "on meta"),
        (X[:, :5], "takes 6 channels and gets 5"),
        (X[0], "must have 4 dimensions"),
        (X[:, :, :0], "must have channels and pixels"),
    ):
        with pytest.raises(RuntimeError, match=words):
            module(x)
        assert torch.equal(module(X), before)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="requires a gradient"):
        module(X.clone().requires_grad_())
    module.to("meta")
    with pytest.raises(RuntimeError, match="then moved to meta"):
        module(X)


@frozen_only
def test_plans_of_other_inputs(module):
    """More sizes than plans are kept, in turns with formats and strides that share a size."""
    for size in (*range(1, 20), 5, 19):
        for x in (torch.randn(2, 6, size, 5), torch.randn(1, 6, 4, size), torch.randn(0, 6, size, 3)):
            wanted = freeze_again(module)(x)
            for again in (x, x.contiguous(memory_format=torch.channels_last), x.repeat(1, 1, 1, 2)[..., : x.shape[3]]):
                torch.testing.assert_close(module(again), wanted)


def freeze_again(module):
    """The same numbers at another address, where no plan lies yet."""
    return copy.deepcopy(module)


@frozen_only
def test_numbers_changed_under_a_plan(module):
    before, program, packed = module(X), module.program.clone(), module.packed.clone()
    for change in (
        lambda: module.program[0, 4].add_(1),  # channels
        lambda: module.program[0, -1].add_(64),  # where the constants lie
        lambda: module.packed[16].add_(1),  # channels of the constants
        lambda: module.packed.resize_(128),
        lambda: module.packed.untyped_storage().resize_(0),
    ):
        change()
        with pytest.raises(RuntimeError):
            module(X)
        module.packed = packed.clone()
        module.program.copy_(program)
        assert torch.equal(module(X), before)


@frozen_only
def test_copies_and_threads(module):
    before, wrong = module(X), []
    twins = [module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    inputs = [torch.randn(1, 6, size, 7) for size in range(1, 40)]
    wanted = [module(x) for x in inputs]

    def work(twin):
        with torch.inference_mode():
            for _ in range(20):
                wrong.extend(x for x, y in zip(inputs, wanted, strict=True) if not torch.equal(twin(x), y))

    threads = [threading.Thread(target=work, args=(twin,)) for twin in twins * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(module(X), before)

"""Training of networks side by side, and the comparison of a fused network with its reference twin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter

import torch
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

MOMENTUM = 0.9  # S1 7.1
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Numerics:
    """Memory format of the activations and the dtype under autocast (float32: none)."""

    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    def place(self, images: Tensor) -> Tensor:
        """``images`` [B, C, H, W] in the memory format chosen."""
        return images.contiguous(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)

    def autocast(self) -> AbstractContextManager:
        """The region in which a forward pass runs."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype != torch.float32)


@dataclass
class Run:
    """One network in training, with its record."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    numerics: Numerics
    step_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)  # after each epoch, 0 to 1

    @classmethod
    def start(cls, model: nn.Module, steps: int, learning_rate: float, numerics: Numerics) -> Run:
        """SGD with momentum, its rate falling to zero along a half cosine over ``steps`` steps."""
        optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return cls(model, optimizer, schedule, numerics)

    def copy(self) -> Run:
        """A run from here on with weights of its own, so that measuring on it leaves this one as it is."""
        return Run.start(deepcopy(self.model), 1, self.optimizer.param_groups[0]["initial_lr"], self.numerics)

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward pass in training mode; returns the mean cross-entropy."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with self.numerics.autocast():
            logits = self.model(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        loss.backward()
        return loss.detach()

    def step(self, images: Tensor, labels: Tensor) -> float:
        """One full training step without the schedule; returns the loss."""
        loss = self.backward(images, labels)
        self.optimizer.step()
        return loss.item()


def train(
    runs: Mapping[str, Run],
    batches: DataLoader,
    tests: DataLoader,
    epochs: int,
    progress: Callable[[int, int], None],
) -> None:
    """Trains every run on the very same batches, step by step, and tests each after every epoch.

    Calls ``progress(steps done, all steps)`` after each step.
    """
    for epoch in range(epochs):
        for done, (images, labels) in enumerate(batches, start=epoch * len(batches) + 1):
            for run in runs.values():
                run.step_loss.append(run.step(run.numerics.place(images), labels))
                run.schedule.step()
            progress(done, epochs * len(batches))
        for run in runs.values():
            logits, labels = predict(run.model, tests, run.numerics)
            run.test_accuracy.append(float(accuracy_score(labels.numpy(), logits.argmax(1).numpy())))


@torch.inference_mode()
def predict(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], numerics: Numerics) -> tuple[Tensor, Tensor]:
    """Logits float32 [N, classes] and labels int64 [N] over all ``batches``, in evaluation mode."""
    model.eval()
    logits, labels = [], []
    with numerics.autocast():
        for images, truth in batches:
            logits.append(model(numerics.place(images)).float())
            labels.append(truth)
    return torch.cat(logits), torch.cat(labels)


@dataclass(frozen=True)
class Agreement:
    """How far two networks with the same weights differ on the same images."""

    logit_difference: float  # largest absolute
    logit_scale: float  # largest absolute logit of the reference
    same_predictions: int
    reference_gradient_error: float  # relative L2 to the float64 gradient of all parameters, one training batch
    fused_gradient_error: float

    @property
    def relative_logit_difference(self) -> float:
        return self.logit_difference / max(self.logit_scale, torch.finfo(torch.float32).tiny)


def compare(
    fused: Run, reference: Run, tests: Iterable[tuple[Tensor, Tensor]], batch: tuple[Tensor, Tensor]
) -> Agreement:
    """Compares outputs over ``tests`` and gradients on ``batch``; both runs must carry the same weights.

    Leaves gradients and one update of the running statistics behind in both networks.
    """
    ours, _ = predict(fused.model, tests, fused.numerics)
    theirs, _ = predict(reference.model, tests, reference.numerics)
    exact = Run.start(deepcopy(reference.model).double(), 1, 0.0, Numerics())
    truth = _gradient(exact, batch[0].double(), batch[1])
    errors = (
        (torch.linalg.vector_norm(_gradient(run, *batch) - truth) / torch.linalg.vector_norm(truth)).item()
        for run in (reference, fused)
    )
    difference, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return Agreement(difference, scale, int((ours.argmax(1) == theirs.argmax(1)).sum()), *errors)


def _gradient(run: Run, images: Tensor, labels: Tensor) -> Tensor:
    run.backward(run.numerics.place(images), labels)
    return torch.cat([p.grad.double().flatten() for p in run.model.parameters() if p.grad is not None])


def interleaved_milliseconds(
    actions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Median time of each action in ms, the actions taking turns so that a change of the clock rate meets all alike."""
    order = list(actions)
    times: dict[str, list[float]] = {name: [] for name in order}
    for turn in range(warmup + rounds):
        # Every other round goes backwards: no action profits each time from the caches its neighbour left.
        for name in order if turn % 2 == 0 else reversed(order):
            start = perf_counter()
            actions[name]()
            elapsed = perf_counter() - start
            if turn >= warmup:
                times[name].append(1e3 * elapsed)
    return {name: median(samples) for name, samples in times.items()}


def saved_bytes(run: Run, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps between the forward and the backward pass of one step, parameters apart.

    Every storage counts once, however many tensors on it are saved.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*run.model.parameters(), *run.model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holds the storages, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run.backward(run.numerics.place(images), labels)
    return sum(storage.nbytes() for storage in kept.values())

"""What is measured: the units of published networks at their own sizes, and the random values that fill them."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fif_ops import FeatureAugment
from fif_ops.models import hwnet

from .precision import FP32, Precision


class Shape(NamedTuple):
    """A unit with ``primary`` maps and ``primary * ratio`` maps out, on ``size`` x ``size`` pixels."""

    in_channels: int
    primary: int
    size: int
    batch: int = 1
    ratio: int = 2
    kernel_size: int = 1
    activation: str | None = "relu"

    @property
    def name(self) -> str:
        """As tables show it: "64-32@28 b16"; what differs from ratio 2, a 1x1 primary kernel and relu comes first."""
        return f"{self._variant(' ')}{self.in_channels}-{self.primary}@{self.size} b{self.batch}"

    @property
    def slug(self) -> str:
        """As ``pytest -k`` can select it: "64-32-28-b16"."""
        return f"{self._variant('-')}{self.in_channels}-{self.primary}-{self.size}-b{self.batch}"

    def _variant(self, separator: str) -> str:
        ratio = f"S{self.ratio}{separator}" if self.ratio != 2 else ""
        kernel = f"k{self.kernel_size}{separator}" if self.kernel_size != 1 else ""
        activation = f"{self.activation or 'linear'}{separator}" if self.activation != "relu" else ""
        return ratio + kernel + activation


SHAPES = (
    Shape(16, 8, 112),
    Shape(24, 36, 56),
    Shape(72, 12, 56),
    Shape(64, 32, 28),
    Shape(72, 20, 28),
    Shape(120, 20, 28),
    Shape(80, 92, 14),
    Shape(184, 40, 14),
    Shape(112, 336, 14),
    Shape(160, 480, 7),
    Shape(960, 80, 7),
    Shape(256, 256, 7),
    Shape(64, 16, 28, ratio=4),
    Shape(16, 8, 112, batch=16),
    Shape(72, 12, 56, batch=16),
    Shape(64, 32, 28, batch=16),
    Shape(120, 20, 28, batch=16),
    Shape(80, 92, 14, batch=16),
    Shape(112, 336, 14, batch=16),
    Shape(960, 80, 7, batch=16),
)
QUICK_SHAPES = (Shape(16, 8, 112), Shape(80, 92, 14), Shape(64, 32, 28, batch=16))

# So little arithmetic that what is left is the time of a call: checks, allocation, dispatch. Batch 8 gives batch
# statistics 32 values a channel, enough for a comparison with float64.
HOST_SHAPE = Shape(16, 8, 2, batch=8)


class Task(NamedTuple):
    """What all peers do: ``module`` is the reference, ``x`` its input in NCHW, both on the device that does it.

    Without ``upstream`` the task is inference, and module and x are of the precision's dtype. With it, the task is a
    forward pass in training mode and the backward pass from ``upstream``, the gradient of the result, to all parameters
    and to ``x`` if that requires one; the parameters are float32 then, and 16-bit precisions mean autocast.
    """

    name: str
    module: nn.Module
    x: Tensor
    upstream: Tensor | None
    precision: Precision = FP32

    @property
    def training(self) -> bool:
        return self.upstream is not None

    def autocast(self) -> contextlib.AbstractContextManager:
        """What the forward pass runs under."""
        if not self.training or self.precision.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.x.device.type, self.precision.dtype)


def unit_task(
    shape: Shape, training: bool = False, precision: Precision = FP32, device: str | torch.device = "cpu"
) -> Task:
    """The unit of this shape: convolution, normalisation and activation for primary and cheap maps alike."""
    torch.manual_seed(0)
    channels = shape.primary * shape.ratio
    unit = FeatureAugment(shape.in_channels, channels, shape.kernel_size, shape.ratio, activation=shape.activation)
    randomise_norms(unit)
    x = torch.randn(shape.batch, shape.in_channels, shape.size, shape.size, device=device)
    size = (shape.batch, channels, *unit.output_size(shape.size, shape.size))
    upstream = torch.randn(size, device=device) if training else None
    return make_task(shape.name, unit, x.requires_grad_(training), upstream, precision)


def network_task(
    in_size: int,
    batch: int,
    training: bool = False,
    precision: Precision = FP32,
    device: str | torch.device = "cpu",
    network: nn.Module | None = None,
    name: str = "HWNet 1.0",
) -> Task:
    """HWNet 1.0, or another classifier of 1000 kinds (10 of small images), on images of ``in_size`` x ``in_size``.

    Training leaves out the optimiser, which all peers share.
    """
    torch.manual_seed(0)
    classes = 1000 if in_size > 64 else 10
    if network is None:
        network = hwnet(1.0, num_classes=classes, in_size=in_size, fused=False)
    randomise_norms(network)
    # The gradient that the mean cross-entropy of an untrained network has, about.
    upstream = (torch.rand(batch, classes).softmax(1) - torch.eye(classes)[torch.arange(batch) % classes]) / batch
    if precision.dtype == torch.float16:
        upstream *= 1024  # as loss scaling does, since gradients vanish in float16
    x = torch.randn(batch, 3, in_size, in_size, device=device)
    return make_task(f"{name}@{in_size} b{batch}", network, x, upstream if training else None, precision)


def make_task(name: str, module: nn.Module, x: Tensor, upstream: Tensor | None, precision: Precision = FP32) -> Task:
    """A task on x's device in this precision, from float32 values."""
    training = upstream is not None
    module = module.to(x.device).train(training)
    if upstream is None:
        return Task(name, module.to(precision.dtype), x.detach().to(precision.dtype), None, precision)
    x = x.detach().to(precision.dtype).requires_grad_(x.requires_grad)
    upstream = upstream.to(x.device, precision.dtype)
    return Task(f"{name} training", module, x, upstream, precision)


def randomise_norms(module: nn.Module) -> None:
    """Weights, biases and running statistics as after some training, so that none of them is a 1 or 0 to leave out."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.3)
            norm.running_mean.normal_(0.0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)

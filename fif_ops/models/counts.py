"""Parameters and multiply-accumulates of a network, counted on the meta device: no memory, no arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def parameter_count(model: nn.Module) -> int:
    """Number of learnable values of the model: weights, biases, normalisations; no running statistics."""
    return sum(p.numel() for p in model.parameters())


def mac_count(model: nn.Module, height: int, width: int, channels: int = 3) -> int:
    """Multiply-accumulates of all Conv2d and Linear layers for one image (channels, height, width).

    Normalisation, bias, activation, addition and pooling are not counted. The model itself is left untouched.
    """
    total = 0

    def count(module: Any, _inputs: Any, output: Tensor) -> None:
        nonlocal total
        # An output value takes as many multiplications as one kernel has weights.
        total += output.numel() * module.weight[0].numel()

    twin = copy.deepcopy(model).to("meta").eval()
    for module in twin.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    with torch.no_grad():
        twin(torch.empty(1, channels, height, width, device="meta"))
    return total

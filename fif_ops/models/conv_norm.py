"""A convolution and its batch normalisation, as one convolution in evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = False
) -> nn.Sequential:
    """[convolution without bias, batch normalisation], [... ReLU]."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([nn.ReLU()] if relu else []))


class ConvNorm(nn.Sequential):
    """``conv_norm`` with the same keys, values and results, and one pass in evaluation.

    There the normalisation goes into the convolution's weight, anew at every call (the weight is small), so that the
    maps are written once; 1x1 convolutions of channels_last maps are products.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*conv_norm(*args, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        conv: Any = self[0]
        norm: Any = self[1]
        if torch.is_grad_enabled() or self._differs() or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        weight = conv.weight * scale.to(conv.weight.dtype)[:, None, None, None]
        shift = shift.to(conv.weight.dtype)
        if conv.kernel_size == (1, 1) and conv.groups == 1 and x.is_contiguous(memory_format=torch.channels_last):
            if conv.stride != (1, 1):
                x = x[:, :, :: conv.stride[0], :: conv.stride[1]]
            y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), shift).permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, weight, shift, conv.stride, conv.padding, groups=conv.groups)
        return y.relu_() if len(self) > 2 else y

    def lower(self, chain: Any, value: int) -> int:
        """One stage of a ``fif_ops.chain.Chain``."""
        return chain.sequence(self, value)

    def _differs(self) -> bool:
        """Whether a part was replaced, got hooks or a forward of its own, or normalises with batch statistics."""
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        for part, kind in zip(self, kinds, strict=False):
            state = part.__dict__
            if type(part) is not kind or state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
                return True
        norm: Any = self[1]
        return len(self) > len(kinds) or norm.training or norm.running_mean is None or norm.weight is None

"""A convolution and its batch normalisation, together: one convolution in evaluation, one Function in training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import backends, ops
from ..autograd import StridedNorm
from ..functional import wants_gradients

# Of the input, from which on one Function is not slower than torch's two on the processor: 128 images in channels_last,
# one thread, 1.4 times as fast for maps of 16x16 and 32x32, as fast for 8x8, 0.65 times for 4x4.
STRIDED_PIXELS = 64


def conv_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1, relu: bool = False
) -> nn.Sequential:
    """[convolution without bias, batch normalisation], [... ReLU]."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), *([nn.ReLU()] if relu else []))


class ConvNorm(nn.Sequential):
    """``conv_norm`` with the same keys, values and results, and one pass in evaluation.

    There the normalisation goes into the convolution's weight, anew at every call (the weight is small), so that the
    maps are written once; 1x1 convolutions of channels_last maps are products. In training on the processor depthwise
    convolutions and their normalisation are one Function.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*conv_norm(*args, **kwargs))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        conv: Any = self[0]
        norm: Any = self[1]
        if x.is_meta or torch.is_autocast_enabled(x.device.type) or not self._plain():
            return super().forward(x)
        if norm.training or torch.is_grad_enabled():
            return self._strided(x) if self._can_stride(x) else super().forward(x)
        if norm.running_mean is None or norm.weight is None:
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

    def _plain(self) -> bool:
        """Whether the parts are such as the constructor makes, without hooks and forwards of their own."""
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        if not 2 <= len(self) <= len(kinds) or not all(map(_is_plain, self, kinds)):
            return False
        conv: Any = self[0]
        return conv.bias is None and conv.dilation == (1, 1) and conv.padding_mode == "zeros"

    def _can_stride(self, x: Tensor) -> bool:
        """Whether training runs as a ``StridedNorm``, which the fused unit's backend must be allowed to."""
        conv: Any = self[0]
        norm: Any = self[1]
        weight, kernel = conv.weight, conv.kernel_size[0]
        return (
            ops.LOADED
            and type(x) is Tensor
            and x.is_cpu
            and x.dtype == weight.dtype
            and x.dim() == 4
            and x.shape[1] == conv.in_channels == conv.out_channels == conv.groups
            and kernel in (3, 5, 7)
            and conv.kernel_size == (kernel, kernel)
            and conv.padding == (kernel // 2, kernel // 2)
            and conv.stride[0] == conv.stride[1]
            and norm.training
            and norm.track_running_stats
            and norm.momentum is not None
            and x.shape[0] > 0
            and x.shape[2] * x.shape[3] >= STRIDED_PIXELS
            and x.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            and x.shape[0] * -(x.shape[2] // -conv.stride[0]) * -(x.shape[3] // -conv.stride[1]) > 1
            and wants_gradients((x, weight, norm.weight, norm.bias))
            and backends.wanted(None) in (None, "cpu")
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
        )

    def _strided(self, x: Tensor) -> Tensor:
        conv: Any = self[0]
        norm: Any = self[1]
        norm.num_batches_tracked.add_(1)
        y = StridedNorm.apply(
            x, conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps, norm.momentum,
            conv.stride[0],
        )  # fmt: skip
        return self[2](y) if len(self) > 2 else y


class PooledConvNorm(nn.Sequential):
    """[average pooling to one pixel, ``conv_norm`` of a 1x1 kernel with ReLU, flatten], its convolution a product.

    Torch's convolution takes ten times as long as a product for maps of one pixel.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), *conv_norm(in_channels, out_channels, 1, relu=True), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels)."""
        parts: list[Any] = list(self)
        if not self._is_product():
            return super().forward(x)
        y = F.linear(parts[0](x).flatten(1), parts[1].weight.flatten(1), parts[1].bias)[:, :, None, None]
        for part in parts[2:]:
            y = part(y)
        return y

    def _is_product(self) -> bool:
        if len(self) != 5 or type(self[0]) is not nn.AdaptiveAvgPool2d or not _is_plain(self[1], nn.Conv2d):
            return False
        pool: Any = self[0]
        conv: Any = self[1]
        one_pixel = pool.output_size in (1, (1, 1)) and conv.kernel_size == (1, 1) and conv.padding == (0, 0)
        return one_pixel and conv.groups == 1

    def lower(self, chain: Any, value: int) -> int:
        """A pooling stage and a convolution's."""
        return chain.sequence(self, value)


def _is_plain(part: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling it does what its type says and nothing else."""
    state = part.__dict__
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return type(part) is kind and "forward" not in state and not any(state[name] for name in hooks)

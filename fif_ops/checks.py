"""What ``feature_augment`` demands of its arguments, in words: the argument, its value, and what would be right."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from .ops import ACTIVATION_CODES
from .reference import Norm, positive_integer


def check_tensor(name: str, value: object, shape: str) -> None:
    """``value`` must be a dense tensor of four dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: must be a torch.Tensor of shape {shape}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} is sparse ({value.layout}): must be dense; convert it with {name}.to_dense()")
    if value.dim() != 4:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: must have 4 dimensions, {shape}")


def check_numbers(stride: int, padding: int | None, groups: int, out_channels: int | None) -> None:
    """Whole numbers in range; ``out_channels`` is compared with the maps that there are later."""
    positive_integer("stride", stride)
    positive_integer("groups", groups)
    if padding is not None:
        positive_integer("padding", padding, least=0)
    if out_channels is not None and (isinstance(out_channels, bool) or not hasattr(out_channels, "__index__")):
        raise TypeError(f"out_channels={out_channels!r}: must be a whole number, or None for all maps")


def check_unit(
    x: Tensor, primary_weight: Tensor, cheap_weight: Tensor, groups: int, shared: bool, activation: str | None
) -> None:
    """The three tensors must fit each other."""
    maps, matrix = primary_weight.shape[0], cheap_weight.shape[1]
    if not x.dtype.is_floating_point:
        raise TypeError(f"x is {x.dtype}: must be a floating type; convert it with x.float()")
    for name, weight in (("primary_weight", primary_weight), ("cheap_weight", cheap_weight)):
        if weight.dtype != x.dtype:
            raise TypeError(f"{name} is {weight.dtype} and x is {x.dtype}: must be the same; cast one, or use autocast")
        if weight.device != x.device:
            raise ValueError(f"{name} is on {weight.device} and x on {x.device}: must be on the same device")
        if weight.shape[2] != weight.shape[3] or weight.shape[2] < 1:
            _bad_shape(name, weight, "square kernels")
    if primary_weight.shape[1] * groups != x.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} channels, and primary_weight {tuple(primary_weight.shape)} with groups={groups} takes "
            f"{primary_weight.shape[1] * groups}: must be equal"
        )
    if maps < 1 or maps % groups:
        _bad_shape("primary_weight", primary_weight, f"a positive multiple of groups={groups} kernels")
    if matrix < 1 or maps % matrix:
        _bad_shape("cheap_weight", cheap_weight, f"kernels over a divisor of the {maps} primary maps")
    if cheap_weight.shape[0] < 1 or (not shared and cheap_weight.shape[0] % (maps // matrix)):
        _bad_shape("cheap_weight", cheap_weight, f"a positive multiple of {maps // matrix} kernels")
    if cheap_weight.shape[2] % 2 == 0:
        _bad_shape("cheap_weight", cheap_weight, "an odd kernel size, to keep the size of the maps")
    if not (activation is None or isinstance(activation, str)) or activation not in ACTIVATION_CODES:
        raise ValueError(f"activation={activation!r}: must be one of {', '.join(map(repr, ACTIVATION_CODES))}")


def check_bias(name: str, bias: Tensor | None, channels: int, x: Tensor) -> None:
    """A convolution's bias has one value a channel and x's dtype."""
    if bias is None:
        return
    _check_vector(name, bias, channels, x)
    if bias.dtype != x.dtype:
        raise TypeError(f"{name} is {bias.dtype} and x is {x.dtype}: must be the same")


def check_norm(name: str, norm: Norm | None, channels: int, x: Tensor) -> None:
    """A Norm of one value a channel, of any floating type, with both running statistics or none."""
    if norm is None:
        return
    if not isinstance(norm, Norm):
        raise TypeError(f"{name} is a {type(norm).__name__}: must be a fif_ops.Norm or None")
    mean, var = norm.running_mean, norm.running_var
    if not norm.training and (mean is None or var is None):
        raise ValueError(f"{name} has training=False and no running statistics: give both, or training=True")
    if (mean is None) != (var is None):
        raise ValueError(f"{name} has only one of running_mean and running_var: give both, or neither")
    for field, value in (("weight", norm.weight), ("bias", norm.bias), ("running_mean", mean), ("running_var", var)):
        if value is not None:
            _check_vector(f"{name}.{field}", value, channels, x)
    for field, number in (("momentum", norm.momentum), ("eps", norm.eps)):
        if not isinstance(number, (float, int)):
            raise TypeError(f"{name}.{field}={number!r}: must be a number")


def _bad_shape(name: str, value: Tensor, wanted: str) -> NoReturn:
    raise ValueError(f"{name} has shape {tuple(value.shape)}: must have {wanted}")


def _check_vector(name: str, value: object, channels: int, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}: must be a torch.Tensor of {channels} values")
    if value.dim() != 1 or value.shape[0] != channels:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: must be ({channels},), one value a channel")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} is {value.dtype}: must be a floating type")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} and x on {x.device}: must be on the same device")

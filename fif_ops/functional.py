"""The functional form of the unit: checks its arguments once, in words, and hands them to a kernel or the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .autograd import Convolutions, FusedUnit, Options, infer, train
from .checks import check_bias, check_norm, check_numbers, check_tensor, check_unit
from .ops import ACTIVATION_CODES
from .reference import Norm, compose

_NO_NORM = Norm(None, None, None, None, False, 0.0, 0.0)


def feature_augment(
    x: Tensor,
    primary_weight: Tensor,
    cheap_weight: Tensor,
    *,
    primary_bias: Tensor | None = None,
    cheap_bias: Tensor | None = None,
    primary_norm: Norm | None = None,
    cheap_norm: Norm | None = None,
    out_channels: int | None = None,
    activation: str | None = "relu",
    splice: bool = True,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    shared: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The feature augment unit in one pass over memory, forward and backward; differentiable twice.

    Args:
        x: (B, C, H, W), any strides; float32, bfloat16, float16 or float64.
        primary_weight: (M, C/groups, k, k), x's dtype; ``primary_bias`` (M) or None.
        cheap_weight: (N, c, d, d), d odd, x's dtype; (n, c, d, d), N = n * M/c, if ``shared``; ``cheap_bias`` too.
        primary_norm, cheap_norm: batch normalisation after each convolution, or None; in training mode their running
            statistics are updated in place.
        out_channels: how many maps to keep; None keeps all.
        activation: after both normalisations: None, "relu", "relu6", "silu", "hardswish" or "gelu" (exact).
        splice: primary maps first, then cheap ones (kernel s of map m at m*S + s); else the cheap ones alone.
        stride, padding, groups: of the primary convolution; padding None means k // 2.
        backend: a name of ``fif_ops.backends.BACKENDS``; None takes the fastest that can run the unit.

    Returns: (B, out_channels, H', W'), a fresh tensor in x's memory format. Under autocast, of the autocast dtype.
    Raises: TypeError or ValueError, naming the argument, its value and what would be right.
    Source: S0 [0142]-[0197]; the zero padding of the cheap convolution comes after the activation.
    """
    return resolve(
        x, primary_weight, cheap_weight, primary_bias, cheap_bias, primary_norm, cheap_norm, out_channels, activation,
        splice, stride, padding, groups, shared, backend,
    )()  # fmt: skip


class Call(NamedTuple):
    """A unit's call after all checks: on the kernels of ``options``, or without options the reference's ``compose``."""

    convolutions: Convolutions
    norms: tuple[Any, ...]
    options: Options | None
    wants_grad: bool
    composition: Callable[[], Tensor] | None = None

    def __call__(self) -> Tensor:
        if self.composition is not None:
            return self.composition()
        assert self.options is not None
        if self.wants_grad:
            return FusedUnit.apply(*self.convolutions, *self.norms, self.options)
        if any(self.options.batch):
            return train(self.convolutions, self.norms, self.options)[0]
        return infer(self.convolutions, self.norms, self.options)


def resolve(
    x: Tensor,
    primary_weight: Tensor,
    cheap_weight: Tensor,
    primary_bias: Tensor | None,
    cheap_bias: Tensor | None,
    primary_norm: Norm | None,
    cheap_norm: Norm | None,
    out_channels: int | None,
    activation: str | None,
    splice: bool,
    stride: int,
    padding: int | None,
    groups: int,
    shared: bool,
    backend: str | None = None,
) -> Call:
    """What ``feature_augment`` does with these arguments. Raises as it does."""
    check_tensor("x", x, "(batch, channels, height, width)")
    check_tensor("primary_weight", primary_weight, "(M, channels / groups, k, k)")
    check_tensor("cheap_weight", cheap_weight, "(N, c, d, d)")
    check_numbers(stride, padding, groups, out_channels)
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, primary_weight, cheap_weight = (_autocast(t, dtype) for t in (x, primary_weight, cheap_weight))
        primary_bias = None if primary_bias is None else _autocast(primary_bias, dtype)
        cheap_bias = None if cheap_bias is None else _autocast(cheap_bias, dtype)
    maps, matrix = primary_weight.shape[0], cheap_weight.shape[1]
    if shared and matrix == 1 and maps > 0:
        # One kernel set repeated for every map is an ordinary depthwise convolution, which the kernels have.
        cheap_weight = cheap_weight.repeat(maps, 1, 1, 1)
        cheap_bias = None if cheap_bias is None else cheap_bias.repeat(maps)
        shared = False
    padding = primary_weight.shape[-1] // 2 if padding is None else padding
    cheap_maps = cheap_weight.shape[0] * (maps // matrix if shared and matrix else 1)
    total = cheap_maps + (maps if splice else 0)
    check_unit(x, primary_weight, cheap_weight, groups, shared, activation)
    out_channels = total if out_channels is None else out_channels
    if not 0 < out_channels <= total:
        raise ValueError(f"out_channels={out_channels}: must be from 1 to {total}, the maps that the unit makes")
    check_bias("primary_bias", primary_bias, maps, x)
    check_bias("cheap_bias", cheap_bias, cheap_weight.shape[0], x)
    check_norm("primary_norm", primary_norm, maps, x)
    check_norm("cheap_norm", cheap_norm, cheap_maps, x)

    norm1, norm2 = primary_norm or _NO_NORM, cheap_norm or _NO_NORM
    convolutions: Convolutions = (x, primary_weight, cheap_weight, primary_bias, cheap_bias)
    wants_grad = wants_gradients((*convolutions, norm1.weight, norm1.bias, norm2.weight, norm2.bias))
    cuts_primary = splice and out_channels < maps
    problem = backends.Problem(x, primary_weight, cheap_weight, stride, padding, groups, cuts_primary)
    trains = wants_grad or norm1.training or norm2.training
    chosen = backends.choose(problem, backend, trains)
    if chosen is backends.REFERENCE:
        composition = functools.partial(
            compose, x, primary_weight, cheap_weight, primary_bias=primary_bias, cheap_bias=cheap_bias,
            primary_norm=primary_norm, cheap_norm=cheap_norm, out_channels=out_channels, activation=activation,
            splice=splice, stride=stride, padding=padding, groups=groups, shared=shared,
        )  # fmt: skip
        return Call(convolutions, (), None, wants_grad, composition)
    if not chosen.fuses_primary(problem, trains):
        maps_before_norm = F.conv2d(x, primary_weight, primary_bias, stride, padding, 1, groups)
        convolutions = (maps_before_norm, None, cheap_weight, None, cheap_bias)
        stride = groups = 1
    norms = (*norm1[:4], *norm2[:4])
    options = Options(
        (norm1.eps, norm2.eps),
        out_channels,
        activation,
        ACTIVATION_CODES[activation],
        splice,
        (norm1.training, norm2.training),
        (norm1.momentum, norm2.momentum),
        stride,
        groups,
        x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.allow_tf32,
        chosen.namespace,
    )
    x = convolutions[0]
    if any(options.batch) and _values_per_channel(x, options.stride) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
    return Call(convolutions, norms, options, wants_grad)


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """As torch does for convolutions: integers, complex numbers and float64 stay what they are."""
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def wants_gradients(tensors: Iterable[Tensor | None]) -> bool:
    """Whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _values_per_channel(x: Tensor, stride: int) -> int:
    return x.shape[0] * -(x.shape[2] // -stride) * -(x.shape[3] // -stride)

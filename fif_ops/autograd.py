"""The autograd Function of the fused unit: one operator forward, one backward, all gradients by hand.

Saved between them: the inputs, the primary maps before normalisation, and mean and rstd of both normalisations; all the
rest is recomputed. A second derivative goes through the composition of the reference, which is differentiable.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import Norm, compose

# x, both weights, both biases; without a primary weight x holds the primary maps, which another convolution made.
Convolutions = tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]


class Options(NamedTuple):
    """What the operators take beside tensors; ``batch`` says which normalisation uses batch statistics."""

    eps: tuple[float, float]
    out_channels: int
    activation: str | None
    activation_code: int
    splice: bool
    batch: tuple[bool, bool]
    momentum: tuple[float, float]
    stride: int = 1
    groups: int = 1
    tf32: bool = False
    namespace: str = "fif_ops"  # of the operators that run it

    def operator(self, name: str) -> Any:
        """infer, train or backward of the backend that was chosen."""
        return getattr(getattr(torch.ops, self.namespace), name).default


class FusedUnit(torch.autograd.Function):
    """Takes the ``Convolutions``, weight, bias, running mean and variance of both norms, and the options."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        primary_weight: Tensor | None,
        cheap_weight: Tensor,
        primary_bias: Tensor | None,
        cheap_bias: Tensor | None,
        weight1: Tensor | None,
        bias1: Tensor | None,
        mean1: Tensor | None,
        var1: Tensor | None,
        weight2: Tensor | None,
        bias2: Tensor | None,
        mean2: Tensor | None,
        var2: Tensor | None,
        options: Options,
    ) -> Tensor:
        convolutions = (x, primary_weight, cheap_weight, primary_bias, cheap_bias)
        norms = (weight1, bias1, mean1, var1, weight2, bias2, mean2, var2)
        out, raw, stats1, stats2 = train(convolutions, norms, options)
        if primary_weight is None:
            raw = x
        ctx.save_for_backward(*convolutions, weight1, bias1, weight2, bias2, raw, stats1, stats2)
        ctx.options = options
        ctx.normed = (options.batch[0] or mean1 is not None, options.batch[1] or mean2 is not None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(ctx, grad)
        x, w1, w2, primary_bias, cheap_bias, weight1, bias1, weight2, bias2, raw, stats1, stats2 = ctx.saved_tensors
        options: Options = ctx.options
        need = ctx.needs_input_grad
        # The primary convolution's bias is part of the raw maps already.
        shift2 = bias2 if ctx.normed[1] else cheap_bias
        grad_x, grad_w1, grad_w2, norm1, norm2 = options.operator("backward")(
            grad,
            x,
            w1,
            w2,
            raw,
            stats1,
            stats2,
            weight1,
            bias1,
            weight2,
            shift2,
            options.activation_code,
            options.splice,
            *options.batch,
            need[0],
            need[1],
            stride=options.stride,
            groups=options.groups,
            tf32=options.tf32,
        )
        grad_weight1, grad_bias1 = norm1.unbind()
        grad_weight2, grad_bias2 = norm2.unbind()
        return (
            grad_x if need[0] else None,
            grad_w1 if need[1] else None,
            grad_w2 if need[2] else None,
            _bias_gradient(primary_bias, norm1, stats1, weight1, ctx.normed[0], options.batch[0]) if need[3] else None,
            _bias_gradient(cheap_bias, norm2, stats2, weight2, ctx.normed[1], options.batch[1]) if need[4] else None,
            grad_weight1.to(weight1.dtype) if need[5] else None,
            grad_bias1.to(bias1.dtype) if need[6] else None,
            None,
            None,
            grad_weight2.to(weight2.dtype) if need[9] else None,
            grad_bias2.to(bias2.dtype) if need[10] else None,
            None,
            None,
            None,
        )


class StridedNorm(torch.autograd.Function):
    """A depthwise convolution and its normalisation with batch statistics, on the processor.

    Takes x, the convolution's weight, the normalisation's weight, bias, running mean and variance, eps, momentum and
    the stride. A second derivative goes through torch's own convolution and normalisation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        eps: float,
        momentum: float,
        stride: int,
    ) -> Tensor:
        out, raw, stats = torch.ops.fif_ops.strided_train(
            x, weight, norm_weight, norm_bias, mean, var, eps, momentum, stride
        )
        ctx.save_for_backward(x, weight, norm_weight, norm_bias, raw, stats)
        ctx.eps, ctx.stride = eps, stride
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, norm_weight, norm_bias, raw, stats = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable_strided_backward(ctx, grad)
        grad_x, grad_weight, norm = torch.ops.fif_ops.strided_backward(
            grad, x, weight, raw, stats, norm_weight, need[0], ctx.stride
        )
        return (
            grad_x if need[0] else None,
            grad_weight if need[1] else None,
            norm[0].to(norm_weight.dtype) if need[2] else None,
            norm[1].to(norm_bias.dtype) if need[3] else None,
            *[None] * 5,
        )


def _differentiable_strided_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Aliases, as in _differentiable_backward.
    tensors: list[Any] = [None if t is None else t.view_as(t) for t in ctx.saved_tensors[:4]]
    x, weight, norm_weight, norm_bias = tensors
    raw = F.conv2d(x, weight, None, ctx.stride, weight.shape[-1] // 2, groups=x.shape[1])
    out = F.batch_norm(raw, None, None, norm_weight, norm_bias, True, 0.0, ctx.eps)
    return _differentiable_gradients(ctx, out, grad, dict(enumerate(tensors)))


def infer(convolutions: Convolutions, norms: tuple[Tensor | None, ...], options: Options) -> Tensor:
    """The forward operator without gradients and batch statistics."""
    return options.operator("infer")(
        *convolutions,
        *norms,
        *options.eps,
        options.out_channels,
        options.activation_code,
        options.splice,
        stride=options.stride,
        groups=options.groups,
        tf32=options.tf32,
    )


def train(
    convolutions: Convolutions, norms: tuple[Tensor | None, ...], options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward operator that can use batch statistics: output, raw primary maps, [mean, rstd] of both norms."""
    return options.operator("train")(
        *convolutions,
        *norms,
        *options.eps,
        options.out_channels,
        options.activation_code,
        options.splice,
        *options.batch,
        *options.momentum,
        stride=options.stride,
        groups=options.groups,
        tf32=options.tf32,
    )


def _bias_gradient(
    bias: Tensor, norm: Tensor, stats: Tensor, weight: Tensor | None, normed: bool, batch: bool
) -> Tensor:
    """Of a convolution's bias, from the gradient of what is added after the normalisation."""
    if batch:
        return torch.zeros_like(bias)  # batch statistics take a constant away again
    gradient = norm[1]
    if normed:
        gradient = gradient * stats[1] if weight is None else gradient * stats[1] * weight
    return gradient.to(bias.dtype)


def _differentiable_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients as functions of inputs and ``grad``: the backward of the composition."""
    options: Options = ctx.options
    saved = ctx.saved_tensors
    stats = (saved[10], saved[11])
    # Aliases, so that only the way through this unit counts where a tensor is used elsewhere too.
    tensors: list[Any] = [None if t is None else t.view_as(t) for t in saved[:9]]
    x, w1, w2, primary_bias, cheap_bias, weight1, bias1, weight2, bias2 = tensors

    def norm(i: int, conv_bias: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Norm | None:
        if not ctx.normed[i]:
            return None
        if options.batch[i]:
            return Norm(weight, bias, None, None, True, 0.0, options.eps[i])
        mean, rstd = stats[i]
        if i == 1 and conv_bias is not None:
            mean = mean + conv_bias.detach()  # the cheap maps are normalised without it
        return Norm(weight, bias, mean, rstd**-2 - options.eps[i], False, 0.0, options.eps[i])

    out = compose(
        x,
        w1,
        w2,
        primary_bias=primary_bias,
        cheap_bias=cheap_bias,
        primary_norm=norm(0, primary_bias, weight1, bias1),
        cheap_norm=norm(1, cheap_bias, weight2, bias2),
        out_channels=options.out_channels,
        activation=options.activation,
        splice=options.splice,
        stride=options.stride,
        groups=options.groups,
    )
    # Positions of the nine saved inputs among forward's arguments.
    return _differentiable_gradients(ctx, out, grad, dict(zip((0, 1, 2, 3, 4, 5, 6, 9, 10), tensors, strict=True)))


def _differentiable_gradients(
    ctx: Any, out: Tensor, grad: Tensor, tensors: dict[int, Any]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``out`` as functions, in the places that backward returns them in; ``tensors``: by place."""
    result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    wanted = [place for place in tensors if ctx.needs_input_grad[place]]
    gradients = torch.autograd.grad(
        out, [tensors[place] for place in wanted], grad, create_graph=True, allow_unused=True
    )
    for place, gradient in zip(wanted, gradients, strict=True):
        result[place] = gradient
    return tuple(result)

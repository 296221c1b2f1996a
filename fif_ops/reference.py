"""The feature augment unit ("FiF") in plain PyTorch: the definition that every fused path is tested against.

A primary convolution makes M maps y; cheap d x d convolutions over c of those maps each make N more maps z;
the unit returns cat(y, z), or z alone. Source: S0 [0142]-[0197] and claims 1-7.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
}

_ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
}

_Unit = TypeVar("_Unit", bound="FeatureAugment")


class Norm(NamedTuple):
    """One batch normalisation, as the functional forms take it.

    All tensors have one value per channel. ``training`` says whether batch statistics normalise (the running ones
    are then updated, if given); ``momentum`` is the update factor, 0.0 leaves the running statistics alone.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def memory_format_of(x: Tensor) -> torch.memory_format:
    """``torch.channels_last`` if the strides of x (B, C, H, W) are ordered so, else ``torch.contiguous_format``.

    The rule is torch's own for the results of convolutions: it also holds for slices, and it tells the two formats
    apart on 1 x 1 maps, where ``is_contiguous`` says yes to both.
    """
    size, stride = x.shape, x.stride()
    if stride[1] == 0:
        return torch.contiguous_format
    smallest = 0
    for dim in (1, 3, 2, 0):
        if size[dim] == 0 or stride[dim] < smallest or (dim == 0 and smallest == stride[1]):
            return torch.contiguous_format
        smallest = stride[dim] * max(size[dim], 1)
    return torch.channels_last


def compose(
    x: Tensor,
    primary_weight: Tensor | None,
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
) -> Tensor:
    """The unit as a composition of torch functions: any dtype and device, differentiable twice.

    x: (B, C, H, W). primary_weight: (M, C/groups, k, k), or None if x holds the primary maps already. cheap_weight:
    (N, c, d, d) with d odd, or (n, c, d, d) if ``shared``, when all M/c groups of maps use the same n kernels, so that
    N = n * M/c. primary_bias: (M);
    cheap_bias: (N), or (n) if ``shared``. padding: of the primary convolution, k // 2 if None.
    Returns (B, out_channels, H', W') in x's memory format, always a fresh tensor: y before z if ``splice``, else z;
    kernel s of map m at channel m*S + s; cut to ``out_channels`` if given. Normalisation, then activation, follow each
    convolution, and the zero padding of the cheap one comes after that activation.
    Source: S0 [0142]-[0197].
    """
    y = x
    if primary_weight is not None:
        primary_padding = primary_weight.shape[-1] // 2 if padding is None else padding
        y = F.conv2d(x, primary_weight, primary_bias, stride, primary_padding, 1, groups)
    y = _norm_activation(y, primary_norm, activation)
    matrix_groups = y.shape[1] // cheap_weight.shape[1]
    z = _cheap_convolution(y, cheap_weight, cheap_bias, matrix_groups, shared)
    z = _norm_activation(z, cheap_norm, activation)
    return _assemble(y, z, out_channels, splice, memory_format_of(x))


def _norm_activation(x: Tensor, norm: Norm | None, activation: str | None) -> Tensor:
    if norm is not None:
        x = F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps
        )
    return x if activation is None else _ACTIVATION_FUNCTIONS[activation](x)


def _cheap_convolution(y: Tensor, weight: Tensor, bias: Tensor | None, groups: int, shared: bool) -> Tensor:
    if shared:
        weight = weight.repeat(groups, 1, 1, 1)
        bias = None if bias is None else bias.repeat(groups)
    return F.conv2d(y, weight, bias, 1, weight.shape[-1] // 2, 1, groups)


def _assemble(y: Tensor, z: Tensor, out_channels: int | None, splice: bool, layout: torch.memory_format) -> Tensor:
    if splice:
        if out_channels is not None and out_channels < y.shape[1] + z.shape[1]:
            y, z = y[:, :out_channels], z[:, : max(out_channels - y.shape[1], 0)]
        return torch.cat([y, z], 1).contiguous(memory_format=layout)
    if out_channels is not None and out_channels < z.shape[1]:
        # clone, since contiguous() would hand back a view of z for a batch of one
        return z[:, :out_channels].clone(memory_format=layout)
    return z.contiguous(memory_format=layout)


class SharedConv2d(nn.Conv2d):
    """A grouped convolution whose groups all use the same kernels (S0 [0178]-[0181], [0190], claim 5).

    ``weight`` is (n, c, d, d) and ``bias`` (n); input (B, c*repeats, H, W), output (B, n*repeats, H, W), where group g
    makes the channels g*n to g*n + n - 1.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, repeats: int, bias: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        self.repeats = repeats

    def forward(self, input: Tensor) -> Tensor:
        return _cheap_convolution(input, self.weight, self.bias, self.repeats, shared=True)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, repeats={self.repeats}"


class FeatureAugment(nn.Module):
    """The feature augment unit (FiF): M primary maps, cheap maps made from them, and both concatenated.

    Spliced (S0 claim 6): M = ceil(out_channels / ratio), each map gets ratio - 1 cheap ones. Not spliced: M likewise,
    each map gets ``ratio`` cheap ones and the primary maps are dropped. The result is cut to ``out_channels``.

    Args:
        in_channels, out_channels: maps in and out.
        kernel_size, stride, padding, groups: of the primary convolution; padding None means kernel_size // 2.
        ratio: maps out per primary map; at least 2 if spliced.
        cheap_kernel_size: odd; the cheap convolution keeps the size of the maps.
        activation: after both normalisations; None, "relu", "relu6", "silu", "hardswish", "gelu" or such a module.
        norm: "batch" or None, after both convolutions.
        splice: whether the primary maps are part of the result.
        matrix_channels: primary maps that one cheap kernel reads (c in S0 [0184]-[0193]).
        shared: one set of cheap kernels for all groups of maps (S0 claim 5).
        bias: whether the convolutions have one.
        strict: also demand S0's claim 2, more cheap kernels than primary maps and matrix_channels below M.

    Shapes: x (B, in_channels, H, W) to (B, out_channels, H', W') in x's memory format, any floating dtype.
    Checkpoint keys: ``primary_conv.0/1.*`` and ``cheap_operation.0/1.*``, as in the public Ghost modules.
    Raises TypeError or ValueError, naming the argument, its value and the nearest values that would do.
    Source: S0 [0142]-[0197], claims 1-7. Normalisation and activation are not in S0; they are Ghost's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        ratio: int = 2,
        cheap_kernel_size: int = 3,
        stride: int = 1,
        activation: str | nn.Module | None = "relu",
        norm: str | None = "batch",
        splice: bool = True,
        matrix_channels: int = 1,
        shared: bool = False,
        groups: int = 1,
        bias: bool = False,
        padding: int | None = None,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = positive_integer("in_channels", in_channels)
        self.out_channels = positive_integer("out_channels", out_channels)
        self.kernel_size = positive_integer("kernel_size", kernel_size)
        self.ratio = positive_integer("ratio", ratio)
        self.cheap_kernel_size = positive_integer("cheap_kernel_size", cheap_kernel_size)
        self.stride = positive_integer("stride", stride)
        self.activation = _activation_name(activation)
        self.norm = norm
        self.splice = bool(splice)
        self.matrix_channels = positive_integer("matrix_channels", matrix_channels)
        self.shared = bool(shared)
        self.groups = positive_integer("groups", groups)
        self.bias = bool(bias)
        self.padding = self.kernel_size // 2 if padding is None else positive_integer("padding", padding, least=0)
        self.strict = bool(strict)
        self.primary_channels = -(-self.out_channels // self.ratio)
        self.cheap_channels = self.primary_channels * (self.ratio - self.splice)
        self._check()
        self._build()

    def _check(self) -> None:
        m, c = self.primary_channels, self.matrix_channels
        if self.norm not in ("batch", None):
            raise ValueError(f'norm={self.norm!r}: must be "batch" or None')
        if self.cheap_kernel_size % 2 == 0:
            d = self.cheap_kernel_size
            raise ValueError(
                f"cheap_kernel_size={d}: must be odd, to keep the size of the maps; use {d - 1} or {d + 1}"
            )
        if self.splice and self.ratio == 1:
            raise ValueError("ratio=1: a spliced unit would have no cheap maps; use ratio >= 2, or splice=False")
        if self.in_channels % self.groups:
            raise ValueError(
                f"in_channels={self.in_channels} does not divide into groups={self.groups}; nearest in_channels: "
                f"{_nearest_multiples(self.in_channels, self.groups)}; nearest groups: "
                f"{_nearest_divisors(self.in_channels, self.groups)}"
            )
        for name, value in (("groups", self.groups), ("matrix_channels", c)):
            if m % value:
                raise ValueError(
                    f"{name}={value} does not divide the {m} primary maps of out_channels={self.out_channels}, "
                    f"ratio={self.ratio}; nearest {name}: {_nearest_divisors(m, value)}; nearest out_channels: "
                    f"{self._nearest_out_channels(math.lcm(self.groups, c))}"
                )
        if self.strict:
            self._check_claim_2()

    def _check_claim_2(self) -> None:
        m, n, c = self.primary_channels, self.cheap_channels, self.matrix_channels
        if n <= m:
            least = 3 if self.splice else 2
            raise ValueError(
                f"ratio={self.ratio} makes {n} cheap maps of {m} primary ones, and strict=True (S0 claim 2) wants more "
                f"cheap than primary maps; use ratio >= {least}, or strict=False"
            )
        if c >= m:
            below = max((v for v in range(1, m) if m % v == 0), default=None)
            remedy = "more out_channels" if below is None else f"matrix_channels <= {below}"
            raise ValueError(
                f"matrix_channels={c} is not below the {m} primary maps, as strict=True (S0 claim 2) wants; "
                f"use {remedy}, or strict=False"
            )

    def _nearest_out_channels(self, multiple: int) -> str:
        below = self.primary_channels // multiple * multiple
        above = (below + multiple - 1) * self.ratio + 1
        return f"{below * self.ratio} or {above}" if below else str(above)

    def _build(self) -> None:
        m, n, c, d = self.primary_channels, self.cheap_channels, self.matrix_channels, self.cheap_kernel_size
        primary = nn.Conv2d(
            self.in_channels, m, self.kernel_size, self.stride, self.padding, groups=self.groups, bias=self.bias
        )
        cheap: nn.Conv2d
        if self.shared:
            cheap = SharedConv2d(c, n * c // m, d, repeats=m // c, bias=self.bias)
        else:
            cheap = nn.Conv2d(m, n, d, padding=d // 2, groups=m // c, bias=self.bias)
        self.primary_conv = self._stage(primary, m)
        self.cheap_operation = self._stage(cheap, n)

    def _stage(self, conv: nn.Module, channels: int) -> nn.Sequential:
        stage = nn.Sequential(conv, nn.BatchNorm2d(channels) if self.norm == "batch" else nn.Identity())
        if self.activation is not None:
            stage.append(ACTIVATIONS[self.activation]())
        return stage

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, H', W'), a fresh tensor in x's memory format."""
        if x.dim() != 4:
            raise ValueError(
                f"x has shape {tuple(x.shape)}: must have 4 dimensions, (batch, {self.in_channels}, height, width)"
            )
        y = self.primary_conv(x)
        z = self.cheap_operation(y)
        return _assemble(y, z, self.out_channels, self.splice, memory_format_of(x))

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, by name, that make a module like this one."""
        names = (
            "in_channels out_channels kernel_size ratio cheap_kernel_size stride activation norm splice "
            "matrix_channels shared groups bias padding strict"
        )
        return {name: getattr(self, name) for name in names.split()}

    def extra_repr(self) -> str:
        fields = self.config()
        channels = f"{fields.pop('in_channels')}, {fields.pop('out_channels')}, "
        return channels + ", ".join(f"{name}={value!r}" for name, value in fields.items())

    @classmethod
    def _copy_of(cls: type[_Unit], unit: FeatureAugment) -> _Unit:
        """A ``cls`` with copies of the unit's submodules: same values, dtype, device, flags; no storage shared."""
        with torch.device("meta"):  # no memory and no random numbers spent on weights that are replaced at once
            twin = cls(**unit.config())
        for name, module in unit._modules.items():
            twin._modules[name] = copy.deepcopy(module)
        twin.training = unit.training
        return twin

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the result for maps of height x width pixels."""
        reach = 2 * self.padding - self.kernel_size
        return (height + reach) // self.stride + 1, (width + reach) // self.stride + 1

    def parameter_count(self) -> int:
        """Number of learnable values: weights, biases, and the normalisations' weights and biases."""
        return sum(p.numel() for p in self.parameters())

    def mac_count(self, height: int, width: int) -> int:
        """Multiply-accumulates of both convolutions on one image with input maps of height x width pixels.

        M * C/g * k^2 + N * c * d^2 per output pixel; normalisation, activation and bias are not counted. Sharing
        kernels saves parameters, not multiplications.
        """
        h, w = self.output_size(height, width)
        return h * w * self._macs_per_pixel()

    def _macs_per_pixel(self) -> int:
        primary = self.primary_channels * (self.in_channels // self.groups) * self.kernel_size**2
        return primary + self.cheap_channels * self.matrix_channels * self.cheap_kernel_size**2

    def _standard_weights(self) -> int:
        return self.out_channels * self.in_channels * self.kernel_size**2

    def parameter_ratio(self) -> float:
        """Weights of the standard convolution that the unit replaces over the unit's own; above 1 is a saving.

        The standard convolution has groups=1, the same kernel size and ``out_channels`` outputs. Convolution weights
        only: no biases, no normalisation. It is S0's r_c (formulas (3), (4)) counted, not approximated.
        """
        shared_over = self.primary_channels // self.matrix_channels if self.shared else 1
        cheap = self.cheap_channels * self.matrix_channels * self.cheap_kernel_size**2
        return self._standard_weights() / (self._macs_per_pixel() - cheap + cheap // shared_over)

    def mac_ratio(self) -> float:
        """Multiply-accumulates of the replaced standard convolution (see parameter_ratio) over the unit's own.

        It does not depend on the size of the maps. It is S0's r_s (formulas (1), (2)) counted, not approximated.
        """
        return self._standard_weights() / self._macs_per_pixel()

    def formula_ratio(self) -> float:
        """S*C / (S + C - 1), which S0 prints for both ratios (formulas (1)-(4)), with S = ratio and C = in_channels.

        Equal to ``parameter_ratio()`` and ``mac_ratio()`` exactly when the unit is spliced (S counts the identity
        map), cheap_kernel_size == kernel_size, matrix_channels == 1, groups == 1, not shared (sharing leaves
        ``mac_ratio()`` exact) and ratio divides out_channels. Elsewhere it is only an estimate, and S0's second
        form, "about S", is only its limit for large C.
        """
        s, c = self.ratio, self.in_channels
        return s * c / (s + c - 1)


def positive_integer(name: str, value: int, least: int = 1) -> int:
    """``value`` as an int; TypeError or ValueError, naming the argument, if it is none or below ``least``."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r}: must be one integer, {least} or more") from None
    if value < least:
        raise ValueError(f"{name}={value}: must be {least} or more")
    return value


def _activation_name(activation: str | nn.Module | None) -> str | None:
    if activation is None or (isinstance(activation, str) and activation in ACTIVATIONS):
        return activation
    for name, kind in ACTIVATIONS.items():
        if type(activation) is kind and getattr(activation, "approximate", "none") == "none":
            return name
    raise ValueError(
        f"activation={activation!r}: must be None, one of {', '.join(map(repr, ACTIVATIONS))}, or an instance of "
        f"{', '.join(kind.__name__ for kind in ACTIVATIONS.values())} (GELU with approximate='none')"
    )


def _nearest_multiples(value: int, divisor: int) -> str:
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else str(divisor)


def _nearest_divisors(value: int, wanted: int) -> str:
    divisors = [v for v in range(1, value + 1) if value % v == 0]
    below = [v for v in divisors if v < wanted]
    above = [v for v in divisors if v > wanted]
    return " or ".join(str(v) for v in below[-1:] + above[:1])

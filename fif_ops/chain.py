"""A module as a chain of stages: what csrc/frozen.cpp runs in one operator, constants folded and packed beforehand.

Modules with stages of their own (units, spindles, networks) have a method ``lower(chain, value)``, which adds them; the
layers between are those of ``Chain._LAYERS``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .reference import ACTIVATIONS, FeatureAugment

# Of csrc/frozen.cpp: kinds of stages; what stands for no value, and for the input and the result of all.
_UNIT, _POOL = 0, 1
_NONE, _ENDS = -2, -1
_ACTIVATION_NAMES = {kind: name for name, kind in ACTIVATIONS.items()}


class Program(NamedTuple):
    """What the operator ``run`` takes beside x, in this order, and the dtype that x must have."""

    program: Tensor  # a line a stage
    packed: Tensor  # the constants of all
    out_channels: int
    stride: int  # of the result against x; 0 for a single pixel
    dtype: torch.dtype


class _Unsupported(Exception):
    """The module has a part that no stage does."""


@dataclasses.dataclass
class _Geometry:
    """The numbers of a stage, in the order of csrc/frozen.cpp: of a unit, or of a convolution (no cheap maps)."""

    channels: int
    primary: int
    multiplier: int = 0
    out_channels: int = 0
    kernel: int = 1
    activation: int = 0
    splice: int = 1
    primary_kernel: int = 1
    stride: int = 1
    depthwise_kernel: int = 0  # of the depthwise convolution behind the unit
    depthwise_stride: int = 1


@dataclasses.dataclass
class _Parameters:
    """What ``pack`` takes: weights, and what comes after their products, as factors and addends of every map."""

    weight: Tensor
    cheap_weight: Tensor | None = None
    depthwise_weight: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    cheap_scale: Tensor | None = None
    cheap_shift: Tensor | None = None
    depthwise_scale: Tensor | None = None
    depthwise_shift: Tensor | None = None


@dataclasses.dataclass
class _Stage:
    """A line of the program (without slots) and its parameters; none for means over all pixels.

    Values are named by the stage that makes them: ``value`` is the one that it reads, ``add`` the one that it adds.
    """

    value: int
    geometry: _Geometry
    parameters: _Parameters | None = None
    add: int = _NONE

    @property
    def line(self) -> list[int]:
        kind = _POOL if self.parameters is None else _UNIT
        return [kind, self.value, _ENDS, self.add, *dataclasses.astuple(self.geometry), 0]

    @property
    def stride(self) -> int:
        """Of the result against the value read; 0 for a single pixel."""
        return 0 if self.parameters is None else self.geometry.stride * self.geometry.depthwise_stride

    def pack(self, line: list[int]) -> Tensor:
        """The constants; whether the line's slots say that the unit stands alone matters."""
        if self.parameters is None:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        tensors = [getattr(self.parameters, field.name) for field in dataclasses.fields(self.parameters)]
        return torch.ops.fif_ops.pack(torch.tensor([line], device="cpu"), *tensors)


def _slots(stages: Sequence[_Stage]) -> list[list[int]]:
    """The program's lines, with slots of scratch memory for values: as few as hold what is still to be read."""
    last_use = {value: i for i, stage in enumerate(stages) for value in (stage.value, stage.add)}
    slot_of = {_ENDS: _ENDS, _NONE: _NONE}
    free: list[int] = []
    lines = []
    for i, stage in enumerate(stages):
        line = stage.line
        line[1], line[3] = slot_of[stage.value], slot_of[stage.add]
        if i < len(stages) - 1:
            slot_of[i] = line[2] = free.pop() if free else len([v for v in slot_of if v >= 0])
        free += [slot_of[v] for v in {stage.value, stage.add} if v >= 0 and last_use[v] == i]
        lines.append(line)
    return lines


class Chain:
    """Stages, gathered module by module; every method takes a value's name and returns that of its result.

    ``fuse`` makes a FusedFiF of a plain unit; without it the latter is no stage.
    """

    def __init__(self, fuse: Callable[[FeatureAugment], nn.Module] | None = None) -> None:
        self.fuse = fuse
        self.stages: list[_Stage] = []
        self.has_unit = False
        self.kept: set[int] = set()  # values that somebody else reads too, so that their stages must not change
        self.pooled = self.flat = False  # whether maps have one pixel by now, and whether that dimension is gone

    @classmethod
    def of(cls, module: nn.Module, fuse: Callable[[FeatureAugment], nn.Module] | None = None) -> Chain | None:
        """The module as a chain, None if a part of it is no stage, or none of it a unit."""
        chain = cls(fuse)
        try:
            with torch.no_grad():
                value = chain.add(module, _ENDS)
        except _Unsupported:
            return None
        # Stages run in order, so the last one has the result; a convolution alone is torch's business.
        return chain if chain.has_unit and value == len(chain.stages) - 1 else None

    def program(self) -> Program:
        """The stages for the operator ``run``, their constants packed for the instruction set in use."""
        lines = _slots(self.stages)
        packed = [stage.pack(line) for stage, line in zip(self.stages, lines, strict=True)]
        strides = {_ENDS: 1}  # of every value against the input; 0 after pooling
        for i, (stage, line) in enumerate(zip(self.stages, lines, strict=True)):
            line[-1] = sum(map(len, packed[:i]))
            strides[i] = strides[stage.value] * stage.stride
        first, last = self.stages[0].parameters, len(self.stages) - 1
        assert first is not None  # pool
        table = torch.tensor(lines, device="cpu")
        return Program(
            table, torch.cat(packed), self.stages[last].geometry.out_channels, strides[last], first.weight.dtype
        )

    def add(self, module: nn.Module, value: int) -> int:
        """The stages of one module."""
        _require(not _changed(module))
        if type(module) is FeatureAugment and self.fuse is not None:
            module = self.fuse(module)
        kind = type(module)
        if kind in self._LAYERS:
            return self._LAYERS[kind](self, module, value)
        _require("lower" in kind.__dict__)  # a subclass may compute something else
        return module.lower(self, value)  # type: ignore[operator]

    def sequence(self, modules: Iterable[nn.Module], value: int) -> int:
        """Modules one after the other; a convolution takes the normalisation and activation behind it along."""
        parts = list(modules)
        while parts:
            is_convolution = isinstance(parts[0], nn.Conv2d)
            value = self.convolution(parts, value) if is_convolution else self.add(parts.pop(0), value)
        return value

    def convolution(self, parts: list[nn.Module], value: int) -> int:
        conv: Any = parts.pop(0)
        _require(not self.flat)
        norm: Any = parts.pop(0) if parts and isinstance(parts[0], nn.BatchNorm2d) else None
        activation = None
        if parts and type(parts[0]) in _ACTIVATION_NAMES:
            last: Any = parts.pop(0)
            _require(not _changed(last) and getattr(last, "approximate", "none") == "none")
            activation = _ACTIVATION_NAMES[type(last)]
        _require(type(conv) is nn.Conv2d and not _changed(conv))
        scale, shift = _affine(conv, norm)
        if conv.groups == conv.in_channels == conv.out_channels and conv.groups > 1:
            return self.depthwise(conv, scale, shift, value, activation)
        _require(conv.groups == 1)
        kernel, stride = _window(conv)
        geometry = _Geometry(
            conv.in_channels, conv.out_channels, out_channels=conv.out_channels, primary_kernel=kernel, stride=stride,
            activation=ops.ACTIVATION_CODES[activation],
        )  # fmt: skip
        return self._add(value, geometry, _Parameters(_dense(conv.weight), scale=scale, shift=shift))

    def depthwise(self, conv: Any, scale: Tensor, shift: Tensor, value: int, activation: str | None) -> int:
        """A depthwise convolution becomes the end of the unit before it, whose result nobody else has seen."""
        _require(activation is None and 0 <= value == len(self.stages) - 1 and value not in self.kept)
        unit, (kernel, stride) = self.stages[-1], _window(conv)
        geometry, parameters = unit.geometry, unit.parameters
        _require(geometry.multiplier > 0 and geometry.depthwise_kernel == 0 and unit.add == _NONE)
        _require(kernel > 1 and geometry.out_channels == conv.in_channels)
        assert parameters is not None  # a unit has some
        geometry.depthwise_kernel, geometry.depthwise_stride = kernel, stride
        parameters.depthwise_weight = _dense(conv.weight)
        parameters.depthwise_scale, parameters.depthwise_shift = scale, shift
        return value

    def unit(self, module: Any, value: int) -> int:
        """A FusedFiF."""
        _require(module._fallback_reason() is None)
        primary, cheap = module.primary_conv, module.cheap_operation
        conv, weight = primary[0], cheap[0].weight
        _require(conv.groups == 1 and weight.shape[1] == 1)
        maps = conv.out_channels
        copies = maps if module.shared else 1  # one kernel set for every map
        scale, shift = _affine(conv, primary[1])
        cheap_scale, cheap_shift = _affine(cheap[0], cheap[1], copies)
        weight = weight.repeat(copies, 1, 1, 1)
        _require(cheap[0].padding == (weight.shape[-1] // 2,) * 2 and weight.shape[-1] in (1, 3, 5, 7))
        kernel, stride = _window(conv)
        geometry = _Geometry(
            conv.in_channels, maps, weight.shape[0] // maps, module.out_channels, weight.shape[-1],
            ops.ACTIVATION_CODES[module.activation], int(module.splice), kernel, stride,
        )  # fmt: skip
        self.has_unit = True
        parameters = _Parameters(_dense(conv.weight), _dense(weight), None, scale, shift, cheap_scale, cheap_shift)
        return self._add(value, geometry, parameters)

    def keep(self, value: int) -> int:
        """Says that the value will be read again after what is added next; its stage stays as it is."""
        self.kept.add(value)
        return value

    def residual(self, value: int, shortcut: int) -> None:
        """Adds another value to that of the last stage."""
        _require(0 <= value == len(self.stages) - 1 and value not in self.kept and not self.pooled)
        stage = self.stages[value]
        _require(stage.parameters is not None and stage.add == _NONE and stage.geometry.depthwise_kernel == 0)
        stage.add = shortcut

    def pool(self, module: Any, value: int) -> int:
        """Means over all pixels."""
        _require(module.output_size in (1, (1, 1)) and value != _ENDS)
        channels = self.stages[value].geometry.out_channels
        self.stages.append(_Stage(value, _Geometry(channels, 1, out_channels=channels)))
        self.pooled = True
        return len(self.stages) - 1

    def flatten(self, module: Any, value: int) -> int:
        """Of maps of one pixel, where it only drops dimensions."""
        _require(self.pooled and (module.start_dim, module.end_dim) == (1, -1))
        self.flat = True
        return value

    def linear(self, module: Any, value: int) -> int:
        """A linear layer on flat values, which is a 1x1 convolution of one pixel."""
        _require(self.flat)
        weight = module.weight
        scale = torch.ones(len(weight), dtype=_compute_type(weight), device="cpu")
        shift = torch.zeros_like(scale) if module.bias is None else module.bias.detach().to(scale.dtype)
        geometry = _Geometry(weight.shape[1], len(weight), out_channels=len(weight))
        return self._add(value, geometry, _Parameters(_dense(weight[:, :, None, None]), scale=scale, shift=shift))

    def nothing(self, module: nn.Module, value: int) -> int:
        """Layers that do nothing in evaluation."""
        _require(not module.training or type(module) is nn.Identity)
        return value

    def _add(self, value: int, geometry: _Geometry, parameters: _Parameters) -> int:
        first = self.stages[0].parameters if self.stages else parameters
        _require(first is not None and first.weight.dtype == parameters.weight.dtype)
        self.stages.append(_Stage(value, geometry, parameters))
        return len(self.stages) - 1

    _LAYERS: ClassVar[dict[type[nn.Module], Callable[..., int]]] = {
        nn.Sequential: sequence,
        nn.AdaptiveAvgPool2d: pool,
        nn.Flatten: flatten,
        nn.Linear: linear,
        nn.Identity: nothing,
        nn.Dropout: nothing,
    }


def _require(holds: bool) -> None:
    if not holds:
        raise _Unsupported


def _changed(module: nn.Module) -> bool:
    """Whether calling the module does more than its type says."""
    held = module.__dict__
    return bool(held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held)


def _window(conv: Any) -> tuple[int, int]:
    """Kernel size and stride of a convolution whose result has ceil(size / stride) pixels."""
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    square = conv.kernel_size == (kernel, kernel) and conv.stride == (stride, stride) and conv.dilation == (1, 1)
    _require(square and kernel in (1, 3, 5, 7) and conv.padding == (kernel // 2,) * 2 and conv.padding_mode == "zeros")
    return kernel, stride


def _affine(conv: Any, norm: Any, copies: int = 1) -> tuple[Tensor, Tensor]:
    """What comes after the products: factor and addend of every map, convolution's bias and normalisation in one."""
    kind = _compute_type(conv.weight)
    count = conv.weight.shape[0] * copies
    bias = torch.zeros(count, dtype=torch.float64, device="cpu")
    if conv.bias is not None:
        bias = conv.bias.detach().double().repeat(copies)
    if norm is None or type(norm) is nn.Identity:
        return torch.ones(count, dtype=kind, device="cpu"), bias.to(kind)
    _require(type(norm) is nn.BatchNorm2d and not _changed(norm))
    _require(norm.running_mean is not None and not norm.training)
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale.to(kind), shift.to(kind)


def _compute_type(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _dense(weight: Tensor) -> Tensor:
    return weight.detach().contiguous()

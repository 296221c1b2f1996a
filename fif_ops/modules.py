"""FusedFiF: the feature augment unit with the same parameters and state as FeatureAugment, computed in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, functional, ops
from .chain import Chain
from .direct import direct_call
from .prepared import PreparedCall, PreparedTraining, prepare
from .reference import ACTIVATIONS, FeatureAugment, Norm, SharedConv2d


class FusedFiF(FeatureAugment):
    """FeatureAugment computed by ``feature_augment``: same constructor, same checkpoint keys, equal results.

    The submodules hold parameters, state and settings, and are read afresh at every call, so that loading, casting,
    freezing or replacing them takes effect at once. If one of them is no longer what the constructor made (another
    type, other settings, hooks, a forward of its own), the reference's forward runs instead.

    Shapes, dtypes and errors: as FeatureAugment. Source: S0 [0142]-[0197].
    """

    __call__ = direct_call

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prepared: PreparedCall | PreparedTraining | None = None
        kinds: list[type[nn.Module]] = [nn.BatchNorm2d]
        if self.activation is not None:
            kinds.append(ACTIVATIONS[self.activation])
        cheap_type = SharedConv2d if self.shared else nn.Conv2d
        self._stages = tuple(
            (name, tuple(zip("012", [conv_type, *kinds], strict=False)), _geometry(self.get_submodule(f"{name}.0")))
            for name, conv_type in (("primary_conv", nn.Conv2d), ("cheap_operation", cheap_type))
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, in_channels, H, W). Returns (B, out_channels, H', W'), a fresh tensor in x's memory format."""
        recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()  # where every way must be the same one
        prepared = None if recorded else self.__dict__["_prepared"]
        if prepared is not None and prepared.takes(x) and prepared.holds():
            try:
                return prepared(x)
            except RuntimeError:  # other values by now; or a bad x, of which the way below says in words what is wrong
                self._prepared = None
        if self._fallback_reason() is not None:
            return super().forward(x)
        modules: dict[str, Any] = self._modules
        primary, cheap = modules["primary_conv"]._modules, modules["cheap_operation"]._modules
        primary_weight, primary_bias = _weight_bias(primary["0"])
        cheap_weight, cheap_bias = _weight_bias(cheap["0"])
        # Counted first, as torch does: a checkpoint's recomputation counts too, a call that is refused does not.
        norms = _norm(primary["1"]), _norm(cheap["1"])
        _count_batch(primary["1"], 1)
        _count_batch(cheap["1"], 1)
        try:
            call = functional.resolve(
                x, primary_weight, cheap_weight, primary_bias, cheap_bias, *norms, self.out_channels, self.activation,
                self.splice, self.stride, self.padding, self.groups, self.shared,
            )  # fmt: skip
        except (TypeError, ValueError):
            _count_batch(primary["1"], -1)
            _count_batch(cheap["1"], -1)
            raise
        if not recorded:
            given = (x, primary_weight, cheap_weight, primary_bias, cheap_bias)
            self._prepared = prepare(self, call, given)
        return call()

    def lower(self, chain: Chain, value: int) -> int:
        """One stage."""
        return chain.unit(self, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_prepared": None}  # it knows this module's dictionaries, not a copy's

    def _fallback_reason(self) -> str | None:
        """Why ``forward`` must call the submodules one by one, or None if it need not."""
        modules: dict[str, Any] = self._modules
        for name, kinds, geometry in self._stages:
            reason = _stage_reason(name, modules[name], kinds, geometry)
            if reason is not None:
                return reason
        return None

    @classmethod
    def from_reference(cls, unit: FeatureAugment) -> FusedFiF:
        """A fused copy of the unit: same settings, values, dtype, device, training and requires_grad flags.

        No storage is shared. Raises TypeError if ``unit`` is not a FeatureAugment.
        """
        if not isinstance(unit, FeatureAugment):
            raise TypeError(f"unit is a {type(unit).__name__}: must be a FeatureAugment")
        return cls._copy_of(unit)

    def to_reference(self) -> FeatureAugment:
        """A FeatureAugment with copies of everything in this module; no storage is shared."""
        return FeatureAugment._copy_of(self)


class Explanation(NamedTuple):
    """Which backend runs a unit on an input, why no faster one does, and in which launches where that is planned."""

    backend: str
    refused: tuple[tuple[str, str], ...]  # (backend, reason) for each that cannot
    plan: tuple[ops.Launch, ...] = ()

    def __str__(self) -> str:
        refused = [f"not on {name}: {reason}" for name, reason in self.refused]
        return "\n".join([f"runs on: {self.backend}", *refused, *(f"launches {launch}" for launch in self.plan)])


def explain(module: FusedFiF, x: Tensor) -> Explanation:
    """Which backend ``module(x)`` uses and why, in the present training and grad modes; nothing is computed.

    x: (B, in_channels, H, W). Raises TypeError if ``module`` is not a FusedFiF.
    """
    if not isinstance(module, FusedFiF):
        raise TypeError(f"module is a {type(module).__name__}: must be a FusedFiF")
    reason = module._fallback_reason()
    if reason is not None:
        return Explanation("reference", (("any kernel", reason),))
    if module.shared and module.matrix_channels > 1:
        return Explanation("reference", (("any kernel", "cheap kernels over several maps are shared"),))
    primary: Any = module.primary_conv[0]
    cheap: Any = module.cheap_operation[0]
    # A unit makes ceil(out_channels / ratio) primary maps, which are never more than out_channels.
    problem = backends.Problem(x, primary.weight, cheap.weight, module.stride, module.padding, module.groups, False)
    norms = [_norm(stage[1]) for stage in (module.primary_conv, module.cheap_operation)]
    trains = functional.wants_gradients((x, *module.parameters())) or any(n is not None and n.training for n in norms)
    forced = backends.wanted(None)
    candidates = (backends.BACKENDS[forced],) if forced else backends.order(problem, trains)
    able = [b for b in candidates if not b.reason(problem)]
    refused = [(b.name, b.reason(problem)) for b in candidates if b not in able]
    if not able:
        return Explanation("none", tuple(refused))
    chosen = able[0]
    if chosen is backends.measured(problem, trains):
        slower = [b.name for b in able[1:] if b is not backends.REFERENCE]
        refused += [(name, f"{chosen.name} was faster, says {backends.tuned.cache_path()}") for name in slower]
    return Explanation(
        chosen.name, tuple(refused), tuple(chosen.plan(problem, module.out_channels, module.splice, trains))
    )


def _geometry(conv: Any) -> tuple[Any, ...]:
    return (conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode)


def _weight_bias(module: nn.Module) -> tuple[Any, Any]:
    # Faster than module.weight and module.bias, whose lookup first fails and then runs nn.Module.__getattr__.
    held = module._parameters
    if "weight" in held and "bias" in held:
        return held["weight"], held["bias"]
    return module.weight, module.bias


def _statistics(module: nn.Module) -> tuple[Any, Any, Any]:
    held = module._buffers
    if "running_mean" in held and "running_var" in held and "num_batches_tracked" in held:
        return held["running_mean"], held["running_var"], held["num_batches_tracked"]
    return module.running_mean, module.running_var, module.num_batches_tracked


def _norm(module: Any) -> Norm | None:
    """The arguments that ``nn.BatchNorm2d.forward`` would give to torch's batch_norm; None for nn.Identity."""
    if type(module) is nn.Identity:
        return None
    weight, bias = _weight_bias(module)
    mean, var, batches = _statistics(module)
    training = module.training
    tracked = training and module.track_running_stats
    momentum = module.momentum
    if momentum is None:
        momentum = 1.0 / (float(batches) + 1.0) if tracked and batches is not None else 0.0
    if training and not tracked:
        mean = var = None
    return Norm(weight, bias, mean, var, training or (mean is None and var is None), momentum, module.eps)


def _count_batch(module: nn.Module, by: int) -> None:
    if module.training and type(module) is nn.BatchNorm2d and module.track_running_stats:
        batches = _statistics(module)[2]
        if batches is not None:
            batches.add_(by)


def _stage_reason(
    name: str, stage: nn.Module, kinds: tuple[tuple[str, type[nn.Module]], ...], geometry: tuple[Any, ...]
) -> str | None:
    if not _is_plain(stage, nn.Sequential):
        return f"{name} {_what_differs(stage, nn.Sequential)}"
    parts: dict[str, Any] = stage._modules
    if len(parts) != len(kinds):
        return f"{name} has {len(parts)} parts, not {len(kinds)}"
    for key, kind in kinds:
        part = parts.get(key)
        if not (_is_plain(part, kind) or (kind is nn.BatchNorm2d and _is_plain(part, nn.Identity))):
            return f"{name}.{key} {_what_differs(part, kind)}"
    if _geometry(parts["0"]) != geometry:
        return f"{name}.0 has other settings than it was made with: {parts['0']}"
    if kinds[-1][1] is nn.GELU and parts["2"].approximate != "none":
        return f"{name}.2 approximates gelu by {parts['2'].approximate}"
    return None


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what its type says and nothing else."""
    if type(module) is not kind:
        return False
    held = module.__dict__
    return not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
    )


def _what_differs(module: Any, kind: type[nn.Module]) -> str:
    if type(module) is not kind:
        return f"is a {type(module).__name__}, not a {kind.__name__}"
    return "has a forward of its own" if "forward" in module.__dict__ else "has hooks"

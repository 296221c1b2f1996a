"""The spindle module: one unit widens, another narrows, with an optional strided convolution and shortcut."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..chain import Chain
from ..modules import FusedFiF
from ..prepared import Chained
from ..reference import FeatureAugment, positive_integer
from .conv_norm import ConvNorm, conv_norm

VARIANTS = ("patent", "table2")


class Spindle(Chained):
    """FiF (in -> hidden, relu), [depthwise 3x3 with the stride], FiF (hidden -> out, linear), [+ shortcut].

    ``variant="patent"`` is the text of S0: the depthwise convolution is there if stride > 1, the shortcut if
    stride == 1 (1x1 convolution + normalisation if the channels change). ``variant="table2"`` meets the counts of
    S0's Table 2 more closely: no depthwise convolution, the stride lies in the second unit's primary convolution, and
    there is always a shortcut (1x1 convolution + normalisation if channels or size change).

    Args:
        in_channels, hidden_channels, out_channels: maps in, between the units and out; S0 wants hidden > out, but
            HWNet's first spindle has them equal.
        stride: the result has ceil(H / stride) x ceil(W / stride) pixels.
        variant: "patent" or "table2".
        fused: whether the units are FusedFiF or FeatureAugment; parameters and checkpoint keys are the same. In
            evaluation without gradients a fused spindle is one operator on the processor, and elsewhere convolutions
            join their normalisations.

    Shapes: x (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride)).
    Raises TypeError or ValueError for sizes that are not positive integers, ValueError for an unknown variant.
    Source: S0 [0199]-[0241].
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        variant: str = "patent",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: must be one of {', '.join(map(repr, VARIANTS))}")
        positive_integer("stride", stride)
        unit, part = (FusedFiF, ConvNorm) if fused else (FeatureAugment, conv_norm)
        literal = variant == "patent"
        self.fif1 = unit(in_channels, hidden_channels)
        self.depthwise: nn.Module | None = None
        if literal and stride > 1:
            self.depthwise = part(hidden_channels, hidden_channels, 3, stride, groups=hidden_channels)
        self.fif2 = unit(hidden_channels, out_channels, stride=1 if literal else stride, activation=None)
        self.shortcut: nn.Module | None = None
        if stride == 1 and in_channels == out_channels:
            self.shortcut = nn.Identity()
        elif stride == 1 or not literal:
            self.shortcut = part(in_channels, out_channels, 1, stride)

    def compose(self, x: Tensor) -> Tensor:
        """Module by module."""
        y = self.fif1(x)
        if self.depthwise is not None:
            y = self.depthwise(y)
        y = self.fif2(y)
        if self.shortcut is None:
            return y
        # A unit's result is ours alone.
        fresh = isinstance(self.fif2, FeatureAugment) and not torch.is_grad_enabled()
        return y.add_(self.shortcut(x)) if fresh else y + self.shortcut(x)

    def lower(self, chain: Chain, value: int) -> int:
        """Two or three stages: the strided convolution joins the unit before it, the shortcut the one behind."""
        shortcut = value
        if self.shortcut is not None:
            shortcut = chain.keep(chain.add(self.shortcut, chain.keep(value)))
        inner = chain.add(self.fif1, value)
        if self.depthwise is not None:
            inner = chain.add(self.depthwise, inner)
        result = chain.add(self.fif2, inner)
        if self.shortcut is not None:
            chain.residual(result, shortcut)
        return result

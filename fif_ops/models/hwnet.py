"""HWNet: 14 spindles and one feature augment unit, in both readings of its source."""

from __future__ import annotations

from torch import Tensor, nn

from ..chain import Chain
from ..modules import FusedFiF
from ..prepared import Chained
from ..reference import FeatureAugment, positive_integer
from .conv_norm import ConvNorm, PooledConvNorm, conv_norm
from .counts import mac_count, parameter_count
from .spindle import VARIANTS, Spindle

# S0 Table 1: output channels at width 1.0 and stride; a line per phase, from maps of 112 to 7 pixels.
SPINDLES = (
    *((16, 1), (32, 2)),
    *((32, 1), (64, 2)),
    *((64, 1), (64, 1), (96, 2)),
    *((96, 1), (96, 1), (128, 1), (128, 1), (128, 1), (256, 2)),
    (256, 1),
)


class HWNet(Chained):
    """Stem, 14 spindles, one FiF unit, average pooling, 1x1 convolution, linear classifier. See ``hwnet``."""

    def __init__(
        self,
        width: float = 1.0,
        variant: str = "patent",
        num_classes: int = 1000,
        in_size: int = 224,
        fused: bool = True,
    ) -> None:
        super().__init__()
        _check(width, variant, num_classes, in_size)
        self.in_size = in_size
        self.settings = (width, variant, num_classes, in_size)
        channels = _scaled(16 * width)
        part = ConvNorm if fused else conv_norm
        self.stem = part(3, channels, 3, stride=1 if in_size <= 64 else 2, relu=True)
        spindles = []
        for position, (full_width, stride) in enumerate(SPINDLES):
            out = _scaled(full_width * width)
            hidden = out if position == 0 else 3 * out
            spindles.append(Spindle(channels, hidden, out, stride, variant=variant, fused=fused))
            channels = out
        self.spindles = nn.Sequential(*spindles)
        augmented, features = _scaled(512 * width), _scaled(1280 * width)
        self.augment = (FusedFiF if fused else FeatureAugment)(channels, augmented)
        self.head: nn.Sequential
        if fused:
            self.head = PooledConvNorm(augmented, features)
        else:
            parts = conv_norm(augmented, features, 1, relu=True)
            self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), *parts, nn.Flatten())
        self.classifier = nn.Linear(features, num_classes)

    def to_fused(self) -> HWNet:
        """The fused network with this one's values, on its device, of its dtype and mode; no storage is shared."""
        parameter = next(self.parameters())
        twin = HWNet(*self.settings, fused=True).to(parameter.device, parameter.dtype)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    def compose(self, x: Tensor) -> Tensor:
        """Module by module: x (B, 3, H, W) to the logits, (B, num_classes)."""
        return self.classifier(self.head(self.augment(self.spindles(self.stem(x)))))

    def lower(self, chain: Chain, value: int) -> int:
        """All of it."""
        return chain.sequence((self.stem, self.spindles, self.augment, self.head, self.classifier), value)

    def parameter_count(self) -> int:
        """Number of learnable values, running statistics not among them."""
        return parameter_count(self)

    def mac_count(self, height: int | None = None, width: int | None = None) -> int:
        """Multiply-accumulates of convolutions and classifier for one image, ``in_size`` squared by default."""
        return mac_count(self, self.in_size if height is None else height, self.in_size if width is None else width)


def hwnet(
    width: float = 1.0,
    variant: str = "patent",
    num_classes: int = 1000,
    in_size: int = 224,
    fused: bool = True,
) -> HWNet:
    """HWNet of S0 Table 1, randomly initialised: the same numbers from the same seed, fused or not.

    Args:
        width: multiplies all channels, those of the head too (rounded to multiples of 4, at least 4).
        variant: "patent" (HWNet-B), the text of S0 taken literally; "table2" (HWNet-A), the reading that comes
            closest to the counts printed in S0's Table 2. See ``Spindle``.
        num_classes: outputs.
        in_size: height and width of the images, 16 or more; up to 64 the stem has stride 1, above it has stride 2.
            Other sizes can be fed to the network all the same.
        fused: whether the units are FusedFiF or FeatureAugment; checkpoints fit both.

    S0 [0247] speaks of 12 spindles, its Table 1 of 14, which we use.
    Raises ValueError or TypeError, naming the argument, for values outside these.
    Source: S0 [0246]-[0250], Tables 1 and 2.
    """
    return HWNet(width, variant, num_classes, in_size, fused)


def _check(width: float, variant: str, num_classes: int, in_size: int) -> None:
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r}: must be one of {', '.join(map(repr, VARIANTS))}")
    if not 0 < width < float("inf"):
        raise ValueError(f"width={width}: must be a positive factor, such as 0.5, 0.9, 1.0 or 1.25")
    positive_integer("num_classes", num_classes)
    if positive_integer("in_size", in_size) < 16:
        raise ValueError(
            f"in_size={in_size}: the network halves the maps four times and needs 16 or more; "
            f"enlarge the images first, for example to 32 x 32 with torch.nn.functional.interpolate"
        )


def _scaled(channels: float) -> int:
    """The multiple of 4 nearest to ``channels``, at least 4 and not more than a tenth below."""
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * channels else rounded

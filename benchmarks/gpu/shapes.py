"""The units of GhostNet 1.0 and HWNet 1.0 on photographs of 224 x 224 pixels, and which of them are measured how.

A unit that ends a bottleneck or a spindle has no activation.
"""

from __future__ import annotations

from ..shapes import SHAPES, Shape

BATCH = 128

# (in_channels, primary maps, pixels, how many such units the network has); the output has twice the primary maps.
_GHOSTNET_WIDENING = (
    (16, 8, 112, 1),
    (16, 24, 112, 1),
    (24, 36, 56, 2),
    (40, 60, 28, 1),
    (40, 120, 28, 1),
    (80, 100, 14, 1),
    (80, 92, 14, 2),
    (80, 240, 14, 1),
    (112, 336, 14, 2),
    (160, 480, 7, 4),
)
_GHOSTNET_NARROWING = (
    (16, 8, 112, 1),
    (48, 12, 56, 1),
    (72, 12, 56, 1),
    (72, 20, 28, 1),
    (120, 20, 28, 1),
    (240, 40, 14, 1),
    (200, 40, 14, 1),
    (184, 40, 14, 2),
    (480, 56, 14, 1),
    (672, 56, 14, 1),
    (672, 80, 7, 1),
    (960, 80, 7, 4),
)
_HWNET_WIDENING = (
    (16, 8, 112, 1),
    (16, 48, 112, 1),
    (32, 48, 56, 1),
    (32, 96, 56, 1),
    (64, 96, 28, 2),
    (64, 144, 28, 1),
    (96, 144, 14, 2),
    (96, 192, 14, 1),
    (128, 192, 14, 2),
    (128, 384, 14, 1),
    (256, 384, 7, 1),
    (256, 256, 7, 1),
)
_HWNET_NARROWING = (
    (16, 8, 112, 1),
    (96, 16, 56, 2),
    (192, 32, 28, 3),
    (288, 48, 14, 3),
    (384, 64, 14, 3),
    (768, 128, 7, 2),
)


def _units(*tables: tuple[tuple[int, int, int, int], ...]) -> dict[Shape, int]:
    widening, narrowing = tables
    return {
        Shape(channels, primary, size, BATCH, activation=activation): count
        for table, activation in ((widening, "relu"), (narrowing, None))
        for channels, primary, size, count in table
    }


# Shape at batch 128, and how many such units the network has.
GHOSTNET = _units(_GHOSTNET_WIDENING, _GHOSTNET_NARROWING)
HWNET = _units(_HWNET_WIDENING, _HWNET_NARROWING)


def _bare(shape: Shape) -> Shape:
    return shape._replace(batch=1, activation="relu")


# What the benchmarks of the processor have beyond these.
_OTHERS = {_bare(shape) for shape in SHAPES} - {_bare(shape) for shape in (*GHOSTNET, *HWNET)}
# From the largest maps to the smallest, since bandwidth counts there.
UNITS = sorted(
    {*GHOSTNET, *HWNET, *(shape._replace(batch=BATCH) for shape in _OTHERS)},
    key=lambda shape: (-shape.size, shape.in_channels, shape.primary, shape.activation is None),
)

# A few of every kind, for all precisions: wide and narrow, large and small maps.
MAIN = tuple(
    Shape(channels, primary, size, BATCH, activation=activation)
    for channels, primary, size, activation in (
        (16, 8, 112, "relu"),
        (16, 48, 112, "relu"),
        (24, 36, 56, "relu"),
        (72, 12, 56, None),
        (96, 16, 56, None),
        (64, 96, 28, "relu"),
        (120, 20, 28, None),
        (80, 92, 14, "relu"),
        (112, 336, 14, "relu"),
        (384, 64, 14, None),
        (160, 480, 7, "relu"),
        (960, 80, 7, None),
    )
)
# Those for which the compiler also tries many kernels, which takes it long.
TUNED = tuple(MAIN[i] for i in (0, 2, 3, 5, 7, 8, 10, 11))
# One photograph: bound by launches and by the host.
SINGLE = tuple(MAIN[i]._replace(batch=1) for i in (0, 3, 5, 7, 10))
TINY = (Shape(5, 3, 6, 4), Shape(8, 4, 5, 4, activation=None))


def minimal_elements(shape: Shape, training: bool) -> int:
    """Elements that must travel between memory and the processor, whatever the kernels.

    Inference reads the input and writes the output. Training writes the output and the primary maps before
    normalisation; backward reads the gradient of the output, the input and those primary maps, and writes the gradient
    of the input. Weights are not counted. Real kernels need more in training, since batch statistics take passes.
    """
    channels, maps, out = shape.in_channels, shape.primary, shape.primary * shape.ratio
    per_pixel = (channels + out + maps) + (out + channels + maps + channels) if training else channels + out
    return shape.batch * shape.size**2 * per_pixel

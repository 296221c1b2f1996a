"""The unit in training mode: forward with batch statistics, backward to x and to all parameters."""

from .shapes import HOST_SHAPE, unit_task


def test_training(compare, shape):
    compare("training", unit_task(shape, training=True))


def test_host_time(compare):
    """On 2x2 maps the time is that of a call, which must stay below the sum of the eager operators' it replaces."""
    compare("host", unit_task(HOST_SHAPE, training=True), floor=True)

"""The unit in evaluation mode, normalisation by running statistics. Floor: faster than eager in its better layout."""

from .shapes import HOST_SHAPE, unit_task


def test_inference(compare, shape):
    compare("inference", unit_task(shape), floor=True)


def test_host_time(compare):
    """On 2x2 maps the time is that of a call, which must stay below the sum of the eager operators' it replaces."""
    compare("host", unit_task(HOST_SHAPE), floor=True)

"""HWNet 1.0 as a whole: classify one photograph, and train on a batch of small images."""

from .shapes import network_task


def test_inference(compare):
    compare("network", network_task(in_size=224, batch=1))


def test_training(compare, pytestconfig):
    batch = 16 if pytestconfig.getoption("--quick") else 128
    compare("network", network_task(in_size=32, batch=batch, training=True))

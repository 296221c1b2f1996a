"""What all tests share: the same random numbers every time, and no time limit per hypothesis example."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("fif_ops", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fif_ops")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For modules of many tiny problems, where waking the other threads costs more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""What all tests share: the same random numbers every time, and no time limit per hypothesis example; and which of
them go to which process, where pytest-xdist runs them in several (make test)."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("fif_ops", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("fif_ops")

# What several processes share out: files, because a file's tests share what its fixtures build, and here files that
# share builds in build/cusim, build/static and build/sanitize. The longest come first, or one process would end long after the other.
UNITS = (
    ("test_cuda_static.py", "test_cuda_sanitized.py", "test_cuda_kernels.py"),
    ("test_isa.py", "test_frozen.py"),
    ("test_triton_kernels.py",),
    ("test_accuracy.py",),
    ("test_build.py",),
    ("test_gpu_script.py",),
    ("test_cusim.py",),
)


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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            """The first file of the unit that the test is in."""
            file = Path(nodeid.partition("::")[0]).name
            return next((unit[0] for unit in UNITS if file in unit), file)

    config.option.loadscopereorder = False  # which would have those with the most tests come first
    return ByUnit(config, log)


def pytest_configure():
    # A pytest that a test starts is no worker, which pytest-benchmark would take it for.
    os.environ.pop("PYTEST_XDIST_WORKER", None)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        first = [file for unit in UNITS for file in unit]
        items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))

"""Results and gradients of the kernels against the definition in float64, over every kind of problem they accept."""


import pytest
import torch
from hypothesis import given, settings
from support import DTYPES, Problem, check_problem, name_of, problems  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
both_layouts = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def plain_problem(**options):
    fields = {
        "in_channels": 5, "out_channels": 12, "ratio": 2, "cheap_kernel_size": 3, "splice": True, "activation": "relu",
        "norm": "batch", "bias": False, "batch": 2, "height": 6, "width": 7,
    }  # fmt: skip
    return Problem(**{**fields, **options})


# ---- random problems


@every_dtype
def test_random_problems_inference(dtype):
    @settings(max_examples=120 if dtype == torch.float32 else 50)
    @given(problems(training=False))
    def run(problem):
        check_problem(problem, dtype, training=False)

    run()


@every_dtype
def test_random_problems_training(dtype):
    @settings(max_examples=120 if dtype == torch.float32 else 50)
    @given(problems(training=True))
    def run(problem):
        check_problem(problem, dtype, training=True)

    run()

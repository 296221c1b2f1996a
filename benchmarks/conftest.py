"""Options, the list of shapes, the machine's record, and the fixture that measures and reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fif_ops import __version__, info, ops

from . import timing
from .peers import PEERS, SUITES, chosen
from .race import Race
from .shapes import QUICK_SHAPES, SHAPES, Task


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fif_ops benchmarks")
    group.addoption("--threads", type=int, default=1, help="threads of every peer; with 1 (default), on one core")
    group.addoption("--quick", action="store_true", help="few shapes, short measurements: for a first look only")
    group.addoption(
        "--peers", default="default", help=f"default, all, or families and names with commas: {', '.join(PEERS)}"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads") < 1:
        raise pytest.UsageError(f"--threads={config.getoption('--threads')}: must be 1 or more")
    try:
        chosen(config.getoption("--peers"), SUITES[0])
    except ValueError as error:
        raise pytest.UsageError(f"--{error}") from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = QUICK_SHAPES if metafunc.config.getoption("--quick") else SHAPES
        metafunc.parametrize("shape", shapes, ids=[shape.slug for shape in shapes])


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    facts = info.machine() | {"threads": config.getoption("--threads")}
    machine_info["fif_ops"] = facts | {
        "instruction_set": ops.CPU_ISA,
        "torch": torch.__version__,
        "fif_ops": __version__,
        "quick": config.getoption("--quick"),
    }


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark: Any) -> Callable[..., Race]:
    """Checks and measures a task: ``compare(suite, task, floor=False)``.

    All peers' times, taken in turns, go into ``extra_info``, which is what the report reads; pytest-benchmark's own
    table shows the fused unit alone. With --benchmark-disable the results are checked and nothing is timed.
    """
    config = request.config
    pace = timing.Pace(0.4, 5) if config.getoption("--quick") else timing.Pace(2.0, 11)

    def compare(suite: str, task: Task, floor: bool = False) -> Race:
        peers = chosen(config.getoption("--peers"), suite)
        reason = next((peer.unavailable() for peer in peers if peer.family == "fused"), "")
        if reason:
            pytest.skip(f"the fused unit cannot run here: {reason}")
        with timing.threads(config.getoption("--threads")):
            race = Race(task, peers)
            if not benchmark.enabled:
                benchmark.pedantic(race.steps["fused nchw"])
                return race
            race.time(pace, floor)
            benchmark.group = suite
            benchmark.extra_info.update(race.record(suite))
            fastest = race.best("fused") or "fused nchw"
            with race.conditions():
                benchmark.pedantic(race.steps[fastest], rounds=5, iterations=race.timings[fastest].repeats)
        if not race.floor_met:
            tried = ", ".join(f"{speed_up:.2f}" for speed_up in race.speed_ups)
            pytest.fail(f"floor missed on {task.name}: fused must be faster than eager; speed-ups were {tried}")
        return race

    return compare

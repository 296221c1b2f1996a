"""Runs the correctness suite on the device: its files side by side, each again where a spoilt context ended it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from . import budget
from .supervisor import WORTH_A_START, end, start

# Files, and which of their tests: processes that run side by side.
SHARDS = (
    ("test_gpu.py", "training and not triton"),
    ("test_gpu.py", "not training and not triton"),
    ("test_gpu_runtime.py", "not triton"),
    ("test_gpu_sanitizer.py", "memcheck"),
    ("test_gpu_sanitizer.py", "racecheck"),
    ("test_gpu.py", "triton"),
    ("test_gpu_runtime.py", "triton"),
)
ENDED = (0, 1, 5)  # pytest's exit status where all passed, some failed, none was chosen
CONTEXT_LOST = 77  # pytest's exit status where the device's context is spoilt; see tests/gpu_support.py
_OUTCOME = re.compile(r"^(tests/\S+::\S+) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b", re.MULTILINE)
_BEGUN = re.compile(r"^(tests/\S+::\S+)", re.MULTILINE)


class Outcome(NamedTuple):
    """What came of a file: tests by outcome, and why some are missing ("" if none is)."""

    tests: dict[str, str]
    incomplete: str
    log: Path

    def count(self, *states: str) -> int:
        return sum(state in states for state in self.tests.values())


def outcomes(text: str) -> dict[str, str]:
    """Outcomes by test, of pytest's -v output. A test that passed and then ended in an error has failed."""
    found: dict[str, str] = {}
    for name, state in _OUTCOME.findall(text):
        found[name] = "FAILED" if "ERROR" in (state, found.get(name)) else state
    return found


class _Shard:
    """A process with some of the tests, begun again without those that are done."""

    def __init__(self, file: str, which: str, device: str, extra: Sequence[str], logs: Path) -> None:
        self.name = f"{Path(file).stem} {which.removesuffix(' and not triton').removeprefix('not triton')}".strip()
        self.log = logs / f"{self.name.replace(' ', '-')}.log"
        self.device, self.arguments = device, [f"tests/{file}", "-k", which, *extra]
        self.done: dict[str, str] = {}
        self.incomplete = "not begun"
        self.process: subprocess.Popen[str] | None = None
        self.log.write_text("")

    def begin(self) -> None:
        command = [sys.executable, "-m", "pytest", "-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "--color=no"]
        if importlib.util.find_spec("hypothesis") is None:
            command.append("--noconftest")  # which the tests of the processor need
        command += [*self.arguments, *(word for name in self.done for word in ("--deselect", name))]
        self.incomplete = ""
        with self.log.open("a") as output:
            self.process = start(command, output, FIF_OPS_TEST_DEVICE=self.device, COLUMNS="200")

    def is_through(self, may_begin: bool) -> bool:
        """Whether it has ended; where the device's context was lost, it begins again and has not."""
        if self.process is None or self.process.poll() is None:
            return False
        end(self.process)
        text, before = self.log.read_text(), len(self.done)
        self.done = outcomes(text)
        status = self.process.returncode
        if status in ENDED:
            return True
        last = _last_begun(text)
        if last is not None and self.done.get(last) != "FAILED":
            with self.log.open("a") as output:  # so that this test counts, and is not tried again
                print(f"\n{last} FAILED: the process ended with status {status}", file=output)
            self.done[last] = "FAILED"
        if may_begin and len(self.done) > before and (status == CONTEXT_LOST or status < 0):
            self.begin()
            return False
        self.incomplete = f"pytest ended with status {status}"
        return True

    def stop(self) -> None:
        if self.process is not None:
            end(self.process)
            text = self.log.read_text()
            self.done, last = outcomes(text), _last_begun(text)
            self.incomplete = f"out of time in {last}" if last not in (None, *self.done) else "out of time"


def _last_begun(text: str) -> str | None:
    names = _BEGUN.findall(text)
    return names[-1] if names else None


def run(deadline: float, device: str, extra: Sequence[str], logs: Path) -> list[Outcome]:
    """The outcomes of all shards, in at most the time until the deadline."""
    shards = [_Shard(*shard, device, extra, logs) for shard in SHARDS]
    waiting, running = list(shards), list[_Shard]()
    most = len(shards) if device == "cuda" else 1
    last = time.time()
    while (waiting or running) and time.time() < deadline:
        while waiting and len(running) < most:
            running.append(waiting.pop(0))
            running[-1].begin()
        time.sleep(0.2)
        running = [shard for shard in running if not shard.is_through(deadline - time.time() > WORTH_A_START)]
        if time.time() - last > 15:
            last = time.time()
            counts = (f"{shard.name} {len(outcomes(shard.log.read_text()))}" for shard in shards)
            budget.say(f"  tests done: {', '.join(counts)}; {deadline - last:.0f} s left")
    for shard in running:
        shard.stop()
    return [Outcome(shard.done, shard.incomplete, shard.log) for shard in shards]


def summary(results: Sequence[Outcome]) -> dict[str, Any]:
    """Counts, failed tests and reasons for JSON."""
    skips = {line for result in results for line in result.log.read_text().splitlines() if line.startswith("SKIPPED [")}
    return {
        "passed": sum(result.count("PASSED", "XFAIL") for result in results),
        "skipped": sum(result.count("SKIPPED") for result in results),
        "failed": [name for result in results for name, state in result.tests.items() if state in ("FAILED", "ERROR")],
        "incomplete": {result.log.stem: result.incomplete for result in results if result.incomplete},
        "skip_reasons": sorted(skips),
    }

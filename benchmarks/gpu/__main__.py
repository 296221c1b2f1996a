"""The command: builds or takes the library, tests it on the device, measures, and reports; see ``--help``."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import budget, build, correctness, supervisor
from .journal import read, write
from .supervisor import ROOT

PARTS = tuple(budget.SECONDS)
NEEDED = ("torch", "numpy")
WANTED = {
    "pytest": "the correctness suite",
    "matplotlib": "the plots",
    "timm": "ResNet-18 and GhostNet",
    "triton": "torch.compile on a GPU",
    "ninja": "the build",
}


class Run:
    """One run of the command: its options, schedule and journal."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        wanted = options.only or (PARTS[1:] if options.device == "cpu" else PARTS)
        self.parts = [part for part in PARTS if part in wanted]
        self.begun = time.time()
        self.end = self.begun + options.seconds
        self.schedule = budget.schedule(self.parts, options.seconds)
        self.output: Path = options.output or (
            ROOT / ("build/gpu" if options.device == "cpu" else "benchmarks/results")
        )
        self.logs: Path = ROOT / "build/gpu"
        for folder in (self.output, self.logs, *filter(None, [options.logs])):
            folder.mkdir(parents=True, exist_ok=True)
        self.journal = self.logs / "journal.jsonl"
        self.journal.unlink(missing_ok=True)
        self.failures: list[str] = []

    def make_library(self) -> None:
        """Part (a): the library."""
        if self.options.library is not None:
            build.take(self.options.library, ROOT / "fif_ops")
        else:
            # Without a library nothing else counts: if need be, it takes half of the time, and the others less.
            build.build(self.end - self.options.seconds / 2, self.logs)
        rest = self.parts[1:]
        if rest:
            self.schedule = budget.schedule(rest, self.end - time.time())

    def test(self) -> None:
        """Part (b): the tests; meanwhile some processes compile what the measurements compare with."""
        deadline = self.schedule.deadlines["correctness"]
        compilers = self._compilers(deadline)
        try:
            results = correctness.run(deadline, self.options.device, self.options.tests, self.logs)
            found = correctness.summary(results)
            write(self.journal, state="tests", **found)
            self._tell_tests(found, results)
            self._wait_for(compilers, deadline)
        finally:
            for process in compilers:
                supervisor.end(process)

    def _compilers(self, deadline: float) -> list[subprocess.Popen[str]]:
        from .precompile import WORKERS

        options = self.options
        if options.device == "cpu" or options.quick or not {"inference", "training", "networks"} & set(self.parts):
            return []
        common = ["--deadline", str(deadline), "--device", options.device]
        module = [sys.executable, "-m", "benchmarks.gpu.precompile"]
        # The processes share the cores.
        return [
            supervisor.start([*module, str(i), str(WORKERS), *common], TORCHINDUCTOR_COMPILE_THREADS="2")
            for i in range(WORKERS)
        ]

    @staticmethod
    def _wait_for(processes: Sequence[subprocess.Popen[str]], deadline: float) -> None:
        while time.time() < deadline and any(process.poll() is None for process in processes):
            time.sleep(0.2)

    def _tell_tests(self, found: dict[str, Any], results: Sequence[correctness.Outcome]) -> None:
        budget.say(f"  {found['passed']} passed, {found['skipped']} skipped, {len(found['failed'])} failed")
        for reason in found["skip_reasons"]:
            budget.say(f"    {reason}")
        for name in found["failed"]:
            budget.say(f"    FAILED {name}")
        for file, why in found["incomplete"].items():
            budget.say(f"    INCOMPLETE {file}: {why}")
        for result in results:
            if result.incomplete or result.count("FAILED", "ERROR"):
                budget.say(f"    see {result.log}")
        if found["failed"] or found["incomplete"]:
            self.failures.append(f"{len(found['failed'])} tests failed, {len(found['incomplete'])} files incomplete")

    def measure(self, part: str) -> None:
        """Part (c)."""
        supervisor.measure(part, self.journal, self.schedule, self.options.device, self.options.quick)
        done = {entry["state"]: 0 for entry in read(self.journal)}
        for entry in read(self.journal):
            if entry.get("part") == part:
                done[entry["state"]] += 1
        failed, left_out = done.get("failed", 0), done.get("left out", 0)
        budget.say(f"  {done.get('done', 0)} measured, {failed} failed, {left_out} left out for want of time")
        if failed:
            self.failures.append(f"{part}: {failed} measurements failed")

    def tell(self) -> None:
        """Part (d)."""
        from . import report

        self.failures += report.write(read(self.journal), self.output, self.options.quick)

    def run(self) -> int:
        """All chosen parts; returns the exit status."""
        action: dict[str, Callable[[], None]] = {
            "build": self.make_library,
            "correctness": self.test,
            "report": self.tell,
        }
        for part in self.parts:
            begun = time.time()
            budget.say(f"{part}: up to {self.schedule.left(part):.0f} s")
            try:
                action.get(part, lambda part=part: self.measure(part))()
            except Exception as error:
                self.failures.append(f"{part}: {type(error).__name__}: {error}")
                budget.say(f"  {self.failures[-1]}")
            budget.say(f"{part}: took {time.time() - begun:.1f} s")
        if self.options.logs is not None:
            logs = [path for path in sorted(self.logs.glob("*.log")) if path.stat().st_mtime > self.begun]
            (self.options.logs / "gpu.log").write_text(
                "".join(f"==== {path.name}\n{path.read_text()}" for path in logs)
            )
        for failure in self.failures:
            budget.say(f"FAILED: {failure}")
        return 1 if self.failures else 0


def preflight(device: str) -> list[str]:
    """What is missing on this machine, and what that costs. Raises SystemExit where nothing can run."""
    lacks = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacks:
        raise SystemExit(f"{', '.join(lacks)} missing for {sys.executable}: name another python, make gpu PYTHON=...")
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no NVIDIA GPU; --device cpu tries the command without one")
    return [f"no {name}: without {what}" for name, what in WANTED.items() if importlib.util.find_spec(name) is None]


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    result.add_argument("--only", type=_parts, metavar="PART[,PART]", help=f"these parts alone: {', '.join(PARTS)}")
    result.add_argument("--library", type=Path, help="take _C.so from this wheel, file or folder; otherwise build it")
    result.add_argument("--seconds", type=float, default=budget.TOTAL, help="for everything (default: %(default)g)")
    result.add_argument("--quick", action="store_true", help="few shapes: for a first look only")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial run without a GPU")
    result.add_argument("--output", type=Path, help="folder of JSON and plots (default: benchmarks/results)")
    result.add_argument("--logs", type=Path, help="folder for gpu.log, all that the build and the tests printed")
    result.add_argument("--tests", default=[], type=str.split, help="further arguments of pytest, in one string")
    return result


def _parts(text: str) -> list[str]:
    wanted = text.split(",")
    unknown = [part for part in wanted if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: must be some of {', '.join(PARTS)}")
    return wanted


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = parser().parse_args(arguments)
    for line in preflight(options.device):
        budget.say(line)
    return Run(options).run()


if __name__ == "__main__":
    sys.exit(main())

"""Runs commands that may hang or crash: each in a process group of its own, which ends with its time."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from . import budget
from .journal import read, write

ROOT = Path(__file__).absolute().parents[2]
PATIENCE = 90.0  # seconds for one item, its compilation included
GRACE = 3.0  # seconds past the deadline for a process to end by itself
WORTH_A_START = 20.0  # seconds that must be left to start a process again


def start(command: Sequence[str], output: IO[str] | None = None, **environment: str) -> subprocess.Popen[str]:
    """The command, begun in the repository's root."""
    return subprocess.Popen(
        list(command),
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "9", **environment},
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kills what is left of the process and of those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(process: subprocess.Popen[str], deadline: float, overdue: Callable[[], str] = lambda: "") -> str:
    """Why the process had to be killed, or ""; ``overdue`` may give a reason before the deadline does."""
    try:
        while process.poll() is None:
            why = overdue() or ("out of time" if time.time() > deadline else "")
            if why:
                return why
            time.sleep(0.2)
        return ""
    finally:
        end(process)


def measure(part: str, journal: Path, schedule: budget.Schedule, device: str, quick: bool) -> None:
    """Runs the workers of a part: a new one after each that crashed or hung, while there is time."""
    deadline = schedule.deadlines[part]
    command = [sys.executable, "-m", "benchmarks.gpu.worker", part, str(journal), "--device", device]
    command += ["--deadline", str(deadline), *(["--quick"] if quick else [])]
    while True:
        process = start(command)
        why = wait(process, deadline + GRACE, lambda: _hanging(journal, part))
        if process.returncode == 0:
            return
        item = _unfinished(journal, part)
        why = why or f"its process ended with status {process.returncode}"
        key = part if item is None else item["key"]
        write(journal, state="failed", part=part, key=key, reason=why)
        budget.say(f"  {key}: {why}")
        if item is None or schedule.left(part) < WORTH_A_START:
            return


def _unfinished(journal: Path, part: str) -> dict | None:
    """The item that has begun and not ended."""
    entries = [entry for entry in read(journal) if entry.get("part") == part and entry["state"] != "left out"]
    return entries[-1] if entries and entries[-1]["state"] == "begun" else None


def _hanging(journal: Path, part: str) -> str:
    item = _unfinished(journal, part)
    return "" if item is None or time.time() - item["time"] < PATIENCE else f"hung for {PATIENCE:.0f} s"

"""What is installed here: versions, the library and what it was built for, the processor, and the backends."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__, backends, ops


def machine() -> dict[str, Any]:
    """The machine in words and numbers: processor, logical cores, threads that torch uses, memory in GiB, system."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def collect() -> dict[str, Any]:
    """All that ``python -m fif_ops info`` shows, ready for JSON."""
    return {
        "fif_ops": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": machine(),
        "library": ops.library_info(),
        "backends": [
            {"name": name, "available": available, "reason": reason} for name, available, reason in backends.describe()
        ],
    }


def as_text(facts: dict[str, Any]) -> str:
    """``collect()``'s facts as aligned lines."""
    library, here = facts["library"], facts["machine"]
    memory = "" if here["memory_gib"] is None else f", {here['memory_gib']} GiB"
    rows = [
        ("fif_ops", f"{facts['fif_ops']} (Python {facts['python']}, torch {facts['torch']})"),
        ("machine", f"{here['processor']}, {here['cores']} cores, {here['threads']} threads in use{memory}"),
        ("system", here["system"]),
        ("library", _library_line(library)),
        *((f"  {key.replace('_', ' ')}", _plain(value)) for key, value in library["built_for"].items()),
    ]
    if library["loaded"]:
        rows.append(("instruction set", f"{library['cpu_isa']} (can run: {', '.join(library['cpu_isas'])})"))
    rows.append(("backends", ""))
    for backend in facts["backends"]:
        state = "available" if backend["available"] else "unavailable"
        rows.append((f"  {backend['name']}", f"{state}: {backend['reason']}" if backend["reason"] else state))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {text}".rstrip() for label, text in rows)


def run(as_json: bool) -> int:
    """Prints the facts; returns the exit status, 0."""
    facts = collect()
    print(json.dumps(facts, indent=2, default=str) if as_json else as_text(facts))
    return 0


def _library_line(library: dict[str, Any]) -> str:
    if library["loaded"]:
        return f"{library['path']} (loaded)"
    where = f"{library['path']} " if library["path"] else ""
    return f"{where}not loaded: {library['error']}"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty or just "x86_64" on Linux
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # no such figure outside POSIX
        return None

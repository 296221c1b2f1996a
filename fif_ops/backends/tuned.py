"""What ``python -m fif_ops tune`` measured: a JSON file of choices for each kind of device, read once per process.

A choice is the number of a configuration (triton/config.py) or the name of the fastest backend, under the name of the
bucket of units that it is for. Without the file, or for a bucket that is not in it, the rules decide.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import torch

FORMAT = 3  # of the file; raise it when numbers come to mean other configurations. Other formats are ignored.


def cache_path() -> Path:
    """FIF_OPS_CACHE if it is set, else a file in the user's cache directory."""
    named = os.environ.get("FIF_OPS_CACHE", "")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
    return Path(base) / "fif_ops" / "tuned.json"


def _read(path: Path) -> dict[str, dict[str, int | str]]:
    """{device name: {bucket: choice}}; a file that cannot be read counts as empty."""
    try:
        content = json.loads(path.read_text())
        fits = content["format"] == FORMAT and all(isinstance(known, dict) for known in content["choices"].values())
        return content["choices"] if fits else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def choices(device: torch.device) -> dict[str, int | str]:
    """What was measured on this kind of device, by bucket."""
    return _read(cache_path()).get(device_name(device), {})


def save(path: Path, name: str, found: dict[str, int | str]) -> None:
    """Adds the choices for devices of this name to the file."""
    known = dict(_read(path))
    known[name] = {**known.get(name, {}), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"format": FORMAT, "choices": known}, indent=1, sort_keys=True))
    fresh.replace(path)
    choices.cache_clear()


def any_choice(device: torch.device) -> bool:
    return bool(choices(device))


def fastest(device: torch.device, bucket: str) -> str:
    """The name of the backend that was the fastest, or ""."""
    found = choices(device).get(bucket, "")
    return found if isinstance(found, str) else ""


# What torch.compiler.assume_constant_result does, which would import all of torch.compile here: a graph takes the
# answers as they are, and does not trace how they are found.
any_choice._dynamo_marked_constant = fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]

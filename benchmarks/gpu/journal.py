"""What a part has begun, measured and missed: a file of JSON lines, whole after a crash up to its last line.

States: "machine" (copy bandwidth, description), "begun", "done" (with the record), "failed" and "left out".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(journal: Path) -> list[dict[str, Any]]:
    """The entries; a line that was cut off is left out."""
    if not journal.is_file():
        return []
    entries = []
    for line in journal.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def write(journal: Path, **entry: Any) -> None:
    """Adds an entry."""
    with journal.open("a") as file:
        file.write(json.dumps(entry) + "\n")

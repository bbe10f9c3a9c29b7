"""Lines of JSON beside a training, of which those after the checkpoint that it goes on from are dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cai.store import write_whole


def append(file: Path, *lines: Mapping[str, Any]) -> None:
    """Write lines at the end."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)


def read(file: Path) -> list[dict[str, Any]]:
    """All whole lines; none where there is no file."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the last one, of a process that was killed while it wrote
    return found


def keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of later steps; those that are left."""
    lines = [line for line in read(file) if line["step"] <= step]
    if file.exists():
        write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
    return lines

"""Lines of JSON beside a training, of which those after the checkpoint that it goes on from are dropped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cai.report.written import read_lines
from cai.store import write_whole


def append(file: Path, *lines: Mapping[str, Any]) -> None:
    """Write lines at the end."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(line) + "\n" for line in lines)


def write(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write these lines and no others, whole or not at all."""
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))


def keep_until(file: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of later steps; those that are left."""
    lines = [line for line in read_lines(file) if line["step"] <= step]
    if file.exists():
        write(file, lines)
    return lines

"""The rows as they are trained on, kept in the folder while it trains: neutralised, none longer than the model takes.

They lie on disk, where all processes of a training map the same file, and what TRL computes once for each row
(its tokens, log-probabilities of the reference) is kept beside them for a run that goes on.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import load_from_disk

from cai.training.data import StageData, neutralize
from cai.training.lengths import drop_long_rows

_TOLD = "told.json"


def prepare_rows(data: StageData, tokenizer: Any, limit: int | None, place: Path) -> None:
    """Write the rows into the folder `place`, unless they are there; `limit` is in tokens.

    Raises `ConfigError` where every row is longer.
    """
    if are_written(place):
        return
    kept, too_long = drop_long_rows(neutralize(data, tokenizer), tokenizer, limit)
    write_rows(kept, LeftOut(too_long, {}), place)


class LeftOut(NamedTuple):
    """Rows that are not trained on, by split, without those that are 0."""

    too_long: dict[str, int]
    unlabelled: dict[str, int]
    """Rows that no verdict says anything of what is trained about."""


def write_rows(kept: StageData, left_out: LeftOut, place: Path) -> None:
    """Write rows into the folder `place`, whole or not at all."""
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, rows in (("train", kept.train), ("test", kept.test)):
        if rows is not None:
            rows.save_to_disk(str(part / name))
    (part / _TOLD).write_text(json.dumps({**left_out._asdict(), "test": kept.test is not None}))
    shutil.rmtree(place, ignore_errors=True)
    os.replace(part, place)


def are_written(place: Path) -> bool:
    """Whether rows are in the folder `place`, and can be read."""
    try:
        _read(place)
    except (OSError, ValueError, KeyError):  # where a process was killed while it deleted them
        return False
    return True


def read_rows(data: StageData, place: Path) -> tuple[StageData, LeftOut]:
    """The data with the rows that are in `place`, and what was left out."""
    train, test, left_out = _read(place)
    return replace(data, train=train, test=test), left_out


def _read(place: Path) -> tuple[Any, Any, LeftOut]:
    told = json.loads((place / _TOLD).read_text())
    test = load_from_disk(str(place / "test")) if told["test"] else None
    return load_from_disk(str(place / "train")), test, LeftOut(told["too_long"], told["unlabelled"])

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
from typing import Any

from datasets import load_from_disk

from cai.training.data import StageData, neutralize
from cai.training.lengths import drop_long_rows

_TOLD = "told.json"


def prepare_rows(data: StageData, tokenizer: Any, limit: int | None, place: Path) -> None:
    """Write the rows into the folder `place`, unless they are there; `limit` is in tokens.

    Raises `ConfigError` where every row is longer.
    """
    if (place / _TOLD).is_file():
        return
    kept, too_long = drop_long_rows(neutralize(data, tokenizer), tokenizer, limit)
    part = place.with_name(f"{place.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for name, rows in (("train", kept.train), ("test", kept.test)):
        if rows is not None:
            rows.save_to_disk(str(part / name))
    (part / _TOLD).write_text(json.dumps({"too_long": too_long, "test": kept.test is not None}))
    os.replace(part, place)


def read_rows(data: StageData, place: Path) -> tuple[StageData, dict[str, int]]:
    """The data with the rows that are in `place`, and of each split how many were too long."""
    told = json.loads((place / _TOLD).read_text())
    test = load_from_disk(str(place / "test")) if told["test"] else None
    return replace(data, train=load_from_disk(str(place / "train")), test=test), told["too_long"]

"""One source's rows in the columns of a stage: from a run folder, a file, a `datasets` folder or the Hub.

A run folder has a view for each kind of stage. Whatever else is read may come in any of TRL's conversational formats, and pairs
also as transcripts (Anthropic's HH). What is no such row is left out, counted and named.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
from datasets import Dataset, Features, Value

from cai.config import PromptsConfig
from cai.errors import PromptSourceError, RowError
from cai.prompts import built_in_sets, read_raw, to_completion, to_pair, to_prompt
from cai.prompts.files import Raw, read_file
from cai.prompts.sources import What
from cai.training.base_settings import SourceSettings
from cai.types import Messages

View = Literal["sft", "preference", "unpaired", "prompt"]
Row = dict[str, Any]
_TURNS = [{"role": Value("string"), "content": Value("string")}]
FEATURES: dict[View, dict[str, Any]] = {
    "sft": {"prompt": _TURNS, "completion": _TURNS},
    "preference": {"prompt": _TURNS, "chosen": _TURNS, "rejected": _TURNS, "chosen_probability": Value("float64")},
    "unpaired": {"prompt": _TURNS, "completion": _TURNS, "label": Value("bool")},
    "prompt": {"prompt": _TURNS, "columns": Value("string")},
}
"""The columns of each view, and their types."""
MORE: dict[View, dict[str, Any]] = {
    "sft": {},
    "preference": {"principle_ids": [Value("string")], "principle_probabilities": [Value("float64")]},
    "unpaired": {},
    "prompt": {},
}
"""Columns of a run folder that some stages use besides."""
MARGIN = {"margin": Value("float64")}
"""By how much the chosen completion is better: a column of pairs that a reward model uses."""
_FOLDERS: dict[View, str] = {"prompt": "trace"}
"""Where a run folder has the rows of a view, if not in one of its name."""
_TOGETHER = 1000
LISTED = 10_000
"""Rows of a source that are named one by one where they cannot be used."""
_NO_SPLIT = re.compile(r"no split|bad split|unknown split", re.IGNORECASE)


class Unusable(NamedTuple):
    """A row that is none of the view's: where it stood, and what is wrong with it."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


class Reading(NamedTuple):
    """Rows in a view's columns, how many were none, and the first `LISTED` of these."""

    rows: Dataset
    left_out: int
    unusable: tuple[Unusable, ...]


def place(source: SourceSettings) -> Path:
    """Where a source is, if it is on disk."""
    return Path(os.path.expanduser(source.source))


def called(view: View) -> What:
    """What a source of a view is called in errors: only prompts may be a built-in set."""
    return "prompts" if view == "prompt" else "data"


def is_run(path: Path) -> bool:
    """Whether a folder is that of a run of `cai generate`."""
    return (path / "manifest.json").is_file() and (path / "data").is_dir()


def read_source(source: SourceSettings, view: View, split: str, margins: bool = False) -> Reading | None:
    """One split of a source, with `margin` where `margins` are asked for; None where it has no such split.

    Raises `ConfigError` where there is no such source, `PromptSourceError` where it cannot be read.
    """
    path = place(source)
    more = {**(MORE[view] if is_run(path) else {}), **(MARGIN if margins else {})}
    try:
        raw = _raw_rows(source, path, view, split)
        return None if raw is None else _read(raw, _PARSERS[view], Features({**FEATURES[view], **more}))
    except PromptSourceError as exc:
        if split != source.split and _NO_SPLIT.search(str(exc)):
            return None
        raise


def _raw_rows(source: SourceSettings, path: Path, view: View, split: str) -> Iterator[Raw] | None:
    if is_run(path):
        files = sorted((path / "data" / _FOLDERS.get(view, view)).glob(f"{split}-*.parquet"))
        return islice(chain.from_iterable(map(read_file, files)), source.limit) if files else None
    is_file = source.source == "-" or source.source in built_in_sets() or path.is_file()
    is_one_split = is_file or (path / "state.json").is_file()
    if is_one_split and split != source.split:
        return None
    where = source.model_dump(include={"source", "subset", "data_dir", "revision", "limit"})
    return read_raw(PromptsConfig(split=split, **where), called(view))


def _read(raw_rows: Iterator[Raw], parse: Callable[[Any], Row], features: Features) -> Reading:
    """All rows, held as Arrow's columns."""
    left_out = 0
    unusable: list[Unusable] = []
    chunks: list[Dataset] = []

    def parsed() -> Iterator[Row]:
        nonlocal left_out
        for origin, raw in raw_rows:
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = parse(raw)
                yield {name: row.get(name) for name in features}
            except RowError as exc:
                left_out += 1
                if len(unusable) < LISTED:
                    unusable.append(Unusable(origin, str(exc)))

    rows = parsed()
    while chunk := list(islice(rows, _TOGETHER)):
        chunks.append(Dataset.from_list(chunk, features=features))
    none = Dataset.from_dict({name: [] for name in features}, features=features)
    return Reading(datasets.concatenate_datasets(chunks) if chunks else none, left_out, tuple(unusable))


def _sft(raw: Any) -> Row:
    before, completion = to_completion(raw)
    return {"prompt": _turns(before), "completion": _turn(completion)}


def _unpaired(raw: Any) -> Row:
    row, label = _sft(raw), raw.get("label")
    if label not in (True, False):
        what = "no column 'label'" if "label" not in raw else f"its label is {label!r}"
        raise RowError(f"{what}; columns here: {', '.join(map(str, raw)):.200}; expected 'label' to be true or false")
    return {**row, "label": bool(label)}


def _preference(raw: Any) -> Row:
    """A pair without a label of its own counts as certain."""
    pair = to_pair(raw)
    label, margin = raw.get("chosen_probability"), raw.get("margin")
    if label is not None and not (_is_number(label) and 0 <= label <= 1):
        raise RowError(f"its chosen_probability is {label!r}; expected a number from 0 to 1")
    if margin is not None and not (_is_number(margin) and math.isfinite(margin)):
        raise RowError(f"its margin is {margin!r:.50}; expected a number")
    return {
        "prompt": _turns(pair.prompt.messages),
        "chosen": _turn(pair.chosen),
        "rejected": _turn(pair.rejected),
        "chosen_probability": 1.0 if label is None else float(label),
        "margin": margin,
        **{name: raw.get(name) for name in MORE["preference"]},
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _prompt(raw: Any) -> Row:
    """A prompt, and the other columns of its row as JSON, for functions that reward by them."""
    prompt = to_prompt(raw)
    rest = {name: value for name, value in raw.items() if name != "prompt"} if isinstance(raw, Mapping) else {}
    return {"prompt": _turns(prompt.messages), "columns": json.dumps(rest, default=str)}


def _turns(messages: Messages) -> list[Row]:
    return [{"role": one.role, "content": one.content} for one in messages]


def _turn(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]


_PARSERS: dict[View, Callable[[Any], Row]] = {
    "sft": _sft,
    "preference": _preference,
    "unpaired": _unpaired,
    "prompt": _prompt,
}

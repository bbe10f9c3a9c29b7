"""The rows of a stage: from run folders, files, `datasets` folders and the Hub, checked, blended, in TRL's columns.

A run folder has a view for each kind of stage; whatever else is read may come in any of TRL's conversational formats, and pairs
also as transcripts (Anthropic's HH).
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset

from cai.config import PromptsConfig
from cai.errors import CaiError, ConfigError, PromptSourceError
from cai.prompts import read_pairs
from cai.training.settings import SourceSettings, StageName, TrainSettings

View = Literal["sft", "preference", "unpaired"]
VIEWS: dict[StageName, View] = {
    "sft": "sft",
    "reward": "preference",
    "dpo": "preference",
    "kto": "unpaired",
    "orpo": "preference",
    "cpo": "preference",
}
COLUMNS: dict[View, tuple[str, ...]] = {
    "sft": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected", "chosen_probability"),
    "unpaired": ("prompt", "completion", "label"),
}
_NEEDED: dict[View, str] = {
    "sft": "'messages' (a dialogue that ends with the assistant's turn), or 'prompt' and 'completion'",
    "preference": "'chosen' and 'rejected', and 'prompt' unless these are whole dialogues",
    "unpaired": "'prompt', 'completion' and 'label' (true or false)",
}
Row = dict[str, Any]


@dataclass(frozen=True)
class StageData:
    """Rows to train on and to measure on (None where there are none), and what is told of where they are from."""

    train: Dataset
    test: Dataset | None
    sources: tuple[Row, ...]
    """Of each source: its name, rows of each split that were used, and of a run folder the constitution and its hash."""


def load_data(stage: StageName, settings: TrainSettings) -> StageData:
    """The blended rows of all sources. Raises `ConfigError` for a source that is not there or lacks what the stage needs,
    `PromptSourceError` for rows that cannot be read."""
    view = VIEWS[stage]
    train = [_load(one, view, one.split) for one in settings.data]
    test = [_load(one, view, one.test_split) if one.test_split else None for one in settings.data]
    for one, rows in zip(settings.data, train, strict=True):
        if not rows:
            raise ConfigError(_nothing(one, view, rows is None))
    blended = _blend([rows for rows in train if rows], settings)
    measured = [rows for rows in test if rows]
    told = tuple(
        {"source": one.source, "train": len(rows or ()), "test": len(held or ()), **_origin(Path(one.source))}
        for one, rows, held in zip(settings.data, train, test, strict=True)
    )
    return StageData(blended, datasets.concatenate_datasets(measured) if measured else None, told)


def _nothing(source: SourceSettings, view: View, missing: bool) -> str:
    what = f"has no split '{source.split}'" if missing else f"has no rows in its split '{source.split}'"
    hint = f"; its manifest.json counts what was dropped from '{view}'" if _is_run(Path(source.source)) else ""
    return f"data '{source.source}' {what}{hint}; name another source or split"


def _blend(sources: list[Dataset], settings: TrainSettings) -> Dataset:
    """All rows; or, where sources have weights, as many of each as its share allows without a row twice."""
    weights = [one.weight for one in settings.data]
    if None not in weights:
        total = min(len(rows) / (weight or 1) for rows, weight in zip(sources, weights, strict=True))
        counts = [max(1, int(total * (weight or 1))) for weight in weights]
        sources = [rows.shuffle(seed=settings.seed).select(range(n)) for rows, n in zip(sources, counts, strict=True)]
    return datasets.concatenate_datasets(sources) if len(sources) > 1 else sources[0]


def _load(source: SourceSettings, view: View, split: str) -> Dataset | None:
    """One split in the view's columns; None where there is no such split."""
    path = Path(os.path.expanduser(source.source))
    if _is_run(path):
        rows = _read_run(path, view, split)
    elif view == "preference":
        return _read_pairs(source, split)
    else:
        rows = _read_any(source, path, split)
    if rows is None:
        return None
    rows = rows.select(range(min(len(rows), source.limit))) if source.limit else rows
    return rows if not len(rows) else _in_columns(rows, view, source)


def _is_run(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "data").is_dir()


def _origin(path: Path) -> Row:
    """What the manifest of a run folder says of its constitution."""
    if not _is_run(path):
        return {}
    import json

    told = json.loads((path / "manifest.json").read_bytes())
    constitution = told.get("constitution", {})
    return {"constitution": constitution.get("name"), "constitution_hash": constitution.get("hash"), "judge": told.get("judge")}


def _read_run(path: Path, view: View, split: str) -> Dataset | None:
    files = sorted(glob.glob(glob.escape(str(path / "data" / view)) + f"/{split}-*.parquet"))
    return _quietly(partial(datasets.load_dataset, "parquet", data_files=files, split="train"), str(path)) if files else None


def _read_pairs(source: SourceSettings, split: str) -> Dataset | None:
    """Pairs in any format that prompts are read in; without a label of their own they count as certain."""
    config = PromptsConfig(
        source=source.source, split=split, subset=source.subset, revision=source.revision, limit=source.limit
    )
    if split != source.split and Path(os.path.expanduser(source.source)).is_file():
        return None
    try:
        rows = list(read_pairs(config))
    except CaiError:
        if split != source.split:
            return None
        raise
    bad = [row for row in rows if row.prompt is None]
    if bad:
        raise PromptSourceError(
            f"data '{source.source}': {len(bad)} of {len(rows)} rows are no pairs; {bad[0].origin}: {bad[0].error}"
        )
    return Dataset.from_list([_pair(row) for row in rows]) if rows else None


def _pair(row: Any) -> Row:
    chosen, rejected = row.given
    return {
        "prompt": [{"role": one.role, "content": one.content} for one in row.prompt.messages],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "chosen_probability": 1.0,
    }


def _read_any(source: SourceSettings, path: Path, split: str) -> Dataset | None:
    kinds = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
    if path.is_file():
        kind = kinds.get(path.suffix if path.suffix != ".gz" else Path(path.stem).suffix)
        if kind is None:
            raise ConfigError(f"data '{source.source}': expected .jsonl, .json, .csv or .parquet")
        if split != source.split:
            return None
        return _quietly(partial(datasets.load_dataset, kind, data_files=str(path), split="train"), source.source)
    if path.is_dir() and any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        loaded = _quietly(partial(datasets.load_from_disk, str(path)), source.source)
        return loaded.get(split) if isinstance(loaded, datasets.DatasetDict) else loaded if split == source.split else None
    ask = partial(datasets.load_dataset, source.source, source.subset, revision=source.revision)
    return _quietly(ask, source.source).get(split)


def _quietly(load: Any, name: str) -> Any:
    try:
        return load()
    except Exception as exc:  # the boundary of others' files and libraries, whose faults have no common type
        raise ConfigError(f"data '{name}' cannot be read: {type(exc).__name__}: {exc}") from exc


def _in_columns(rows: Dataset, view: View, source: SourceSettings) -> Dataset:
    """The view's columns and no other: what TRL's trainers would otherwise read into more of them is theirs to misread."""
    names = set(rows.column_names)
    if view == "sft" and "messages" in names and not {"prompt", "completion"} <= names:
        rows = rows.map(_split_dialogue, remove_columns=rows.column_names)
    elif view == "preference" and "chosen_probability" not in names:
        rows = rows.add_column("chosen_probability", [1.0] * len(rows))
    missing = [name for name in COLUMNS[view] if name not in rows.column_names]
    if missing:
        raise ConfigError(
            f"data '{source.source}': no column {' or '.join(map(repr, missing))}; columns here: "
            f"{', '.join(sorted(names))}; expected {_NEEDED[view]}"
        )
    return rows.select_columns([*COLUMNS[view], *(name for name in _MORE[view] if name in rows.column_names)])


_MORE: Mapping[View, Iterable[str]] = {"sft": (), "preference": ("principle_ids", "principle_probabilities"), "unpaired": ()}
"""Columns of a run folder that some stages use."""


def _split_dialogue(row: Row) -> Row:
    """The dialogue up to its last turn, and that turn: only the completion is learned."""
    messages = row["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        raise PromptSourceError("a dialogue in 'messages' does not end with the assistant's turn")
    return {"prompt": messages[:-1], "completion": messages[-1:]}

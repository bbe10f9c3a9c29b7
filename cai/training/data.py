"""The rows of a stage: those of all its sources, blended by weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from cai.control_tokens import THOUGHTS, neutralizer
from cai.errors import ConfigError
from cai.training.base_settings import SourceSettings, TrainSettings
from cai.training.objectives import check_objectives, tag_pairs
from cai.training.reading import Reading, Row, Unusable, View, is_run, place, read_source
from cai.training.settings import DpoSettings, RewardSettings, StageName

VIEWS: dict[StageName, View] = {
    "sft": "sft",
    "reward": "preference",
    "dpo": "preference",
    "kto": "unpaired",
    "orpo": "preference",
    "cpo": "preference",
    "ppo": "prompt",
    "rloo": "prompt",
    "grpo": "prompt",
    "online-dpo": "prompt",
}
_TIE = "its chosen_probability is 0.5, which prefers neither completion, and labels are hard here"
_NEEDED: dict[View, str] = {
    "sft": "a dialogue that ends with the assistant's turn",
    "preference": "a pair of completions",
    "unpaired": "a completion with a label",
    "prompt": "a prompt",
}


@dataclass(frozen=True)
class StageData:
    """Rows to train on and to measure on (None where there are none), and what is told of where they are from."""

    train: Dataset
    test: Dataset | None
    sources: tuple[Row, ...]
    """Of each source: its name, its rows of each split, how many were left out, and of a run folder its constitution."""
    unusable: tuple[Unusable, ...] = ()
    """What was left out: up to `LISTED` rows of a split, and a line for all ties of a source."""


def load_data(stage: StageName, settings: TrainSettings) -> StageData:
    """The blended rows of all sources. Raises `ConfigError` for a source that is not there or has nothing for the stage, and
    for labels that are all the same; `PromptSourceError` for one that cannot be read."""
    view = VIEWS[stage]
    train = [_some(_read(one, stage, one.split, settings), one, view) for one in settings.data]
    test = [_read(one, stage, one.test_split, settings) if one.test_split else None for one in settings.data]
    counts = _used(train, settings)
    measured = [reading.rows for reading in test if reading and len(reading.rows)]
    told = tuple(
        _tell(one, used, reading, held) for one, used, reading, held in zip(settings.data, counts, train, test, strict=True)
    )
    blended = _blend([reading.rows for reading in train], counts, settings)
    if isinstance(settings, RewardSettings):
        check_objectives(blended, settings)
    if view == "unpaired":
        _check_labels(blended)
    unusable = tuple(chain.from_iterable(map(_unusable, train, test)))
    return StageData(blended, datasets.concatenate_datasets(measured) if measured else None, told, unusable)


def _read(source: SourceSettings, stage: StageName, split: str, settings: TrainSettings) -> Reading | None:
    """One split of a source; for a reward model with what each tag says of a pair."""
    reading = read_source(source, VIEWS[stage], split, margins=isinstance(settings, RewardSettings))
    if reading is not None and _is_hard(stage, settings):
        reading = _decided(reading, source)
    if reading is None or not isinstance(settings, RewardSettings):
        return reading
    return reading._replace(rows=tag_pairs(reading.rows, source, settings))


def _is_hard(stage: StageName, settings: TrainSettings) -> bool:
    """Whether a pair trains for its chosen completion whatever its probability is; objectives have labels of their own."""
    if isinstance(settings, RewardSettings):
        return not settings.soft_labels and not settings.objectives
    return stage in ("orpo", "cpo") or (isinstance(settings, DpoSettings) and not settings.soft_labels)


def _decided(reading: Reading, source: SourceSettings) -> Reading:
    """The pairs with the likelier completion as the chosen one; those that prefer neither are left out."""
    rows = reading.rows.filter(lambda row: row["chosen_probability"] != 0.5, keep_in_memory=True)
    rows = rows.map(_turned, features=rows.features, keep_in_memory=True)
    ties = len(reading.rows) - len(rows)
    tied = (Unusable(source.source, f"{_TIE} ({ties:,} such)"),) if ties else ()
    return reading._replace(rows=rows, left_out=reading.left_out + ties, unusable=reading.unusable + tied)


def _turned(row: Row) -> Row:
    """The pair with its two sides exchanged, and every probability with them, where the rejected one is preferred."""
    if row["chosen_probability"] > 0.5:
        return row
    said = row.get("principle_probabilities")
    turned = {"chosen": row["rejected"], "rejected": row["chosen"], "chosen_probability": 1 - row["chosen_probability"]}
    return {**row, **turned, **({"principle_probabilities": [1 - one for one in said]} if said else {})}


def _some(reading: Reading | None, source: SourceSettings, view: View) -> Reading:
    if reading is not None and len(reading.rows):
        return reading
    if reading is not None and reading.left_out:
        many = f"none of its {reading.left_out} rows is" if reading.left_out > 1 else "its only row is not"
        raise ConfigError(f"data '{source.source}': {many} {_NEEDED[view]}; the first, {reading.unusable[0]}")
    what = f"has no split '{source.split}'" if reading is None else f"has no rows in its split '{source.split}'"
    hint = f"; its manifest.json counts what was dropped from '{view}'" if is_run(place(source)) else ""
    raise ConfigError(f"data '{source.source}' {what}{hint}; name another source or split")


def _used(readings: list[Reading], settings: TrainSettings) -> list[int]:
    """How many rows of each source are trained on: all, or as many as its share allows without a row twice."""
    lengths, weights = [len(reading.rows) for reading in readings], [one.weight for one in settings.data]
    if None in weights:
        return lengths
    total = min(length / (weight or 1) for length, weight in zip(lengths, weights, strict=True))
    return [max(1, round(total * (weight or 1))) for weight in weights]


def _blend(sources: list[Dataset], counts: list[int], settings: TrainSettings) -> Dataset:
    """All rows, or of each source a draw of so many; columns that not all sources have are left out."""
    if settings.data[0].weight is not None:
        sources = [rows.shuffle(seed=settings.seed).select(range(n)) for rows, n in zip(sources, counts, strict=True)]
    shared = [name for name in sources[0].column_names if all(name in rows.column_names for rows in sources)]
    return datasets.concatenate_datasets([rows.select_columns(shared) for rows in sources])


def _check_labels(rows: Dataset) -> None:
    """Raises `ConfigError` where all completions have one label: KTO moves good ones and bad ones apart."""
    if len(labels := set(rows["label"])) == 1:
        told, lacking = ("good", "false") if labels.pop() else ("bad", "true")
        instead = ", or train sft on these" if told == "good" else ""
        raise ConfigError(
            f"data: all {len(rows)} completions are labelled {told}; KTO needs both: add a source that has rows with label "
            f"{lacking}{instead}"
        )


def _tell(source: SourceSettings, used: int, reading: Reading, held: Reading | None) -> Row:
    told: Row = {"source": source.source, "train": used, "test": len(held.rows) if held else 0}
    if left_out := reading.left_out + (held.left_out if held else 0):
        told |= {"left_out": left_out, "first_left_out": str(_unusable(reading, held)[0])}
    return told | _origin(place(source))


def _unusable(reading: Reading, held: Reading | None) -> tuple[Unusable, ...]:
    return reading.unusable + (held.unusable if held else ())


def _origin(path: Path) -> Row:
    """What the manifest of a run folder says of its constitution."""
    if not is_run(path):
        return {}
    told = json.loads((path / "manifest.json").read_bytes())
    constitution = told.get("constitution", {})
    return {"constitution": constitution.get("name"), "constitution_hash": constitution.get("hash"), "judge": told.get("judge")}


def neutralize(data: StageData, tokenizer: Any) -> StageData:
    """The data with a space inside each token that only the chat template may speak, wherever a text holds one.

    The assistant's own thoughts stay marked (`<think>`).
    """
    row = neutral_row(tokenizer)

    def whole(rows: Dataset) -> Dataset:
        return rows.map(row, features=rows.features, keep_in_memory=True)

    return replace(data, train=whole(data.train), test=whole(data.test) if data.test is not None else None)


def neutral_row(tokenizer: Any) -> Callable[[Row], Row]:
    """What changes the dialogues of one row so."""
    others, own = neutralizer(tokenizer), neutralizer(tokenizer, keep=THOUGHTS)

    def turn(message: Row) -> Row:
        change = own if message["role"] == "assistant" else others
        return {**message, "content": change(message["content"])}

    return lambda given: {name: [turn(one) for one in given[name]] for name in _DIALOGUES if name in given}


_DIALOGUES = ("prompt", "completion", "chosen", "rejected")

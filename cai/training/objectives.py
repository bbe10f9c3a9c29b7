"""What each output of a reward model is trained on: the whole verdict, or the verdicts of the principles with a tag.

A pair from a run has the verdict of each principle (`principle_ids`, `principle_probabilities`), and the run's
constitution.yaml the principles' tags. What a tag says of a pair is the mean over its principles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from cai.constitution import load_constitution
from cai.errors import ConfigError, nearest
from cai.training.base_settings import SourceSettings
from cai.training.settings import RewardSettings

LABELS = "probabilities"
"""The column of labels: for each output the probability that the chosen completion is preferred, NaN where nothing says."""
VERDICTS = ("principle_ids", "principle_probabilities")
Row = dict[str, Any]
_TAGS = {"tags": [Value("string")], "tag_probabilities": [Value("float64")]}


def tag_pairs(rows: Dataset, source: SourceSettings, settings: RewardSettings) -> Dataset:
    """The rows with `tags` and `tag_probabilities` in place of what principles said.

    Raises `ConfigError` where objectives are asked for, and neither the rows nor the source's `tag` say anything of them.
    """
    file = Path(os.path.expanduser(source.source)) / "constitution.yaml"
    has_verdicts = _have_verdicts(rows) and file.is_file()
    if settings.objectives and source.tag is None and not has_verdicts:
        raise ConfigError(
            f"data '{source.source}': no columns {' and '.join(map(repr, VERDICTS))} of a run folder, which objectives are "
            "trained on; make the dataset anew with cai generate, or set this source's tag to the objective that its labels "
            "are for"
        )
    tags = {one.id: one.tags for one in load_constitution(str(file)).principles} if has_verdicts else {}

    def tagged(row: Row) -> Row:
        return _by_tag(row, tags) if has_verdicts else _as_whole(row, source.tag)

    old = [name for name in VERDICTS if name in rows.column_names]
    kept = {name: feature for name, feature in rows.features.items() if name not in old}
    return rows.map(tagged, remove_columns=old, features=Features({**kept, **_TAGS}))


def _have_verdicts(rows: Dataset) -> bool:
    named = all(name in rows.column_names for name in VERDICTS)
    return named and all(said is not None for said in rows[VERDICTS[1]])


def _by_tag(row: Row, tags: Mapping[str, tuple[str, ...]]) -> Row:
    found: dict[str, list[float]] = {}
    for name, probability in zip(row["principle_ids"], row["principle_probabilities"], strict=True):
        for tag in tags.get(name, ()):
            found.setdefault(tag, []).append(probability)
    return {"tags": list(found), "tag_probabilities": [sum(each) / len(each) for each in found.values()]}


def _as_whole(row: Row, tag: str | None) -> Row:
    return {"tags": [tag] if tag else [], "tag_probabilities": [row["chosen_probability"]] if tag else []}


def all_tags(rows: Dataset) -> list[str]:
    """The tags that any pair has a verdict on, sorted."""
    return sorted({tag for tags in rows["tags"] for tag in tags})


def check_objectives(rows: Dataset, settings: RewardSettings) -> None:
    """Raises `ConfigError` for an objective that no pair has a verdict on."""
    known = all_tags(rows)
    for tag in settings.objectives:
        if tag not in known:
            here = f"tags with verdicts: {', '.join(known)}" if known else "no principle that judged them has a tag"
            raise ConfigError(f"objectives: no pair has a verdict on '{tag}'{nearest(tag, known)}; {here}")


def label_pairs(rows: Dataset, settings: RewardSettings) -> Dataset:
    """The rows with a label for each output, less those that have none at all; with `margin` where any has one."""
    if "margin" in rows.column_names and not any(margin is not None for margin in rows["margin"]):
        rows = rows.remove_columns("margin")

    def label(row: Row) -> Row:
        margin = {"margin": row["margin"] or 0.0} if "margin" in row else {}
        return {LABELS: _labels(row, settings), **margin}

    labelled = rows.map(label, desc="labels")
    return labelled.filter(lambda row: not all(map(math.isnan, row[LABELS])))


def _labels(row: Row, settings: RewardSettings) -> list[float]:
    if not settings.objectives:
        return [row["chosen_probability"] if settings.soft_labels else _certain(row["chosen_probability"])]
    said = dict(zip(row["tags"], row["tag_probabilities"], strict=True))
    found = [said.get(tag, math.nan) for tag in settings.objectives]
    return found if settings.soft_labels else [_certain(one) for one in found]


def _certain(probability: float) -> float:
    """0 or 1, whichever is nearer; a tie stays one."""
    return probability if math.isnan(probability) or probability == 0.5 else float(probability > 0.5)

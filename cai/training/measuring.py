"""What a trained reward model is worth on held-out pairs, and what its outputs are normalised by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset
from scipy import special

from cai.intervals import named, numbered, share
from cai.reliability import calibration_error
from cai.rewards.combining import Scores, combine, normalised
from cai.rewards.dialogues import completion_length
from cai.rewards.model import RewardModel
from cai.rewards.spec import RewardSpec
from cai.training.data import StageData
from cai.training.length_effect import length_correlation, length_line
from cai.training.objectives import LABELS, all_tags
from cai.training.settings import RewardSettings

if TYPE_CHECKING:
    from cai.intervals import Numbers

_REFERENCE = 256
"""Pairs of the training rows whose completions are the reference."""


@dataclass(frozen=True)
class _Read:
    """What a model says of n pairs: the n chosen completions, then the n rejected ones."""

    rows: Dataset
    outputs: Numbers
    """2n x members x objectives."""
    tokens: Numbers
    lengths: Numbers
    prompts: Numbers
    """2n: numbers of the prompts."""

    def scores(self, spec: RewardSpec) -> Scores:
        return combine(spec, self.outputs, self.lengths, self.tokens)


def finish(model: RewardModel, settings: RewardSettings, data: StageData) -> tuple[RewardSpec, dict[str, float]]:
    """The model's spec with its normalisation and line of length, and its measures.

    Completions of training rows are the reference; measures are of the held-out rows. Where there are none, only the
    correlation with length is told, of the reference completions.
    """
    reference = _read(model, data.train.shuffle(seed=settings.seed).select(range(min(_REFERENCE, len(data.train)))))
    spec = normalised(model.spec, reference.outputs)
    if settings.length == "fitted":
        line = length_line(reference.scores(spec).reward, reference.lengths, reference.prompts)
        spec = spec.model_copy(update={"length": line})
    if data.test is None:
        return spec, {f"reference_{name}": value for name, value in _length_measures(spec, reference).items()}
    held_out = _read(model, data.test)
    return spec, _measures(spec, held_out, settings)


def _read(model: RewardModel, rows: Dataset) -> _Read:
    dialogues = [[*row["prompt"], *row[side]] for side in ("chosen", "rejected") for row in rows]
    prompts = numbered(row["prompt"] for row in rows)
    outputs, tokens = model.outputs(dialogues)
    lengths = np.array([completion_length(one) for one in dialogues])
    return _Read(rows, outputs, tokens, lengths, np.array([*prompts, *prompts]))


def _measures(spec: RewardSpec, read: _Read, settings: RewardSettings) -> dict[str, float]:
    scores, label = read.scores(spec), np.array(read.rows["chosen_probability"])
    found = {"held_out_pairs": len(read.rows), **_accuracy("accuracy", scores.reward, label, read, settings)}
    if len(spec.members) > 1:
        for place in range(len(spec.members)):
            found |= _accuracy(f"accuracy/member-{place}", scores.members[:, place], label, read, settings)
    more = _calibration(spec, read, settings) | _tag_accuracies(scores, read, settings) | _length_measures(spec, read)
    return found | more


def _accuracy(name: str, reward: Numbers, label: Numbers, read: _Read, settings: RewardSettings) -> dict[str, float]:
    """The share of right pairs with its interval; nothing where no label prefers a completion."""
    told = label != 0.5
    if not told.any():
        return {}
    return named(name, share(_right(reward, label)[told], read.prompts[: len(label)][told], settings.seed))


def _right(reward: Numbers, label: Numbers) -> Numbers:
    """Of each pair 1 where what the label prefers has the higher reward, 0 where it has the lower one, 0.5 between."""
    chosen, rejected = np.split(reward, 2)
    right: Numbers = (np.sign(chosen - rejected) * np.sign(label - 0.5) + 1) / 2
    return right


def _calibration(spec: RewardSpec, read: _Read, settings: RewardSettings) -> dict[str, float]:
    """Expected calibration error: how far the probabilities that the outputs stand for are from the labels.

    A pair's probability is the mean over members and, by their weights, over the objectives that it has labels for: as a
    verdict is one over principles. Where an objective's weight is negative, both are turned.
    """
    chosen, rejected = np.split(read.outputs, 2)
    probability = special.expit(chosen - rejected).mean(axis=1)
    label, weight = np.array(read.rows[LABELS]), np.array(list(spec.objectives.values()))
    weights = np.where(np.isnan(label), 0.0, abs(weight))
    counted = (total := weights.sum(axis=1)) > 0
    if not counted.any():
        return {}

    def mixed(values: Numbers) -> Numbers:
        turned = np.where(weight < 0, 1 - values, values)
        whole: Numbers = (np.nan_to_num(turned) * weights).sum(axis=1)[counted] / total[counted]
        return whole

    predicted, actual = mixed(probability), mixed(label)
    correct = np.where(predicted >= 0.5, actual, 1 - actual)
    prompts = read.prompts[: len(label)][counted]
    return named("calibration_error", calibration_error(abs(predicted - 0.5) + 0.5, correct, prompts, settings.seed))


def _tag_accuracies(scores: Scores, read: _Read, settings: RewardSettings) -> dict[str, float]:
    """Of each objective's own output, or, where there is one for all, of the reward for each tag that has verdicts."""
    said = [dict(zip(row["tags"], row["tag_probabilities"], strict=True)) for row in read.rows]
    found: dict[str, float] = {}
    for place, tag in enumerate(settings.objectives or all_tags(read.rows)):
        label = np.array([one.get(tag, 0.5) for one in said])
        reward = scores.objectives[:, place] if settings.objectives else scores.reward
        found |= _accuracy(f"accuracy/{tag}", reward, label, read, settings)
    return found


def _length_measures(spec: RewardSpec, read: _Read) -> dict[str, float]:
    """Pearson's correlation of the reward with the completion's characters; where a line is taken out, also before that."""
    found = length_correlation(read.scores(spec).reward, read.lengths, read.prompts)
    named = {f"length_correlation_{name}": value for name, value in found.items()}
    if spec.length is None:
        return named
    before = length_correlation(read.scores(spec.model_copy(update={"length": None})).reward, read.lengths, read.prompts)
    return {f"length_correlation_{name}_before": value for name, value in before.items()} | named

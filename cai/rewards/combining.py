"""Outputs of reward models made one reward, as a `RewardSpec` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cai.rewards.spec import RewardSpec

if TYPE_CHECKING:
    from cai.intervals import Numbers


@dataclass(frozen=True)
class Scores:
    """The rewards of n dialogues and what they are made of."""

    reward: Numbers
    """n: the members' rewards made one, less `length`."""
    members: Numbers
    """n x members: each one's reward, its objectives added up by their weights."""
    objectives: Numbers
    """n x objectives: normalised, the mean over members."""
    length: Numbers
    """n: what was taken out for length."""
    tokens: Numbers
    """n: of each dialogue, by the first member's tokenizer."""


def combine(spec: RewardSpec, outputs: Numbers, lengths: Numbers, tokens: Numbers) -> Scores:
    """Rewards from `outputs` (n x members x objectives) of completions of so many characters (n)."""
    mean = np.array([one.mean for one in spec.members])
    deviation = np.array([one.deviation for one in spec.members])
    normal = (outputs - mean) / deviation
    members = normal @ np.array(list(spec.objectives.values()))
    match spec.combine:
        case "mean":
            reward = members.mean(axis=1)
        case "min":
            reward = members.min(axis=1)
        case "mean-variance":
            reward = members.mean(axis=1) - spec.variance_weight * members.var(axis=1)
    taken = spec.length.worth(lengths) if spec.length else np.zeros(len(lengths))
    return Scores(reward - taken, members, normal.mean(axis=1), taken, tokens)


def normalised(spec: RewardSpec, outputs: Numbers) -> RewardSpec:
    """The spec with means and deviations of these outputs; an output that never changes is divided by 1."""
    deviation = outputs.std(axis=0)
    deviation[deviation == 0] = 1.0
    mean = outputs.mean(axis=0)
    members = tuple(
        one.model_copy(update={"mean": tuple(mean[place].tolist()), "deviation": tuple(deviation[place].tolist())})
        for place, one in enumerate(spec.members)
    )
    return spec.model_copy(update={"members": members, "reference": len(outputs)})

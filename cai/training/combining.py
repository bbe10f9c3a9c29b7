"""How the outputs of reward models become one reward; saved beside them as reward.json.

    {"members": [{"folder": "members/0", "base": "smollm2-135m", "mean": [0.4, -1.2], "deviation": [1.1, 0.7], ...}, ...],
     "objectives": {"helpful": 1.0, "harmless": 2.0}, "combine": "min", "length": {"slope": 0.002, "mean": 431.0}, ...}

Each output of each member is normalised by its mean and deviation on reference completions; a member's reward is the sum of
its objectives by their weights; the members' rewards become one; and what length alone is worth is taken out of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, NonNegativeInt, model_validator
from scipy import stats

from cai.documents import Part, Text
from cai.training.settings import Combine, Weight

if TYPE_CHECKING:
    from cai.intervals import Numbers


class MemberSpec(Part):
    """One reward model."""

    folder: Text
    """Where it is, from the folder of reward.json."""
    base: Text | None = None
    """The model whose weights its adapters change; null where it is whole."""
    revision: Text | None = None
    """The base's Hub revision."""
    version: Text | None = None
    """The version of the base's weights that it was trained on."""
    mean: tuple[Weight, ...]
    """Of each output on the reference completions."""
    deviation: tuple[float, ...]
    """The standard deviation of each output on them."""


class LengthLine(Part):
    """What length alone is worth: `slope` times the characters of a completion beyond `mean`.

    Beyond `longest`, or below `shortest`, it is worth no more: a line says nothing of lengths that it was not fitted on.
    """

    slope: Weight
    mean: Weight
    shortest: Weight = 0.0
    longest: Weight = 1e9

    def worth(self, lengths: Numbers) -> Numbers:
        """Of completions of so many characters."""
        return self.slope * (np.clip(lengths, self.shortest, self.longest) - self.mean)


class RewardSpec(Part):
    """How outputs become a reward."""

    members: tuple[MemberSpec, ...] = Field(min_length=1)
    objectives: dict[Text, Weight] = Field(default={"reward": 1.0}, min_length=1)
    """By name of the output, its weight in the reward."""
    combine: Combine = "mean"
    """How the members' rewards become one."""
    variance_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The lambda of `mean-variance`."""
    length: LengthLine | None = None
    reference: NonNegativeInt = 0
    """How many completions means, deviations and the line of length are of."""

    @model_validator(mode="after")
    def _agrees(self) -> RewardSpec:
        if any(len(one.mean) != len(self.objectives) or len(one.deviation) != len(self.objectives) for one in self.members):
            raise ValueError(f"expected for each member {len(self.objectives)} means and deviations, one of each objective")
        if any(deviation <= 0 for one in self.members for deviation in one.deviation):
            raise ValueError("expected deviations above 0")
        return self


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


def length_line(reward: Numbers, lengths: Numbers, prompts: Numbers) -> LengthLine:
    """The least-squares line of reward on length within prompts (numbers beside each completion).

    Within them, since a prompt that asks for long completions may be one that gets good ones. It ends where the shortest
    and the longest twentieth of the completions begin.
    """
    within, of = _within(lengths, prompts), _within(reward, prompts)
    slope = float(stats.linregress(within, of).slope) if within.any() else 0.0
    shortest, longest = np.quantile(lengths, (0.05, 0.95))
    return LengthLine(slope=slope, mean=float(lengths.mean()), shortest=float(shortest), longest=float(longest))


def length_correlation(reward: Numbers, lengths: Numbers, prompts: Numbers) -> dict[str, float]:
    """Pearson's correlation of reward with length: `overall`, and `within` prompts; without one that does not exist."""
    pairs = {"overall": (reward, lengths), "within_prompts": (_within(reward, prompts), _within(lengths, prompts))}
    return {name: float(stats.pearsonr(*pair).statistic) for name, pair in pairs.items() if all(map(np.std, pair))}


def _within(values: Numbers, prompts: Numbers) -> Numbers:
    """Each value less the mean over its prompt."""
    _, places, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    less: Numbers = values - (np.bincount(places, weights=values) / counts)[places]
    return less

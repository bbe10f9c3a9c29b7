"""How the outputs of reward models become one reward; saved beside them as reward.json.

    {"members": [{"folder": "members/0", "base": "smollm2-135m", "mean": [0.4, -1.2], "deviation": [1.1, 0.7], ...}, ...],
     "objectives": {"helpful": 1.0, "harmless": 2.0}, "combine": "min", "length": {"slope": 0.002, "mean": 431.0}, ...}

Each output of each member is normalised by its mean and deviation on reference completions; a member's reward is the sum of
its objectives by their weights; the members' rewards become one; and what length alone is worth is taken out of that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, model_validator

from cai.documents import Part, Text

if TYPE_CHECKING:
    from cai.intervals import Numbers

SPEC = "reward.json"
Weight = Annotated[float, Field(allow_inf_nan=False)]
Combine = Literal["mean", "min", "mean-variance"]


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
        return self.slope * (lengths.clip(self.shortest, self.longest) - self.mean)


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

"""A reward model as the judge: a sequence classifier with one output, which knows no principles.

The difference of two rewards is the logit of the preference (Bradley and Terry 1952), as reward models are trained.
"""

from __future__ import annotations

from collections.abc import Sequence

from cai.constitution import Principle
from cai.engines import Engine, RewardRequest
from cai.judging.pointwise import PointwiseJudge
from cai.types import Message, Messages


class RewardModelJudge(PointwiseJudge):
    """Compares the rewards of two completions."""

    name = "reward-model"

    def __init__(self, engine: Engine) -> None:
        """The engine must be able to give a `reward`."""
        super().__init__()
        self._engine = engine

    async def rate(self, prompt: Messages, text: str, principles: Sequence[Principle]) -> list[float]:
        """The reward."""
        answer = await self._engine.reward(RewardRequest((*prompt, Message("assistant", text))))
        return [answer.reward]

    def rows(self, principles: Sequence[Principle]) -> list[tuple[str, float]]:
        """One row, whatever the principles are."""
        return [("reward", 1.0)]

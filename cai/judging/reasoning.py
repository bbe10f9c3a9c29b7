"""Chain of thought, then the log-probability of the choice (Bai et al. 2022, section 4.1; Lee et al. 2023, section 2.1).

The judge first thinks aloud about the two completions under a principle, and then chooses; its thoughts make it too
sure, so each probability is clamped (to 40-60 % in the paper). Both orders, and the mean of several samples of thought.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.config import JudgeConfig
from cai.constitution import Principle
from cai.engines import Engine, GenerateRequest
from cai.errors import VerdictError
from cai.judging.base import Reading, leaning
from cai.judging.choice import LETTERS
from cai.judging.ordered import OrderedJudge, ask
from cai.seeds import derive_seed
from cai.types import Message, Messages

_FOLDER = Path(__file__).parent
_THINK = Template(_FOLDER.joinpath("reasoning.txt").read_text(encoding="utf-8"))
_CHOOSE = _FOLDER.joinpath("reasoning_choice.txt").read_text(encoding="utf-8").strip()
_LEAST = 2.0**-40
"""The step of probabilities: 0 and 1 have no finite logarithm or log-odds."""


class ReasoningJudge(OrderedJudge):
    """Thinks about two completions under each of some principles, then chooses."""

    name = "reasoning"

    def __init__(self, engine: Engine, config: JudgeConfig) -> None:
        """The engine must be able to `generate` and to give `choice_logprobs`."""
        self._engine, self._config = engine, config

    async def read(self, prompt: Messages, shown: tuple[str, str], principles: Sequence[Principle], seed: int) -> list[Reading]:
        """The log-probabilities of A and B, from the mean of the clamped probabilities of all samples."""
        asked = [(question(prompt, *shown, principle), derive_seed(seed, principle.id)) for principle in principles]
        return list(await asyncio.gather(*(self._under(*one) for one in asked)))

    async def _under(self, asked: Messages, seed: int) -> Reading:
        numbers = range(self._config.samples)
        chances = await asyncio.gather(*(self._sample(asked, derive_seed(seed, number)) for number in numbers))
        mean = sum(chances) / len(chances)
        return math.log(mean), math.log1p(-mean)

    async def _sample(self, asked: Messages, seed: int) -> float:
        """The clamped probability of A after one thought."""
        config = self._config
        thought = await self._engine.generate(GenerateRequest(asked, config.max_tokens, config.temperature, 1.0, seed))
        ending = Message("assistant", f"{thought.text.strip()}\n\n{_CHOOSE}")
        [answer] = await self._engine.choice_logprobs([(*asked, ending)], LETTERS)
        if not all(map(math.isfinite, answer.logprobs)):
            raise VerdictError(f"expected finite log-probabilities, got {answer.logprobs}")
        low, high = config.clamp
        return min(max(0.5 + leaning(answer.logprobs[0] - answer.logprobs[1]), low, _LEAST), high, 1 - _LEAST)


def question(prompt: Messages, first: str, second: str, principle: Principle) -> Messages:
    """The dialogue that asks for thoughts."""
    return (ask(_THINK, prompt, (first, second), principle),)

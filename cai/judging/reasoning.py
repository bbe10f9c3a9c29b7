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
from cai.judging.base import Named, Reading, leaning, neutral, principle_verdict, show_conversation, turned, verdict
from cai.judging.choice import LETTERS
from cai.seeds import derive_seed
from cai.types import Message, Messages, PrincipleVerdict, Source, Verdict

_FOLDER = Path(__file__).parent
_THINK = Template(_FOLDER.joinpath("reasoning.txt").read_text(encoding="utf-8"))
_CHOOSE = _FOLDER.joinpath("reasoning_choice.txt").read_text(encoding="utf-8").strip()
_LEAST = 2.0**-40
"""The step of probabilities: 0 and 1 have no finite logarithm or log-odds."""


class ReasoningJudge:
    """Thinks about two completions under each of some principles, then chooses."""

    def __init__(self, engine: Engine, config: JudgeConfig) -> None:
        """The engine must be able to `generate` and to give `choice_logprobs`."""
        self._engine, self._config = engine, config

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The verdict on two completions, each a (name, text); thoughts are sampled from seeds derived of `seed`."""
        verdicts = await asyncio.gather(*(self._under(prompt, pair, one, derive_seed(seed, one.id)) for one in principles))
        return verdict(pair, source, verdicts)

    async def _under(self, prompt: Messages, pair: tuple[Named, Named], principle: Principle, seed: int) -> PrincipleVerdict:
        (_, first), (_, second) = pair
        shown, swapped = await asyncio.gather(
            self._read(question(prompt, first, second, principle), seed),
            self._read(question(prompt, second, first, principle), seed),
        )
        readings = (shown, turned(swapped))
        leanings = [leaning(a - b) for a, b in readings]
        return principle_verdict("reasoning", principle.id, principle.weight, readings, leanings)

    async def _read(self, asked: Messages, seed: int) -> Reading:
        """The log-probabilities of A and B, from the mean of the clamped probabilities of all samples."""
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
    text = _THINK.substitute(
        conversation=show_conversation(prompt),
        first=neutral(first),
        second=neutral(second),
        question=principle.preference or "",
    )
    return (Message("user", text.strip()),)

"""Multiple choice by log-probability, in both orders (Bai et al. 2022, section 4.1; Lee et al. 2023, section 2.1).

The judge is shown the conversation, two completions as A and B, and last a principle's question; the probability of the
letter A against B is read off, nothing is generated. The completions change places and the two readings are averaged, so
a judge that always prefers the first one says 0.5. With the question last, all principles share one long beginning.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.constitution import Principle
from cai.engines import ChoiceLogprobs, Engine
from cai.errors import VerdictError
from cai.types import Message, Messages, PrincipleVerdict, Source, Verdict

Named = tuple[str, str]
"""A completion's name in its record, and its text."""
_FOLDER = Path(__file__).parent
_TEMPLATE = Template(_FOLDER.joinpath("choice.txt").read_text(encoding="utf-8"))
_PREFILL = _FOLDER.joinpath("choice_prefill.txt").read_text(encoding="utf-8")
_LETTERS = ("A", "B")
_DELIMITER = re.compile(r"<(?=\s*/?\s*(?:conversation|completion|system|user|assistant)\b)", re.IGNORECASE)
_STEP = 2.0**-40
"""Probabilities are multiples of this, so that `1 - p` is exact: a verdict turned twice is the same to the last digit."""


class ChoiceJudge:
    """Compares two completions under each of some principles."""

    def __init__(self, engine: Engine) -> None:
        """The engine must be able to give `choice_logprobs`."""
        self._engine = engine

    async def compare(
        self,
        prompt: Messages,
        pair: tuple[Named, Named],
        principles: Sequence[Principle],
        source: Source,
    ) -> Verdict:
        """The verdict on two completions, each a (name, text). Raises `VerdictError` for what is no number."""
        (first, first_text), (second, second_text) = pair
        shown, turned = await asyncio.gather(
            self._ask(prompt, first_text, second_text, principles), self._ask(prompt, second_text, first_text, principles)
        )
        readings = zip(principles, shown, turned, strict=True)
        verdicts = tuple(principle_verdict(*reading) for reading in readings)
        total = sum(verdict.weight for verdict in verdicts)
        leaning = sum(verdict.weight * (verdict.probability - 0.5) for verdict in verdicts) / total
        return Verdict(first, second, source, _probability(leaning), verdicts)

    async def _ask(self, prompt: Messages, first: str, second: str, principles: Sequence[Principle]) -> list[ChoiceLogprobs]:
        questions = [question(prompt, first, second, principle) for principle in principles]
        return await self._engine.choice_logprobs(questions, _LETTERS)


def principle_verdict(principle: Principle, shown: ChoiceLogprobs, turned: ChoiceLogprobs) -> PrincipleVerdict:
    """One principle's verdict from its two readings; `turned` showed the second completion as A."""
    logprobs = ((shown.logprobs[0], shown.logprobs[1]), (turned.logprobs[1], turned.logprobs[0]))
    if not all(math.isfinite(logprob) for reading in logprobs for logprob in reading):
        raise VerdictError(f"principle '{principle.id}': expected finite log-probabilities, got {logprobs}")
    leaning = sum(_leaning(first - second) for first, second in logprobs) / 2
    return PrincipleVerdict(principle.id, principle.weight, logprobs, _probability(leaning))


def _leaning(difference: float) -> float:
    """The logistic function less 0.5: odd to the last digit, and it never overflows."""
    return math.tanh(difference / 2) / 2


def _probability(leaning: float) -> float:
    return 0.5 + round(leaning / _STEP) * _STEP


def question(prompt: Messages, first: str, second: str, principle: Principle) -> Messages:
    """The dialogue that asks the judge; it ends in the middle of the judge's answer, before the letter."""
    turns = "\n".join(f"<{turn.role}>\n{neutral(turn.content)}\n</{turn.role}>" for turn in prompt)
    text = _TEMPLATE.substitute(
        conversation=turns, first=neutral(first), second=neutral(second), question=principle.preference or ""
    )
    return Message("user", text.strip()), Message("assistant", _PREFILL)


def neutral(text: str) -> str:
    """A text that cannot open or close one of the template's delimiters."""
    return _DELIMITER.sub("&lt;", text)

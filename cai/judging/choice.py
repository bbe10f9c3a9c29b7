"""Multiple choice by log-probability, in both orders (Bai et al. 2022, section 4.1; Lee et al. 2023, section 2.1).

The judge is shown the conversation, two completions as A and B, and last a principle's question; the probability of the
letter A against B is read off, nothing is generated. The completions change places and the two readings are averaged, so
a judge that always prefers the first one says 0.5. With the question last, all principles share one long beginning; the
papers' layout, with the principle before the completions, is there to be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from string import Template

from cai.config import JudgeConfig
from cai.constitution import Constitution, Principle
from cai.engines import Engine
from cai.judging.base import Reading
from cai.judging.ordered import OrderedJudge, ask
from cai.types import Message, Messages

_FOLDER = Path(__file__).parent
_LAYOUTS = {
    "principle-last": Template(_FOLDER.joinpath("choice.txt").read_text(encoding="utf-8")),
    "principle-first": Template(_FOLDER.joinpath("choice_principle_first.txt").read_text(encoding="utf-8")),
}
_PREFILL = _FOLDER.joinpath("choice_prefill.txt").read_text(encoding="utf-8")
LETTERS = ("A", "B")


class ChoiceJudge(OrderedJudge):
    """Compares two completions under each of some principles. Nothing is sampled."""

    name = "choice"

    def __init__(self, engine: Engine, config: JudgeConfig, constitution: Constitution) -> None:
        """The engine must be able to give `choice_logprobs`."""
        self._engine, self._layout = engine, config.layout
        self._shots = few_shot(constitution, config)

    async def read(self, prompt: Messages, shown: tuple[str, str], principles: Sequence[Principle], seed: int) -> list[Reading]:
        """The log-probabilities of A and B, for all principles in one call."""
        questions = [self._shots + question(prompt, *shown, principle, self._layout) for principle in principles]
        answers = await self._engine.choice_logprobs(questions, LETTERS)
        return [(answer.logprobs[0], answer.logprobs[1]) for answer in answers]


def few_shot(constitution: Constitution, config: JudgeConfig) -> Messages:
    """The constitution's exemplars as answered questions: each revision is better than what it revises, as A and B in turn."""
    turns: Messages = ()
    able = [one for one in constitution.exemplars if constitution.principle(one.principle).preference]
    for index, exemplar in enumerate(able[: config.exemplars]):
        better, worse = exemplar.revision, exemplar.completion
        first, second = (better, worse) if index % 2 else (worse, better)
        asked = (Message("user", exemplar.prompt),)
        user, start = question(asked, first, second, constitution.principle(exemplar.principle), config.layout)
        turns += user, Message("assistant", f"{start.content}{LETTERS[0 if index % 2 else 1]})")
    return turns


def question(prompt: Messages, first: str, second: str, principle: Principle, layout: str = "principle-last") -> Messages:
    """The dialogue that asks the judge; it ends in the middle of the judge's answer, before the letter."""
    return ask(_LAYOUTS[layout], prompt, (first, second), principle), Message("assistant", _PREFILL)

"""Judges that are shown both completions at once: always in both orders, of which the leanings are averaged.

So a judge that always prefers what it is shown first says 0.5. The methods are in `choice`, `reasoning` and `text`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Sequence
from string import Template

from cai.constitution import Principle
from cai.judging.base import Named, Reading, leaning, neutral, principle_verdict, show_conversation, turned, verdict
from cai.types import Message, Messages, Source, Verdict


class OrderedJudge:
    """Reads two completions in the order in which they are shown, and then turned round."""

    name = ""

    @abstractmethod
    async def read(self, prompt: Messages, shown: tuple[str, str], principles: Sequence[Principle], seed: int) -> list[Reading]:
        """For each principle a reading of the texts as they are shown, first and second. Raises `VerdictError`."""

    def leaning(self, reading: Reading) -> float:
        """How much more the first is preferred, in [-0.5, 0.5]; here of two log-probabilities."""
        return leaning(reading[0] - reading[1])

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The verdict on two completions, each a (name, text); what is sampled has seeds derived of `seed`."""
        (_, first), (_, second) = pair
        shown, swapped = await asyncio.gather(
            self.read(prompt, (first, second), principles, seed), self.read(prompt, (second, first), principles, seed)
        )
        verdicts = []
        for principle, one, other in zip(principles, shown, swapped, strict=True):
            readings = (one, turned(other))
            leanings = [self.leaning(reading) for reading in readings]
            verdicts.append(principle_verdict(self.name, principle.id, principle.weight, readings, leanings))
        return verdict(pair, source, verdicts)


def ask(template: Template, prompt: Messages, shown: tuple[str, str], principle: Principle) -> Message:
    """The user's turn that shows the conversation and both completions and asks the principle's question."""
    text = template.substitute(
        conversation=show_conversation(prompt),
        first=neutral(shown[0]),
        second=neutral(shown[1]),
        question=principle.preference or "",
    )
    return Message("user", text.strip())

"""What all judges share: the Protocol, the arithmetic from readings to a verdict, and texts that cannot break out.

A judge's reading is a pair of numbers, for the first and the second completion: log-probabilities of being chosen,
ratings, rewards. Each principle has one reading for each order in which the two were shown (one where there is no
order), and from them the probability that the first is preferred.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Protocol

from cai.constitution import Principle
from cai.errors import VerdictError
from cai.types import Messages, PrincipleVerdict, Source, Verdict

Named = tuple[str, str]
"""A completion's name in its record, and its text."""
Reading = tuple[float, float]
_DELIMITER = re.compile(r"<(?=\s*+(?:/\s*+)?(?:conversation|completion|system|user|assistant|question)\b)", re.IGNORECASE)
_STEP = 2.0**-40
"""Probabilities are multiples of this, so that `1 - p` is exact: a verdict turned twice is the same to the last digit."""


class Judge(Protocol):
    """Compares two completions of one prompt."""

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The verdict on two completions, each a (name, text), under each of the principles; `seed` is for what is sampled.

        Raises `VerdictError` for a judge's answer that is no verdict.
        """


def leaning(difference: float) -> float:
    """The logistic function less 0.5: odd to the last digit, and it never overflows."""
    return math.tanh(difference / 2) / 2


def probability(lean: float) -> float:
    """A leaning in [-0.5, 0.5] as a probability."""
    return 0.5 + round(lean / _STEP) * _STEP


def principle_verdict(
    judge: str, principle_id: str, weight: float, readings: Sequence[Reading], leanings: Sequence[float]
) -> PrincipleVerdict:
    """One principle's verdict: the mean of the leanings that its readings were turned into."""
    if not readings or not all(math.isfinite(number) for reading in readings for number in reading):
        raise VerdictError(f"principle '{principle_id}': expected finite numbers, got {list(readings)!r:.200}")
    lean = sum(leanings) / len(leanings)
    return PrincipleVerdict(principle_id, weight, tuple(readings), probability(lean), judge)


def verdict(pair: tuple[Named, Named], source: Source, principles: Sequence[PrincipleVerdict]) -> Verdict:
    """The principles' probabilities, averaged by weight."""
    total = sum(one.weight for one in principles)
    lean = sum(one.weight * (one.probability - 0.5) for one in principles) / total
    (first, _), (second, _) = pair
    return Verdict(first, second, source, probability(lean), tuple(principles))


def turned(reading: Reading) -> Reading:
    """The reading of an order in which the second completion was shown first, put into the pair's own order."""
    return reading[1], reading[0]


def show_conversation(prompt: Messages) -> str:
    """A dialogue as delimited turns."""
    return "\n".join(f"<{turn.role}>\n{neutral(turn.content)}\n</{turn.role}>" for turn in prompt)


def neutral(text: str) -> str:
    """A text that cannot open or close one of the templates' delimiters."""
    return _DELIMITER.sub("&lt;", text)

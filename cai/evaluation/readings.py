"""The few numbers that are kept of each judged pair, so that memory does not grow with its texts.

A record is a pair that people have judged: `candidates[0]` is the completion that they chose, `candidates[1]` the one that
they rejected, and its one verdict compares the two in this order. So a judge is right where it prefers the first; a tie
is half right.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from cai.judging.base import leaning, probability
from cai.seeds import derive_seed
from cai.types import PrincipleVerdict, Record

if TYPE_CHECKING:
    from cai.intervals import Numbers


class Table:
    """Columns of numbers, 8 bytes each."""

    def __init__(self, *columns: str) -> None:
        self._columns = {name: array("d") for name in columns}

    def add(self, **row: float) -> None:
        """Take in one row, which has every column."""
        for name, column in self._columns.items():
            column.append(row[name])

    def __getitem__(self, name: str) -> Numbers:
        import numpy as np

        return np.array(self._columns[name])


@dataclass
class Readings:
    """What is kept: a row for each pair, for each principle of a pair, and for each judge of a pair.

    `prompts`, `principles` and `judges` number what occurred, in its order; prompts are told apart by their messages.
    A row's `probability` is that of preferring the completion that people chose. `usual` is whether the usual judge is right,
    `longer` how many characters longer the chosen completion is, `flipped` NaN where no principle had two orders. `ordered`
    counts the readings in pairs of orders, `first_shown` those of them that prefer what was shown first, `flips` the
    flipped verdicts. A judge's opinion is the mean of its principles' verdicts by weight; that a calibrated member of a panel
    weighs its principles otherwise is kept in no record.
    """

    prompts: dict[bytes, int] = field(default_factory=dict)
    principles: dict[str, int] = field(default_factory=dict)
    judges: dict[str, int] = field(default_factory=dict)
    pairs: Table = field(default_factory=lambda: Table("prompt", "probability", "usual", "longer", "flipped"))
    votes: Table = field(
        default_factory=lambda: Table("prompt", "principle", "probability", "verdict", "ordered", "first_shown", "flips")
    )
    opinions: Table = field(default_factory=lambda: Table("pair", "judge", "probability"))
    count: int = 0

    def add(self, record: Record) -> None:
        """Take in one judged pair."""
        (verdict,) = record.verdicts
        messages = hashlib.blake2b(msgspec.json.encode(record.prompt.messages), digest_size=16).digest()
        prompt = self.prompts.setdefault(messages, len(self.prompts))
        self.pairs.add(
            prompt=prompt,
            probability=verdict.probability,
            usual=usual(record.prompt.id, verdict.principles),
            longer=len(record.text(verdict.first)) - len(record.text(verdict.second)),
            flipped=_flipped(verdict.principles),
        )
        for name in _distinct(one.principle_id for one in verdict.principles):
            votes = [one for one in verdict.principles if one.principle_id == name]
            number = self.principles.setdefault(name, len(self.principles))
            self.votes.add(prompt=prompt, principle=number, verdict=verdict.probability, **_vote(votes))
        for name in _distinct(one.judge for one in verdict.principles):
            votes = [one for one in verdict.principles if one.judge == name]
            number = self.judges.setdefault(name, len(self.judges))
            self.opinions.add(pair=self.count, judge=number, probability=_average(votes))
        self.count += 1


def right(lean: float) -> float:
    """The share of being right of a judge that leans so far towards the completion that people chose."""
    return 0.5 if lean == 0 else float(lean > 0)


def usual(prompt_id: str, principles: Sequence[PrincipleVerdict]) -> float:
    """Whether the same model is right when it is asked the usual way: one principle, one order, the likelier answer.

    Principle and order are drawn by a hash of the prompt's and the principles' ids. The order must be drawn: people's choice
    is always the first of the pair, and a judge that only likes what is shown first would seem to be always right.
    """
    ranked = sorted(principles, key=lambda one: (one.principle_id, one.judge))
    draw = derive_seed(0, prompt_id, *(one.principle_id for one in ranked))
    order, number = divmod(draw, len(ranked))
    readings = ranked[number].readings
    first, second = readings[order % len(readings)]
    return right(first - second)


def _flipped(principles: Sequence[PrincipleVerdict]) -> float:
    """Whether the two orders, each averaged over the principles by weight, prefer different completions."""
    ordered = [one for one in principles if len(one.readings) == 2]
    if not ordered:
        return math.nan
    leanings = [sum(one.weight * leaning(one.readings[k][0] - one.readings[k][1]) for one in ordered) for k in (0, 1)]
    return float(min(leanings) < 0 < max(leanings))


def _vote(votes: Sequence[PrincipleVerdict]) -> dict[str, float]:
    """One principle's verdicts on a pair, by one judge or a panel."""
    ordered = [one for one in votes if len(one.readings) == 2]
    first_shown = 0.0
    for one in ordered:
        (first, second), (other_first, other_second) = one.readings
        first_shown += right(first - second) + right(other_second - other_first)
    return {
        "probability": _average(votes),
        "ordered": len(ordered),
        "first_shown": first_shown,
        "flips": sum(one.flipped for one in ordered),
    }


def _average(votes: Sequence[PrincipleVerdict]) -> float:
    lean = sum(one.weight * (one.probability - 0.5) for one in votes) / sum(one.weight for one in votes)
    return probability(lean)


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))

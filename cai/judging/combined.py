"""Judges made of judges: a model beside checks, and a panel."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from cai.constitution import Principle
from cai.errors import VerdictError
from cai.judging.base import Judge, Named, probability, verdict
from cai.types import Messages, Source, Verdict


class WithChecks:
    """Principles with a check go to the checks, all others to a model; the verdict is averaged by the weights of both."""

    def __init__(self, model: Judge | None, checks: Judge, always_ask: bool = False) -> None:
        """`model` is None where there are only checks; `always_ask` is for one that judges without principles."""
        self._model, self._checks, self._always_ask = model, checks, always_ask

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The verdict of both, in the order of the principles; without principles, an abstention."""
        checked = [principle for principle in principles if principle.check]
        asked = [principle for principle in principles if not principle.check]
        parts = []
        if checked:
            parts.append(self._checks.compare(prompt, pair, checked, source, seed))
        if self._model and (asked or self._always_ask):
            parts.append(self._model.compare(prompt, pair, asked, source, seed))
        if not parts:  # in a panel, where nothing was drawn that can be checked
            return Verdict(pair[0][0], pair[1][0], source, 0.5, ())
        found = [one for part in await asyncio.gather(*parts) for one in part.principles]
        order = {principle.id: index for index, principle in enumerate(principles)}
        return verdict(pair, source, sorted(found, key=lambda one: order.get(one.principle_id, len(order))))


class Member(NamedTuple):
    """One judge of a panel."""

    name: str
    weight: float
    judge: Judge


class PanelJudge:
    """Several judges, each with its weight; every member's principles are kept under its name."""

    def __init__(self, members: Sequence[Member]) -> None:
        """At least two members with different names."""
        self._members = members

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The members' verdicts, averaged by their weights; who abstains has none.

        A calibrated member's verdict is no mean of its principles' and counts as it is; their weights, of which the sum is
        the member's, only show the parts.
        """
        verdicts = await asyncio.gather(
            *(member.judge.compare(prompt, pair, principles, source, seed) for member in self._members)
        )
        shares = []
        for member, one in zip(self._members, verdicts, strict=True):
            total = sum(principle.weight for principle in one.principles)  # 0 of one that abstains
            for principle in one.principles:
                weight = member.weight * principle.weight / total
                shares.append(msgspec.structs.replace(principle, weight=weight, judge=member.name))
        if not shares:
            raise VerdictError("all members of the panel abstain: they are checks, and no principle that was drawn has one")
        heard = [
            (member.weight, one.probability - 0.5)
            for member, one in zip(self._members, verdicts, strict=True)
            if one.principles
        ]
        lean = sum(weight * lean for weight, lean in heard) / sum(weight for weight, _ in heard)
        return Verdict(pair[0][0], pair[1][0], source, probability(lean), tuple(shares))

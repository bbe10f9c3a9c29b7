"""Judges that look at one completion at a time: each completion is rated once, however many pairs it is in.

A pair's verdict is computed from its two ratings, so K completions cost K ratings and not K * K, and there is no order
that could bias. The methods are in `likelihood`, `score`, `checks` and `reward_model`.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

from cai.constitution import Principle
from cai.judging.base import Named, Reading, leaning, principle_verdict, verdict
from cai.types import Messages, Source, Verdict

_KEPT = 4096
"""Ratings that are remembered: those of the prompts in flight."""
_Key = tuple[Messages, str, tuple[str, ...]]


class PointwiseJudge:
    """Rates completions one by one and compares the ratings."""

    name = ""

    def __init__(self) -> None:
        """Nothing is rated yet."""
        self._ratings: OrderedDict[_Key, asyncio.Task[list[float]]] = OrderedDict()

    @abstractmethod
    async def rate(self, prompt: Messages, text: str, principles: Sequence[Principle]) -> list[float]:
        """A number for each principle; a higher one is better. Raises `VerdictError`."""

    def rows(self, principles: Sequence[Principle]) -> list[tuple[str, float]]:
        """Id and weight of each number that `rate` gives."""
        return [(principle.id, principle.weight) for principle in principles]

    def leaning(self, reading: Reading) -> float:
        """How much more the first is preferred, in [-0.5, 0.5]; here by Bradley and Terry's model."""
        return leaning(reading[0] - reading[1])

    async def compare(
        self, prompt: Messages, pair: tuple[Named, Named], principles: Sequence[Principle], source: Source, seed: int
    ) -> Verdict:
        """The verdict on two completions, each a (name, text). Nothing is sampled."""
        (_, first), (_, second) = pair
        ratings = await asyncio.gather(self._once(prompt, first, principles), self._once(prompt, second, principles))
        verdicts = [
            principle_verdict(self.name, principle_id, weight, [reading], [self.leaning(reading)])
            for (principle_id, weight), reading in zip(self.rows(principles), zip(*ratings, strict=True), strict=True)
        ]
        return verdict(pair, source, verdicts)

    async def _once(self, prompt: Messages, text: str, principles: Sequence[Principle]) -> list[float]:
        key = prompt, text, tuple(principle.id for principle in principles)
        if key not in self._ratings:
            self._ratings[key] = asyncio.ensure_future(self.rate(prompt, text, principles))
            self._ratings[key].add_done_callback(lambda task: self._forget_failure(key, task))
            if len(self._ratings) > _KEPT:
                self._ratings.popitem(last=False)
        return await asyncio.shield(self._ratings[key])

    def _forget_failure(self, key: _Key, task: asyncio.Task[list[float]]) -> None:
        if (task.cancelled() or task.exception()) and self._ratings.get(key) is task:
            del self._ratings[key]

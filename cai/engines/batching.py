"""Batches that form from what waits: one computes, the others gather behind it."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
_LINGER = 0.005
"""Seconds in which those whose answers just came may ask again, before the next batch forms."""


@dataclass(eq=False)
class _Waiting(Generic[Item, Result]):
    item: Item
    answer: Future[Result]


class Batcher(Generic[Item, Result]):
    """Takes single items, computes them together, and gives each its own result."""

    def __init__(
        self,
        choose: Callable[[Sequence[Item]], Sequence[int]],
        compute: Callable[[list[Item]], Awaitable[Sequence[Result]]],
    ) -> None:
        """`choose` names the places of a next batch among what waits, the oldest first; `compute` gives a result each."""
        self._choose, self._compute = choose, compute
        self._waiting: list[_Waiting[Item, Result]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Result:
        """The item's result, when its batch is computed."""
        waiting: _Waiting[Item, Result] = _Waiting(item, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.ensure_future(self._work())
        return await waiting.answer

    async def _work(self) -> None:
        while True:
            await asyncio.sleep(_LINGER)
            self._waiting = [one for one in self._waiting if not one.answer.done()]
            if not self._waiting:
                return
            await self._one_batch()

    async def _one_batch(self) -> None:
        batch = self._waiting  # where no choice can be made, all that wait are told so
        try:
            chosen = set(self._choose([one.item for one in self._waiting]))
            if not chosen:
                raise ValueError("no place of a next batch was chosen")
            batch = [one for place, one in enumerate(self._waiting) if place in chosen]
            self._waiting = [one for place, one in enumerate(self._waiting) if place not in chosen]
            results = await self._compute([one.item for one in batch])
            answered = list(zip(batch, results, strict=True))
        except Exception as exc:  # whatever it is, it belongs to those who wait for this batch
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(exc)
        else:
            for one, result in answered:
                if not one.answer.done():
                    one.answer.set_result(result)
        finally:
            for one in batch:  # those still without an answer: the engine was closed
                one.answer.cancel()

    def close(self) -> None:
        """Cancel all that waits."""
        for one in self._waiting:
            one.answer.cancel()
        if self._worker:
            self._worker.cancel()

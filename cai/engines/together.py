"""Completions of one prompt that are asked for by one request (the API's `n`), so that the prompt is paid for once."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Awaitable, Callable

import msgspec

from cai.engines.base import GenerateRequest
from cai.errors import RequestError
from cai.types import Completion

_MOST = 128
"""Completions of one request; OpenAI takes no more."""
Ask = Callable[[GenerateRequest, int], Awaitable[list[Completion | RequestError]]]
"""Asks for so many completions of a request, and gives what came of it: so many or fewer, one at least."""
_Waiting = tuple[GenerateRequest, Future[Completion]]


class Together:
    """Makes one request of those that are equal but for the seed and come in the same turn of the event loop."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._gathered: dict[GenerateRequest, list[_Waiting]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def generate(self, request: GenerateRequest) -> Completion:
        """One of the completions. Raises what asking for them raises."""
        loop, alike = asyncio.get_running_loop(), msgspec.structs.replace(request, seed=0)
        answer: Future[Completion] = loop.create_future()
        if alike not in self._gathered:
            self._gathered[alike] = []
            loop.call_soon(self._begin, alike)
        self._gathered[alike].append((request, answer))
        return await answer

    def _begin(self, alike: GenerateRequest) -> None:
        gathered = self._gathered.pop(alike, [])
        for start in range(0, len(gathered), _MOST):
            task = asyncio.ensure_future(self._answer(gathered[start : start + _MOST]))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, asked: list[_Waiting]) -> None:
        """By the seed of the first; those that the server leaves out are asked for again, each by its own."""
        waiting = [one for one in asked if not one[1].done()]
        if not waiting:
            return
        try:
            found = await self._ask(waiting[0][0], len(waiting))
        except BaseException as exc:  # each that waits has to hear of it
            for _, answer in waiting:
                _settle(answer, exc)
            if not isinstance(exc, Exception):
                raise
            return
        for (_, answer), one in zip(waiting, found, strict=False):
            _settle(answer, one)
        await asyncio.gather(*(self._answer([one]) for one in waiting[len(found) :]))

    async def close(self) -> None:
        """Ask for nothing more; what waits is cancelled."""
        for _, answer in (one for gathered in self._gathered.values() for one in gathered):
            answer.cancel()
        self._gathered.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _settle(answer: Future[Completion], found: Completion | BaseException) -> None:
    if answer.done():
        return
    if isinstance(found, Completion):
        answer.set_result(found)
    elif isinstance(found, asyncio.CancelledError):
        answer.cancel()
    else:
        answer.set_exception(found)

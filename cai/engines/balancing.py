"""Which URL a request goes to: of those that may be asked, the least busy; where there is none, requests wait in turn.

A URL that nobody listens at is dead, and so is one whose gateway answers in its place again and again: it is looked at
from time to time and left out until it is there. One that named a time (`Retry-After`) is asked nothing before it.
"""

from __future__ import annotations

import asyncio
import math
import time
from asyncio import Future
from collections import deque
from collections.abc import Awaitable, Callable

from yarl import URL

from cai.engines.pacing import Window

_LOOK = 1.0
"""Seconds between two looks at whether a dead URL is there again."""
_GONE = 3
"""So many answers of a gateway, with no good one between them, mean that there is no server behind it."""


class Endpoint:
    """One base URL, how many requests are there, and whether it may be asked."""

    def __init__(self, url: str, concurrency: int | None) -> None:
        """The URL as the recipe says it, with or without a slash at its end."""
        self.base = url.rstrip("/")
        self.root = self.base.removesuffix("/v1")
        self.window = Window(concurrency)
        self.dead, self.died = "", 0.0
        """Why it is left out (empty: it is not), and when it died; times are those of `time.monotonic`."""
        self.not_before = 0.0
        """When it may be asked again; 0: at any time."""
        self.missed = 0
        """Answers of a gateway since the last good one."""
        self.paths: dict[str, URL] = {}

    def at(self, path: str) -> URL:
        """`/v1/...` below the base URL, other paths below the server's root."""
        if path not in self.paths:
            place = self.base + path.removeprefix("/v1") if path.startswith("/v1/") else self.root + path
            self.paths[path] = URL(place)
        return self.paths[path]


class Balancer:
    """The URLs of one model, and the requests that wait for one. Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        endpoints: list[Endpoint],
        is_there: Callable[[Endpoint], Awaitable[bool]],
        is_over: Callable[[Endpoint, float], bool],
    ) -> None:
        """`is_there` looks at a dead URL; `is_over` is asked where all are dead, since when, and ends the looking."""
        self.endpoints = endpoints
        self._is_there, self._is_over = is_there, is_over
        self._waiting: deque[Future[Endpoint]] = deque()
        self._looking: dict[Endpoint, asyncio.Task[None]] = {}
        self._resting: dict[Endpoint, asyncio.TimerHandle] = {}

    def _free(self) -> Endpoint | None:
        best, least = None, math.inf
        for one in self.endpoints:
            window = one.window
            if not one.dead and not one.not_before and window.has_room and (share := window.in_flight / window.limit) < least:
                best, least = one, share
        return best

    async def acquire(self) -> Endpoint:
        """A URL for one request, which is `release`d after it."""
        endpoint = None if self._waiting else self._free()
        if endpoint is None:
            waiting: Future[Endpoint] = asyncio.get_running_loop().create_future()
            self._waiting.append(waiting)
            try:
                return await waiting
            except asyncio.CancelledError:
                if waiting.done() and not waiting.cancelled() and not waiting.exception():
                    self.release(waiting.result())
                raise
        endpoint.window.in_flight += 1
        return endpoint

    def release(self, endpoint: Endpoint) -> None:
        """The request there has ended."""
        endpoint.window.in_flight -= 1
        if self._waiting:
            self._hand_out()

    def _hand_out(self) -> None:
        while self._waiting and (endpoint := self._free()):
            waiting = self._waiting.popleft()
            if not waiting.done():
                endpoint.window.in_flight += 1
                waiting.set_result(endpoint)

    def fail(self, problem: Exception) -> None:
        """All that wait get this error."""
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(problem)

    # -- URLs that are not asked ----------------------------------------------------------------------------------------

    def rest(self, endpoint: Endpoint, seconds: float) -> None:
        """Ask nothing for so long."""
        until = time.monotonic() + seconds
        if until <= endpoint.not_before:
            return
        endpoint.not_before = until
        if timer := self._resting.pop(endpoint, None):
            timer.cancel()
        self._resting[endpoint] = asyncio.get_running_loop().call_later(seconds, self._wake, endpoint)

    def _wake(self, endpoint: Endpoint) -> None:
        left = endpoint.not_before - time.monotonic()
        if left > 0:  # a timer may be some milliseconds early
            self._resting[endpoint] = asyncio.get_running_loop().call_later(left, self._wake, endpoint)
            return
        endpoint.not_before = 0.0
        del self._resting[endpoint]
        self._resume(endpoint)

    def miss(self, endpoint: Endpoint, problem: str) -> None:
        """A gateway answered in the server's place; a single time that may be chance."""
        endpoint.missed += 1
        if endpoint.missed >= _GONE:
            self.bury(endpoint, problem)

    def bury(self, endpoint: Endpoint, problem: str) -> None:
        """Leave out a URL until it is there again."""
        if not endpoint.dead:
            endpoint.died = time.monotonic()
        endpoint.dead = problem
        if endpoint not in self._looking:
            self._looking[endpoint] = asyncio.ensure_future(self._look(endpoint))

    async def _look(self, endpoint: Endpoint) -> None:
        """From time to time, until it is there or all are dead for too long."""
        while True:
            await asyncio.sleep(_LOOK)
            if await self._is_there(endpoint):
                break
            everywhere = all(one.dead for one in self.endpoints)
            if everywhere and self._is_over(endpoint, max(one.died for one in self.endpoints)):
                return
        endpoint.dead = ""
        del self._looking[endpoint]
        self._resume(endpoint)

    def _resume(self, endpoint: Endpoint) -> None:
        endpoint.window.resume(time.monotonic())
        self._hand_out()

    def close(self) -> None:
        """Look no more; what waits is cancelled."""
        for task in self._looking.values():
            task.cancel()
        for timer in self._resting.values():
            timer.cancel()
        self._looking.clear()
        self._resting.clear()
        while self._waiting:
            self._waiting.popleft().cancel()

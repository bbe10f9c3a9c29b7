"""The window on a simulated server: it finds the capacity, follows it, and is not fooled by chance refusals."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable

import pytest

from cai.engines.pacing import START, Rates, Window

KINDS = (0.25, 0.25, 0.25, 0.05)
"""Seconds that requests of four kinds take."""


class Simulated:
    """A server with so many places at each time; what comes beyond waits there, or is refused."""

    def __init__(self, capacity: Callable[[float], int], refuses: bool = False, chance: float = 0.0, seed: int = 0) -> None:
        self.capacity, self.refuses, self.chance, self.random = capacity, refuses, chance, random.Random(seed)

    def run(self, seconds: float, fixed: int | None = None, waiting: int = 512) -> tuple[float, Window]:
        """The work done in so many seconds, and the window at their end."""
        self.window, self.events, self.count = Window(fixed), [], itertools.count()
        self.ready, self.running, self.queue, work = waiting, 0, deque(), 0.0
        self.send(0.0)
        while self.events:
            now, _, what, began, kind = heapq.heappop(self.events)
            if now > seconds:
                break
            if what != "again":
                self.window.ended(began, now, kind, what == "refused")
                self.window.in_flight -= 1
            if what == "refused":
                self.at(now + self.random.uniform(0, 0.5), "again")
            else:
                self.ready += 1
            if what == "done":
                self.running -= 1
                work += KINDS[kind]
            self.work_on(now)
            self.send(now)
        return work, self.window

    def at(self, when: float, what: str, began: float = 0.0, kind: int = 0) -> None:
        heapq.heappush(self.events, (when, next(self.count), what, began, kind))

    def send(self, now: float) -> None:
        while self.ready and self.window.has_room:
            self.ready -= 1
            self.window.in_flight += 1
            kind = self.random.randrange(len(KINDS))
            full = self.refuses and self.running >= self.capacity(now)
            if full or self.random.random() < self.chance:
                self.at(now + 0.005 if full else now + KINDS[kind], "refused", now, kind)
            else:
                self.queue.append((now, kind))
                self.work_on(now)

    def work_on(self, now: float) -> None:
        while self.queue and self.running < self.capacity(now):
            began, kind = self.queue.popleft()
            self.running += 1
            self.at(now + KINDS[kind] * self.random.uniform(0.5, 1.5), "done", began, kind)


def steady(places: int) -> Callable[[float], int]:
    return lambda now: places


CHANGES = {
    "more": lambda now: 16 if now < 30 else 64,
    "less": lambda now: 64 if now < 30 else 16,
    "dip": lambda now: 100 if now < 20 or now > 40 else 10,
}


@pytest.mark.parametrize(("places", "share"), [(4, 0.75), (64, 0.9), (300, 0.9)])
@pytest.mark.parametrize("refuses", [False, True])
def test_it_finds_what_a_server_can_bear(places: int, share: float, refuses: bool) -> None:
    work, _ = Simulated(steady(places), refuses).run(60)
    assert work > share * 60 * places


@pytest.mark.parametrize("places", [16, 64])
def test_a_server_that_only_gets_slower_does_not_get_more(places: int) -> None:
    _, window = Simulated(steady(places)).run(60, waiting=2000)
    assert window.limit < 200


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("refuses", [False, True])
def test_it_follows_a_capacity_that_changes(change: str, refuses: bool) -> None:
    ours, _ = Simulated(CHANGES[change], refuses).run(60)
    best = max(Simulated(CHANGES[change], refuses).run(60, fixed)[0] for fixed in (8, 16, 32, 64, 96, 128))
    assert ours > 0.85 * best


def test_refusals_by_chance_do_not_shut_it_down() -> None:
    work, window = Simulated(steady(64), chance=0.05).run(60)
    assert work > 0.75 * 60 * 64
    assert window.limit > 32


def test_an_overload_halves_once_for_all_that_were_in_flight() -> None:
    window = Window(64)
    for _ in range(8):
        window.ended(0.0, 1.0, "a", False)
    for _ in range(20):
        window.ended(0.5, 1.5, "a", True)
    assert window.limit == 32


def test_a_fixed_window_is_there_at_once_and_never_larger() -> None:
    work, window = Simulated(steady(1000)).run(10, fixed=48)
    assert window.limit == 48
    assert work > 0.9 * 10 * 48
    assert Window(None).limit == START


async def test_requests_and_tokens_a_minute_are_spread_over_the_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    rates, loop = Rates(60 * 50, None), asyncio.get_running_loop()
    began = loop.time()
    for _ in range(60):
        await rates.wait(1)
    assert loop.time() - began > 0.19, "50 at once, 10 more take a fifth of a second"
    tokens = Rates(None, 60_000)
    began = loop.time()
    await tokens.wait(900)
    await tokens.wait(300)
    assert 0.19 < loop.time() - began < 2


async def test_a_request_of_more_than_a_second_is_charged_whole_and_in_its_turn() -> None:
    rates, loop = Rates(None, 60_000), asyncio.get_running_loop()
    began, sent = loop.time(), list[tuple[str, float]]()

    async def ask(name: str, tokens: float) -> None:
        await rates.wait(tokens)
        sent.append((name, loop.time() - began))

    await asyncio.gather(ask("first", 1800), ask("second", 1700), ask("small", 100))
    assert [name for name, _ in sent] == ["first", "second", "small"]
    for (_, when), tokens in zip(sent, (1800, 3500, 3600), strict=True):
        assert tokens - 1000 <= 1010 * when < tokens, "all that was asked for so far, but for the second's worth"


async def test_one_that_is_cancelled_while_it_is_charged_lets_the_next_one_go() -> None:
    rates = Rates(None, 60_000)
    large = asyncio.ensure_future(rates.wait(10**6))
    await asyncio.sleep(0.05)
    large.cancel()
    await asyncio.wait_for(rates.wait(500), 5)


@pytest.mark.parametrize(("spent", "seconds"), [(0.0, 0.5), (2000.0, 2.0)])
async def test_a_server_that_tells_nothing_of_its_usage_teaches_nothing(spent: float, seconds: float) -> None:
    rates = Rates(None, 60_000)
    for _ in range(200):
        rates.learn(1000, spent)
    began = asyncio.get_running_loop().time()
    await rates.wait(1000)
    await rates.wait(500)
    assert seconds - 0.02 < asyncio.get_running_loop().time() - began < seconds + 1.5


async def test_an_estimate_that_is_always_too_high_is_learnt() -> None:
    rates = Rates(None, 60_000)
    for _ in range(200):
        rates.learn(1000, 100)
    began = asyncio.get_running_loop().time()
    for _ in range(8):
        await rates.wait(1000)
    assert asyncio.get_running_loop().time() - began < 0.5

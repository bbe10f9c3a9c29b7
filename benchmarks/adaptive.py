"""How many requests at once: what the engine finds while running, beside the best of several fixed numbers.

Three servers, each of which takes 0.2 s a call: one whose capacity falls in the middle of the run and one whose capacity
rises, both of which refuse (429) what is beyond a short queue; and one that refuses nothing and only gets slower. A fixed
number is the same engine, retries and all, with a window that never changes. *In flight* is the median that the server
saw in the second half.

    python -m benchmarks.adaptive [CALLS]      (default 6000)

Goal: within 10 % of the best fixed number.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.mock import Server, served
from cai.config import ModelConfig
from cai.engines import GenerateRequest
from cai.engines.openai import OpenAIEngine
from cai.engines.pacing import Window
from cai.types import Message

LATENCY = 0.2
LARGE, SMALL, QUEUE = 96, 24, 8
FIXED = (12, 24, 48, 96, 192)
WAITING = 512
"""Requests that a run has ready at any time."""


class Scenario(NamedTuple):
    """What a server works on at once before and after the middle, and how many may wait there (-1: all)."""

    name: str
    before: int
    after: int
    queue: int

    def limit(self, calls: int) -> float:
        """The least seconds that the server needs."""
        return calls / 2 * LATENCY * (1 / self.before + 1 / self.after)


SCENARIOS = (
    Scenario(f"works on {LARGE} at once, then on {SMALL}; refuses more", LARGE, SMALL, QUEUE),
    Scenario(f"works on {SMALL} at once, then on {LARGE}; refuses more", SMALL, LARGE, QUEUE),
    Scenario(f"works on {SMALL} at once; refuses nothing, gets slower", SMALL, SMALL, -1),
)


class Fixed(Window):
    """A window that learns nothing."""

    def ended(self, began: float, now: float, kind: Hashable, overloaded: bool) -> None:
        """Nothing changes."""


class Seen(NamedTuple):
    """One run: its seconds, the calls that were refused, and how many were in flight."""

    seconds: float
    refused: int
    in_flight: float


@contextmanager
def halfway(server: Server, scenario: Scenario, calls: int) -> Iterator[list[int]]:
    """Change the capacity when half of the calls are answered; yields what is in flight from then on."""
    seen: list[int] = []
    ended = threading.Event()

    def look() -> None:
        turned = False
        while not ended.wait(0.05):
            stats = server.stats()
            if turned:
                seen.append(stats["in_flight"])
            elif stats["answered"] >= calls / 2:
                server.control(concurrency=scenario.after)
                turned = True

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


async def ask_all(engine: OpenAIEngine, calls: int) -> None:
    """All calls, so many at a time waiting for the engine."""
    numbers = iter(range(calls))

    async def work() -> None:
        for number in numbers:
            await engine.generate(GenerateRequest((Message("user", f"Question {number}"),), 8, 1.0, 1.0, number))

    await asyncio.gather(*(work() for _ in range(WAITING)))
    await engine.close()


def measure(server: Server, scenario: Scenario, calls: int, fixed: int | None) -> Seen:
    """One run."""
    engine = OpenAIEngine(ModelConfig.model_validate({"model": server.url, "server": {"retries": 1000}}))
    if fixed is not None:
        for endpoint in engine._client.endpoints:
            endpoint.window = Fixed(fixed)
    assert engine.capabilities  # asked for now, not in the measured time
    server.control(clear=True, concurrency=scenario.before, queue=scenario.queue)
    with halfway(server, scenario, calls) as in_flight:
        began = time.perf_counter()
        _run(ask_all(engine, calls))
        seconds = time.perf_counter() - began
    stats = server.stats()
    return Seen(seconds, stats["statuses"].get("429", 0), statistics.median(in_flight) if in_flight else 0.0)


def _run(job: Any) -> None:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(job)


def show(name: str, seen: Seen, limit: float) -> None:
    print(
        f"  {name:<18} {seen.seconds:6.1f} s ({limit / seen.seconds:.2f} of the limit), {seen.refused:5,} refused, "
        f"{seen.in_flight:4.0f} in flight",
        flush=True,
    )


def main() -> None:
    calls = int((sys.argv[1:] or ["6000"])[0])
    with served(latency=LATENCY) as server:
        for scenario in SCENARIOS:
            limit = scenario.limit(calls)
            print(f"{calls:,} calls, a server that {scenario.name}; limit {limit:.1f} s")
            fixed = {number: measure(server, scenario, calls, number) for number in FIXED}
            for number, seen in fixed.items():
                show(f"fixed at {number}", seen, limit)
            found = measure(server, scenario, calls, None)
            show("found while running", found, limit)
            best = min(fixed, key=lambda number: fixed[number].seconds)
            print(f"  beside the best fixed, {best}: {fixed[best].seconds / found.seconds:.2f} times as fast (goal 0.90)\n")


if __name__ == "__main__":
    main()

"""Which principles are drawn, from a seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cai.constitution import Principle


def draw_weighted(principles: Sequence[Principle], count: int, seed: int) -> list[Principle]:
    """`count` different principles, heavier ones more often: each waits for a time of mean 1 / weight, the first ones win.

    Efraimidis and Spirakis 2006, algorithm A, with the logarithm of its keys, which tiny weights do not underflow.
    """
    generator = random.Random(seed)
    times = {principle.id: generator.expovariate(principle.weight) for principle in principles}
    return sorted(principles, key=lambda principle: times[principle.id])[:count]


def draw_evenly(principles: Sequence[Principle], count: int, seed: int) -> list[Principle]:
    """`count` different principles (or all there are), each as likely, in the constitution's order."""
    chosen = set(random.Random(seed).sample(range(len(principles)), min(count, len(principles))))
    return [principle for index, principle in enumerate(principles) if index in chosen]

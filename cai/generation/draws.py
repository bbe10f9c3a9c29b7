"""Everything random, as a hash of (run seed, prompt id, step): the same whatever runs beside it or ran before."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

from cai.constitution import Principle


def derive_seed(run_seed: int, prompt_id: str, *step: str | int) -> int:
    """A number below 2**63 for one step of one prompt."""
    text = ascii((run_seed, prompt_id, *step))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


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

"""The gold of `benchmarks.overoptimization`: answers of 30 words. Alone in this file, by whose content a training is known."""

from __future__ import annotations

from typing import Any

WANTED, WIDTH = 30, 20


def gold(text: str) -> float:
    """1 at 30 words, 0 at 10 and at 50, never below -1."""
    return max(-1.0, 1 - abs(len(text.split()) - WANTED) / WIDTH)


def gold_rewards(completions: Any, **columns: Any) -> list[float]:
    """What `gold: {function: ...}` asks."""
    return [gold(one[-1]["content"]) for one in completions]

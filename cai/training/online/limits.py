"""When a training has gone astray, told from the lines of its rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cai.errors import ConfigError
from cai.report.written import Line

SUSTAINED = 3
"""Rollouts: the first so many are the beginning, and the last so many have to be beyond a limit, each of them."""
_FIRST_DISTINCT = 0.25
"""Of the distinct-2 of the beginning: below this share of it, completions are nearly all alike."""
_REPETITION, _ALIKE, _EMPTY, _UNFINISHED = 0.5, 0.75, 0.75, 0.95
"""Shares above which completions are repetitive, the same text for whatever prompt, without a word, or without an end."""
_RISEN = 0.25
"""By how much such a share has to be above that of the beginning: what a policy began with is no collapse."""


def check_kl(limit: float | None, target: float | None) -> None:
    """Raises `ConfigError` where a training would be steered past its limit."""
    if limit is not None and target is not None and target >= limit:
        raise ConfigError(
            f"limits.kl: a training is stopped from {limit:g} nats a completion on, and trl.target_kl steers it to {target:g}; "
            "raise limits.kl, or lower trl.target_kl"
        )


def over_kl(lines: Sequence[Line], limit: float) -> str:
    """What is wrong with the KL from the reference, in nats a completion, or an empty text."""
    last = [line["kl"] for line in lines if "kl" in line][-SUSTAINED:]
    if len(last) < SUSTAINED or min(last) <= limit:
        return ""
    return f"the KL from the reference is {last[-1]:.3g} nats a completion, over limits.kl ({limit:g}) in {SUSTAINED} rollouts"


def collapsed(lines: Sequence[Line]) -> str:
    """How completions have collapsed in comparison with the first rollouts, or an empty text."""
    if len(lines) < 2 * SUSTAINED:
        return ""
    first, last = lines[:SUSTAINED], lines[-SUSTAINED:]
    beginning, now = mean(first, "distinct_2"), highest(last, "distinct_2")
    if beginning is not None and now is not None and now < _FIRST_DISTINCT * beginning:
        return f"completions are nearly all alike: distinct-2 is {now:.2g}, and was {beginning:.2g} at the beginning"
    for name, limit, what in (
        ("repetition", _REPETITION, "of what a completion says it has said before"),
        ("empty", _EMPTY, "of completions have no word in them"),
        ("alike", _ALIKE, "of pairs of completions to different prompts are the same text"),
        ("unfinished", _UNFINISHED, "of completions have no end"),
    ):
        beginning, now = mean(first, name), lowest(last, name)
        if beginning is not None and now is not None and now > max(limit, beginning + _RISEN):
            return f"{100 * now:.0f} % {what}; it was {100 * beginning:.0f} % at the beginning"
    return ""


def _known(lines: Sequence[Line], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]


def mean(lines: Sequence[Line], name: str) -> float | None:
    """Of the lines that know it; None where none does."""
    known = _known(lines, name)
    return math.fsum(known) / len(known) if known else None


def highest(lines: Sequence[Line], name: str) -> float | None:
    """None where a line does not know it."""
    known = _known(lines, name)
    return max(known) if len(known) == len(lines) else None


def lowest(lines: Sequence[Line], name: str) -> float | None:
    """None where a line does not know it."""
    known = _known(lines, name)
    return min(known) if len(known) == len(lines) else None

"""What is told once and stops nothing: completions that move far from those of the beginning, and rewards that say nothing.

What they look like is compared with the first rollouts, and has to be as far away in each of the last ones (see `limits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cai.report.written import Line, unscored
from cai.training.online.limits import SUSTAINED, highest, lowest, mean

_RISEN = 0.25
"""By how much a share has to be above that of the beginning."""
_SHARES = {"refusals": "of completions refuse", "language_changes": "of completions are in another language than their prompt"}
_LENGTH_CORRELATION = 0.5
"""So far from 0, and by `_RISEN` further than at the beginning, has a correlation to be."""
_UNSCORED, _ENOUGH = 0.1, 32
"""The share of completions without a reward that is told, and of how many at least."""


class _Measure(NamedTuple):
    """A measure that is compared with its beginning as a ratio."""

    name: str
    what: str
    below: float
    above: float


_RATIOS = (
    _Measure("words", "words a completion", 0.5, 2.0),
    _Measure("entropy", "nats a token are the policy's entropy", 0.25, 4.0),
)


class Drift:
    """Tells each of these once."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def new(self, lines: Sequence[Line]) -> list[str]:
        """What the lines of all rollouts so far say that was not told before."""
        found = {name: text for name, text in _all(lines) if name not in self._told}
        self._told |= found.keys()
        return list(found.values())


def _all(lines: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """Each thing that is to be told, with a name for it."""
    for name, (none, of) in unscored(lines).items():
        if of >= _ENOUGH and _UNSCORED * of < none < of:
            yield f"unscored {name}", f"reward '{name}' had no number for {none:,} of {of:,} completions so far"
    if len(lines) < 2 * SUSTAINED:
        return
    first, last = lines[:SUSTAINED], lines[-SUSTAINED:]
    for name, what in _SHARES.items():
        before, after = mean(first, name), lowest(last, name)
        if before is not None and after is not None and after > before + _RISEN:
            yield name, f"{100 * after:.0f} % {what}; it was {100 * before:.0f} % at the beginning"
    for one in _RATIOS:
        before, least, most = mean(first, one.name), lowest(last, one.name), highest(last, one.name)
        if before and least is not None and most is not None and (most < one.below * before or least > one.above * before):
            yield one.name, f"{last[-1][one.name]:.3g} {one.what}; it was {before:.3g} at the beginning"
    yield from _of_length(first, last)


def _of_length(first: Sequence[Line], last: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """A reward that comes to go with length, or against it: within prompts, where there are several completions of each."""
    for where in ("within_prompts", "overall"):
        name = f"length_correlation_{where}"
        before, least, most = mean(first, name), lowest(last, name), highest(last, name)
        if before is None or least is None or most is None:
            continue
        risen, fallen = max(_LENGTH_CORRELATION, before + _RISEN), min(-_LENGTH_CORRELATION, before - _RISEN)
        if least > risen or most < fallen:
            yield (
                "length_correlation",
                f"the reward goes {'with' if least > risen else 'against'} length: their correlation is {last[-1][name]:.2f}, "
                f"and was {before:.2f} at the beginning",
            )
        return

"""Means with a 95 % interval that knows that pairs of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[Any]

_RESAMPLES = 2000
_NUMBERS_AT_ONCE = 1_000_000
"""Drawn in one batch, which bounds the memory."""
_OUTSIDE = 0.05
"""The share of intervals that may miss."""


class Estimate(Struct, frozen=True):
    """The mean over `pairs` pairs, with the ends of its 95 % interval, or None where the pairs cannot tell."""

    value: float
    low: float | None
    high: float | None
    pairs: int


def share(values: Numbers, prompts: Numbers, seed: int) -> Estimate:
    """The mean of at least one value in [0, 1], each of the prompt (a number) beside it.

    Where it is 0 or 1 no resample differs; then the interval is the exact one of a binomial share with each prompt as one
    trial (Clopper and Pearson 1934).
    """
    found = difference(values, prompts, seed)
    trials = len(set(prompts.tolist()))
    if trials < 2 or found.value not in (0, 1):
        return found
    reach = 1 - (_OUTSIDE / 2) ** (1 / trials)
    low, high = (0.0, reach) if found.value == 0 else (1 - reach, 1.0)
    return Estimate(found.value, low, high, found.pairs)


def difference(values: Numbers, prompts: Numbers, seed: int) -> Estimate:
    """The mean of at least one value of any size, each of the prompt (a number) beside it.

    The interval is the percentile bootstrap over whole prompts (Efron and Tibshirani 1993, chapters 8 and 13): prompts
    are drawn with replacement, each with all its pairs. None for one prompt, and where all prompts have the same mean.
    The same prompts and seed give the same resamples, so intervals of several measures belong together.
    """
    import numpy as np

    _, cluster = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(cluster, weights=values), np.bincount(cluster)
    low, high = _bootstrap(sums, counts, seed) if len(np.unique(sums / counts)) > 1 else (None, None)
    return Estimate(float(values.mean()), low, high, len(values))


def _bootstrap(sums: Numbers, counts: Numbers, seed: int) -> tuple[float, float]:
    import numpy as np
    from scipy import stats

    found = stats.bootstrap(
        (sums, counts),
        lambda drawn, sizes, axis: drawn.sum(axis=axis) / sizes.sum(axis=axis),
        n_resamples=_RESAMPLES,
        batch=max(1, _NUMBERS_AT_ONCE // len(sums)),
        vectorized=True,
        paired=True,
        confidence_level=1 - _OUTSIDE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def numbered(prompts: Iterable[object]) -> Numbers:
    """A number for each prompt, the same one for those that are written the same."""
    import numpy as np

    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(repr(one), len(numbers)) for one in prompts], dtype=int)


def named(name: str, estimate: Estimate) -> dict[str, float]:
    """A measure with its ends, where it has them: `accuracy/helpful`, `accuracy_low/helpful`, `accuracy_high/helpful`."""
    found = dict(zip((name, *_ends(name)), (estimate.value, estimate.low, estimate.high), strict=True))
    return {key: value for key, value in found.items() if value is not None}


def gathered(measures: Mapping[str, Any]) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    """Each measure that is a number, with the ends of its interval, which are not told again by themselves."""
    ends = {name: _ends(name) for name in measures}
    known = {name: pair for name, pair in ends.items() if all(end in measures for end in pair)}
    told = {end for pair in known.values() for end in pair}
    for name, value in measures.items():
        if isinstance(value, int | float) and name not in told:
            low_high = known.get(name)
            yield name, value, low_high and (measures[low_high[0]], measures[low_high[1]])


def _ends(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    return f"{first}_low{slash}{rest}", f"{first}_high{slash}{rest}"

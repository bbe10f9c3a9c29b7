"""Whether a judge is right as often as it is sure: reliability, expected calibration error, Brier score, log loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from cai.intervals import Estimate

if TYPE_CHECKING:
    from cai.intervals import Numbers

_BINS = 10
_RESAMPLES = 2000
_LEAST = 2.0**-40
"""The step of a verdict's probabilities: the log loss takes 0 for this, or one verdict sure and wrong made it infinite."""


class ReliabilityBin(Struct, frozen=True):
    """The pairs whose confidence max(p, 1 - p) lies in [low, high), of the last bin also 1; means over them."""

    low: float
    high: float
    pairs: int
    confidence: float
    accuracy: float


def bins(confidence: Numbers, correct: Numbers) -> tuple[ReliabilityBin, ...]:
    """Ten bins of equal width over confidences in [0.5, 1], without those that are empty (Naeini et al. 2015, section 2)."""
    import numpy as np

    edges = np.linspace(0.5, 1, _BINS + 1)
    number = np.digitize(confidence, edges[1:-1])
    found = []
    for index in np.unique(number):
        inside = number == index
        means = float(confidence[inside].mean()), float(correct[inside].mean())
        found.append(ReliabilityBin(float(edges[index]), float(edges[index + 1]), int(inside.sum()), *means))
    return tuple(found)


def expected_error(parts: Sequence[ReliabilityBin]) -> float:
    """The gaps between confidence and accuracy, averaged over the pairs: 0 at best (ECE, Naeini et al. 2015, section 2)."""
    return sum(one.pairs * abs(one.accuracy - one.confidence) for one in parts) / sum(one.pairs for one in parts)


def calibration_error(confidence: Numbers, correct: Numbers, prompts: Numbers, seed: int) -> Estimate:
    """The expected calibration error over the same bins, with the 95 % interval of a bootstrap over whole prompts.

    It is biased upwards, and resamples more so. Of a bin, the gap is how far the sum of what is right differs from that of
    the confidences.
    """
    import numpy as np
    from scipy import stats

    bin_of = np.minimum((2 * _BINS * (confidence - 0.5)).astype(int), _BINS - 1)
    _, cluster = np.unique(prompts, return_inverse=True)
    gaps = np.zeros((cluster.max() + 1, _BINS))
    np.add.at(gaps, (cluster, bin_of), correct - confidence)
    sizes = np.bincount(cluster)

    def error(drawn: Numbers) -> Numbers:
        gap: Numbers = abs(gaps[drawn].sum(axis=0)).sum() / sizes[drawn].sum()
        return gap

    everything = np.arange(len(sizes))
    value = float(error(everything))
    if len(sizes) < 2:
        return Estimate(value, None, None, len(correct))
    drawn = np.random.default_rng(seed)
    found = stats.bootstrap((everything,), error, n_resamples=_RESAMPLES, vectorized=False, method="percentile", rng=drawn)
    return Estimate(value, float(found.confidence_interval.low), float(found.confidence_interval.high), len(correct))


def brier(probability: Numbers) -> float:
    """The mean of (1 - p)², p being the probability of people's choice: 0 at best, 0.25 for always 0.5.

    Brier 1950, equation 2, of one of the two outcomes; summed over both, as there, it is twice this.
    """
    return float(((1 - probability) ** 2).mean())


def log_loss(probability: Numbers) -> float:
    """The mean of -log p in nats, p being the probability of people's choice: 0 at best, 0.693 for always 0.5 (Good 1952)."""
    import numpy as np

    return float(np.log(1 / np.maximum(probability, _LEAST)).mean())

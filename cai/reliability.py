"""Whether a judge is right as often as it is sure: reliability, expected calibration error, Brier score, log loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from cai.intervals import Numbers

_BINS = 10
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


def brier(probability: Numbers) -> float:
    """The mean of (1 - p)², p being the probability of people's choice: 0 at best, 0.25 for always 0.5.

    Brier 1950, equation 2, of one of the two outcomes; summed over both, as there, it is twice this.
    """
    return float(((1 - probability) ** 2).mean())


def log_loss(probability: Numbers) -> float:
    """The mean of -log p in nats, p being the probability of people's choice: 0 at best, 0.693 for always 0.5 (Good 1952)."""
    import numpy as np

    return float(np.log(1 / np.maximum(probability, _LEAST)).mean())

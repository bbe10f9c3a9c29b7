"""What length alone is worth to a reward model, and how reward goes with length."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from cai.rewards.spec import LengthLine

if TYPE_CHECKING:
    from cai.intervals import Numbers

_ALIKE = 1e-9
"""Of the largest reward or length: what differs by less is the same, but for rounding."""


def length_line(reward: Numbers, lengths: Numbers, prompts: Numbers) -> LengthLine:
    """The least-squares line of reward on length within prompts (numbers beside each completion).

    Within them, since a prompt that asks for long completions may be one that gets good ones. It ends where the shortest
    and the longest twentieth of the completions begin.
    """
    within, of = _within(lengths, prompts), _within(reward, prompts)
    slope = float(stats.linregress(within, of).slope) if within.any() else 0.0
    shortest, longest = np.quantile(lengths, (0.05, 0.95))
    return LengthLine(slope=slope, mean=float(lengths.mean()), shortest=float(shortest), longest=float(longest))


def length_correlation(reward: Numbers, lengths: Numbers, prompts: Numbers) -> dict[str, float]:
    """Pearson's correlation of reward with length: `overall`, and `within` prompts; without one that does not exist."""
    pairs = {"overall": (reward, lengths), "within_prompts": (_within(reward, prompts), _within(lengths, prompts))}
    least = [_ALIKE * np.abs(one).max() for one in (reward, lengths)]
    varied = {name: pair for name, pair in pairs.items() if all(map(np.greater, map(np.ptp, pair), least))}
    return {name: float(stats.pearsonr(*pair).statistic) for name, pair in varied.items()}


def _within(values: Numbers, prompts: Numbers) -> Numbers:
    """Each value less the mean over its prompt."""
    _, places, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    less: Numbers = values - (np.bincount(places, weights=values) / counts)[places]
    return less

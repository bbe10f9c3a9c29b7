"""The gold measure: what an honest judge says of answers to held-out prompts, beside what the training's rewards say of them.

Rewards that are trained on rise whether answers get better or not: from some KL on, the truth falls (Gao et al. 2022, arXiv
2210.10760). Lines of run/gold.jsonl:

{"step": 60, "gold": 0.41, "low": 0.33, "high": 0.48, "proxy": 1.9, "proxy_low": 1.7, "proxy_high": 2.1, "kl": 12.3,
 "words": 71.5, "answers": 64, "unscored": 0, "golds": [0.5, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from cai.intervals import difference
from cai.report.written import Line, best_of
from cai.training.online.held_out import Answer
from cai.training.online.monitors import words
from cai.training.online.rollouts import weighted

SHOWN = 8
"""Answers that are written into run/samples.jsonl each time."""
_OUTSIDE = 0.05
"""The chance at which a training may be stopped whose gold is flat."""
_FALLS = 2
"""So many measures in a row have to be below the best."""
_ALIKE = 1e-9
"""Of the mean: changes that differ by less are the same, but for rounding."""


def measured(step: int, answers: Sequence[Answer], weights: Sequence[float], seed: int) -> dict[str, Any]:
    """The line of a measure; a mean is null where no answer has a number, and without a reference there is no `kl`."""
    golds, proxies = [one.gold for one in answers], proxies_of(answers, weights)
    ratios = [one.log_ratio for one in answers if one.log_ratio is not None]
    return {
        "step": step,
        **_mean(("gold", "low", "high"), golds, seed),
        **_mean(("proxy", "proxy_low", "proxy_high"), proxies, seed),
        **({"kl": math.fsum(ratios) / len(ratios)} if ratios else {}),
        "words": math.fsum(len(words(one.text)) for one in answers) / len(answers),
        "answers": len(answers),
        "unscored": golds.count(None),
        "golds": golds,
    }


def proxies_of(answers: Sequence[Answer], weights: Sequence[float]) -> list[float | None]:
    """The weighted sum of the training's rewards, of each answer."""
    return weighted(list(zip(*(one.rewards for one in answers), strict=True)), weights)  # type: ignore[arg-type]


def _mean(names: tuple[str, str, str], values: Sequence[float | None], seed: int) -> dict[str, float | None]:
    """A mean and the ends of its interval, under these names."""
    known = np.array([one for one in values if one is not None], dtype=float)
    if not len(known):
        return {names[0]: None}
    found = difference(known, np.arange(len(known)), seed)
    return dict(zip(names, (found.value, found.low, found.high), strict=True))


def over_optimised(lines: Sequence[Line]) -> str:
    """Why to stop, or an empty text: the last two measures are below the best, together with significance, and the proxy is
    above what it was there.

    A one-sided paired t-test, prompt by prompt, of the mean of both against the best, at the level 0.05 / n² after n measures:
    a training is tested at each of them, and the highest of n numbers is high by chance too. Of flat gold with independent
    noise (64 prompts, simulated), 2 % of trainings with 11 measures are stopped, 4 % with 21, and 6 % with 51; a fall by half a
    standard deviation of the answers stops 85 % or more within three measures.
    """
    best, last = best_of(lines), lines[-1]
    if best is None or last["proxy"] is None or best["proxy"] is None or last["proxy"] <= best["proxy"]:
        return ""
    two = lines[-_FALLS:]
    if best in two or any(one["gold"] is None for one in two):
        return ""
    fallen, chance = fall(best, two)
    if chance >= _OUTSIDE / len(lines) ** 2:
        return ""
    return (
        f"gold has changed by {fallen:+.3g} since its best, {best['gold']:.3g} at step {best['step']}, in {_FALLS} measures in "
        f"a row (p {chance:.1g}), while the reward has risen from {best['proxy']:.3g} to {last['proxy']:.3g}"
    )


def fall(best: Line, later: Sequence[Line]) -> tuple[float, float]:
    """How much higher gold is later, as a mean over the prompts that all measures have, and how probable a fall as large is
    where there is none: 1 where that cannot be told. Where all prompts fall alike a sign test says it."""
    known = zip(best["golds"], *(one["golds"] for one in later), strict=True)
    rows = np.array([row for row in known if None not in row], dtype=float)
    if len(rows) < 2:
        return 0.0, 1.0
    changes = rows[:, 1:].mean(axis=1) - rows[:, 0]
    mean = float(changes.mean())
    if np.ptp(changes) <= _ALIKE * abs(mean):
        return mean, 0.5 ** len(rows) if mean < 0 else 1.0
    return mean, float(stats.ttest_1samp(changes, 0.0, alternative="less").pvalue)

"""The gold measure: what an honest judge says of answers to held-out prompts, beside what the training's rewards say of them.

Rewards that are trained on rise whether answers get better or not: from some KL on, the truth falls (Gao et al. 2022, arXiv
2210.10760). Lines of run/gold.jsonl:

{"step": 60, "gold": 0.41, "low": 0.33, "high": 0.48, "proxy": 1.9, "proxy_low": 1.7, "proxy_high": 2.1, "kl": 12.3,
 "words": 71.5, "answers": 64, "unscored": 0, "golds": [0.5, ...], "proxies": [1.2, ...],
 "functions": {"gold": "honest@5e1f...", "reward": [null]}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from cai.intervals import difference
from cai.report.written import Line, best_of
from cai.training.online.monitors import words
from cai.training.online.rollouts import weighted

if TYPE_CHECKING:
    from cai.intervals import Numbers
    from cai.training.online.held_out import Answer

_OUTSIDE, _LEAST = 0.05, 2e-5
"""The chance at which a training may be stopped whose gold is flat; and the least chance that is told by permutations, since
smaller ones take longer and longer."""
_FALLS = 2
"""So many measures in a row have to be below the best."""
FEW = 16
"""Held-out prompts from which on a fall of gold by a deviation or so, or a rise of the reward, is told from chance; by fewer
nothing is stopped."""
_OF_PROXY = ("proxy_low", "proxy_high", "proxies")
_FIRST, _FAR, _RESAMPLES = 999, 0.02, 4
"""So many permutations first; if by them the chance is not far above any level, so many times one over the level."""
_NUMBERS_AT_ONCE = 1_000_000
"""Permuted in one batch, which bounds the memory."""


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
        "proxies": proxies,
    }


def comparable(lines: Sequence[dict[str, Any]], functions: dict[str, Any]) -> list[dict[str, Any]]:
    """The measures that later ones can be compared with, where `functions` (NAME@VERSION, None for what is no function) measure
    gold and reward from now on: those of the same gold, and without the proxy if that was of other rewards."""
    kept = []
    for line in lines:
        if line["functions"]["gold"] == functions["gold"]:
            is_same = line["functions"] == functions
            rest = {name: one for name, one in line.items() if name not in _OF_PROXY}
            kept.append(line if is_same else {**rest, "proxy": None, "functions": functions})
    return kept


def gaps(lines: Sequence[Line], stops: bool) -> dict[str, str]:
    """What the last measure lacks, in words by kinds: any number; and where gold is to stop the training, a proxy, or enough
    prompts to tell a fall by of as many as there are."""
    best, last = best_of(lines), lines[-1]
    of, step = last["answers"], last["step"]
    known = of - last["unscored"]
    if best is None or last["gold"] is None:
        return {"gold": f"gold had no number for any answer at step {step}: nothing is measured"}
    if not stops or of < FEW:
        return {}
    found = {}
    if last["proxy"] is None:
        found["proxy"] = f"no reward had a number for any held-out answer at step {step}: by this measure gold stops nothing"
    elif (rewarded := len(_changes(_first_rewarded(lines, best), last))) < FEW:
        found["proxy"] = (
            f"rewards had a number for {rewarded} of {of} held-out answers at the best gold and at step {step}: too few to "
            "stop the training by"
        )
    two = lines[-_FALLS:]
    is_followed = best not in two and all(one["gold"] is not None for one in two)
    if known < FEW:
        found["few"] = f"gold had a number for {known} of {of} answers at step {step}: too few to stop the training by"
    elif is_followed and (common := len(_rows(best, *two))) < FEW:
        found["few"] = (
            f"gold had a number for {common} of {of} prompts in its best measure and in both of the last ones, at step {step}: "
            "too few to stop the training by"
        )
    return found


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
    above what it was there (or, where it had no number there, at the first measure since that has one), by an interval.

    The level is 0.05 / n² after n measures: a training is tested at each of them, and the highest of n numbers is high by
    chance too. Of trainings with flat gold and independent noise (simulated: normal, or 0 and 1; 16 to 128 prompts) at most 5 %
    are stopped by 11 or 21 measures, and 7 % by 400; a fall by half a standard deviation of the answers of 64 prompts stops
    nine in ten of those with 11 within three measures.
    """
    best, last = best_of(lines), lines[-1]
    if best is None or last["proxy"] is None:
        return ""
    since = _first_rewarded(lines, best)
    two, level = lines[-_FALLS:], _OUTSIDE / len(lines) ** 2
    if best in two or any(one["gold"] is None for one in two):
        return ""
    fallen, chance = fall(best, two, level)
    if chance >= level or not has_risen(since, last):
        return ""
    return (
        f"gold has changed by {fallen:+.3g} since its best, {best['gold']:.3g} at step {best['step']}, in {_FALLS} measures in "
        f"a row (p {chance:.1g}), while the reward has risen from {since['proxy']:.3g} to {last['proxy']:.3g}"
    )


def has_risen(before: Line, later: Line) -> bool:
    """Whether the proxy has, over the prompts that both measures have a number for: the interval of the change is above 0. Of
    fewer prompts than `FEW` that is not said."""
    changes = _changes(before, later)
    if len(changes) < FEW:
        return False
    change = difference(changes, np.arange(len(changes)), 0)
    return (change.value if change.low is None else change.low) > 0  # None where all have changed alike


def _first_rewarded(lines: Sequence[Line], best: Line) -> Line:
    """The best measure, or the first one since whose proxy is known; the last one's is."""
    return next(one for one in lines if one["step"] >= best["step"] and one["proxy"] is not None)


def _changes(before: Line, later: Line) -> Numbers:
    """Of the proxy, for each prompt that it has a number for in both measures."""
    both = zip(before["proxies"], later["proxies"], strict=True)
    return np.array([new - old for old, new in both if old is not None and new is not None])


def fall(best: Line, later: Sequence[Line], level: float) -> tuple[float, float]:
    """How much higher gold is later, as a mean over the prompts that all measures have a number for, and how probable a fall
    as large is where there is none: 1 where those are fewer than `FEW`.

    By permutations of each prompt's numbers (`scipy.stats.permutation_test`), so many that `level` can be told: they hold for
    numbers between 0 and 1 too, of which the highest mean comes with a small spread. A chance below 2e-5 is that of a normal
    distribution with the variance of all permutations.
    """
    rows = _rows(best, *later)
    if len(rows) < FEW:
        return 0.0, 1.0
    change, chance = _permuted(rows, _FIRST)
    if chance < _FAR:
        change, chance = _permuted(rows, math.ceil(_RESAMPLES / max(level, _LEAST)))
    return change, _tail(rows, change) if chance < _LEAST else chance


def _rows(*measures: Line) -> Numbers:
    """Prompts x measures: the golds of the prompts that all have a number for."""
    known = zip(*(one["golds"] for one in measures), strict=True)
    return np.array([row for row in known if None not in row], dtype=float)


def _permuted(rows: Numbers, resamples: int) -> tuple[float, float]:
    """The mean change from the first column to the mean of the others, and the chance of one as low."""
    found = stats.permutation_test(
        tuple(rows.T),
        _change,
        permutation_type="samples",
        alternative="less",
        n_resamples=resamples,
        batch=max(1, _NUMBERS_AT_ONCE // rows.size),
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.statistic), float(found.pvalue)


def _tail(rows: Numbers, change: float) -> float:
    """The chance of a mean change as low where each prompt's numbers come in any order, by the central limit."""
    columns = rows.shape[1]
    spread = columns / (columns - 1) * math.sqrt(rows.var(axis=1).sum()) / len(rows)
    return float(stats.norm.cdf(change / spread))


def _change(before: Numbers, *later: Numbers, axis: int) -> Numbers:
    change: Numbers = np.mean(np.mean(later, axis=0) - before, axis=axis)
    return change

"""The gold measure: what an honest judge says of answers to held-out prompts, beside what the training's rewards say of them.

Rewards that are trained on rise whether answers get better or not: from some KL on, the truth falls (Gao et al. 2022, arXiv
2210.10760). Lines of run/gold.jsonl:

{"step": 60, "gold": 0.41, "low": 0.33, "high": 0.48, "proxy": 1.9, "proxy_low": 1.7, "proxy_high": 2.1, "kl": 12.3,
 "words": 71.5, "answers": 64, "golds": [0.5, ...]}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cai.intervals import Estimate, difference
from cai.report.written import Line, best_of
from cai.training.online.held_out import Answer
from cai.training.online.monitors import words
from cai.training.online.rollouts import weighted

SHOWN = 8
"""Answers that are written into run/samples.jsonl each time."""


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


def change(before: Line, after: Line, seed: int) -> Estimate | None:
    """How much higher gold is `after` than `before`, prompt by prompt; None where no prompt has both."""
    pairs = zip(before["golds"], after["golds"], strict=True)
    known = np.array([new - old for old, new in pairs if old is not None and new is not None], dtype=float)
    return difference(known, np.arange(len(known)), seed) if len(known) else None


def over_optimised(lines: Sequence[Line], seed: int) -> str:
    """Why to stop, or an empty text: the last gold is below the best with significance (the 95 % interval of the difference,
    prompt by prompt, is below 0), and the proxy is above what it was there."""
    best, last = best_of(lines), lines[-1]
    if best is None or last["gold"] is None or last["proxy"] is None or best["proxy"] is None or last["proxy"] <= best["proxy"]:
        return ""
    fallen = change(best, last, seed)
    if fallen is None or not _is_below_zero(fallen):
        return ""
    ends = f" ({fallen.low:+.3g} to {fallen.high:+.3g})" if fallen.low is not None else ""
    return (
        f"gold has changed by {fallen.value:+.3g}{ends} since its best, {best['gold']:.3g} at step {best['step']}, while the "
        f"reward has risen from {best['proxy']:.3g} to {last['proxy']:.3g}"
    )


def _is_below_zero(fallen: Estimate) -> bool:
    """Where all prompts fall alike there is no interval; from 6 of them on a sign test says it (2 to the power of -5)."""
    if fallen.high is None:
        return fallen.value < 0 and fallen.pairs >= 6
    return fallen.high < 0

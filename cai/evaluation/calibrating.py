"""Fits a judge's calibration on pairs that people judged, and says what it is worth on pairs that it has not seen.

A record is one such pair: `candidates[0]` is the completion that people chose, `candidates[1]` the one they rejected, and its
first verdict compares the two in this order. Two kinds of calibration (what they do is told in `judging.calibration`) are
fitted by logistic regression, which scikit-learn regularises (Platt 1999, "Probabilistic outputs for support vector
machines"; Guo et al. 2017, arXiv 1706.04599, for a single temperature):

- `scale`: one coefficient of the evidence averaged over the principles by the constitution's weights. It may turn out
  negative: the RLAIF judge of RLCD (Yang et al. 2023, arXiv 2307.12950) agreed with people in 0.44 of the pairs.
- `weights`: the same coefficient and, for each principle, a deviation from it that is penalised 100 times more. So few
  pairs leave the constitution's weights as they are.

A regression sees each pair both ways round and has no intercept, and its columns are divided by their root mean square, so
that a pair and the same pair turned round have opposite logits. Folds are of whole prompts, and the strength of the penalty
is chosen within the training folds alone. The kind with the lower cross-validated log loss is fitted again on all pairs; the
better of two is a little lucky, so its measures are a little too good.

The prior for an order needs no labels (Zheng et al. 2024, arXiv 2309.03882): it is the mean of (d_0 - d_1) / 2.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from cai.errors import ConfigError, VerdictError
from cai.intervals import Estimate, difference, share
from cai.judging.calibration import (
    Calibration,
    CrossValidated,
    JudgeIdentity,
    PrincipleCalibration,
    Quality,
    Range,
    evidence,
    order_prior,
)
from cai.prompts import Row
from cai.reliability import calibration_error
from cai.types import Record, Verdict

if TYPE_CHECKING:
    from cai.intervals import Numbers

Kind = Literal["scale", "weights"]
_PAIRS = 20
_FOLDS = 5
_STRENGTHS = [10.0**power for power in range(-4, 2)]
"""Of C, the inverse of the penalty."""
_COMMON = 10.0
"""How much longer the common column is made: its coefficient is penalised by the square of this less."""
_LEAST = 2.0**-40
"""The step of probabilities; the log loss takes 0 for this."""
_COLDEST = 1e-6
"""The least sum of absolute weights whose inverse is taken for a temperature."""


class Measures(NamedTuple):
    """How well some probabilities agree with people; each a mean with its 95 % interval, clustered by prompt."""

    accuracy: Range
    log_loss: Range
    calibration_error: Range
    """Expected calibration error over ten bins of max(p, 1 - p). It is biased upwards, and resamples more so."""

    @property
    def quality(self) -> Quality:
        """What a calibration's file says of it."""
        return Quality(accuracy=self.accuracy, log_loss=self.log_loss)


class Fit(NamedTuple):
    """A calibration and what was found on the way; `scale` and `weights` are cross-validated."""

    calibration: Calibration
    uncalibrated: Measures
    scale: Measures
    weights: Measures
    anticorrelated: bool
    """Whether the interval of the coefficient of `scale` lies below 0, or that of the uncalibrated accuracy below 0.5."""
    finding: str
    """One sentence to print."""


class _Pairs(NamedTuple):
    """Labelled pairs as numbers: n pairs, K principles."""

    ids: list[str]
    priors: list[float]
    probability: Numbers
    """n: the judge's own."""
    evidence: Numbers
    """n x K: of each principle, times K / the pair's principles; 0 where it is absent."""
    common: Numbers
    """K: the constitution's weights, of mean 1 / K; evidence @ common is the weighted mean of a pair's evidence."""
    prompts: Numbers
    """n: numbers of the prompts."""


def check_enough(rows: Iterable[Row]) -> None:
    """Raises `ConfigError` where a source has too few pairs or prompts; reads no more of it than that takes."""
    pairs: set[str] = set()
    prompts: set[object] = set()
    for row in rows:
        if row.prompt:
            pairs.add(row.prompt.id)
            prompts.add(row.prompt.messages)
        if len(pairs) >= _PAIRS and len(prompts) >= _FOLDS:
            return
    _need(len(pairs), len(prompts))


def _need(pairs: int, prompts: int) -> None:
    if pairs < _PAIRS or prompts < _FOLDS:
        found = f"found {pairs} of {prompts}"
        raise ConfigError(f"a calibration needs at least {_PAIRS} labelled pairs of at least {_FOLDS} prompts, {found}")


def fit(records: Iterable[Record], judge: JudgeIdentity, seed: int = 0) -> Fit:
    """Fit a calibration of the judge whose verdicts these are.

    `seed` is for the folds and the intervals. Raises `ConfigError` for too few pairs or prompts, for a record that is no
    such pair or whose evidence is too large, and where scikit-learn is missing.
    """
    _need_libraries()
    seed %= 2**32  # all that scikit-learn takes
    pairs = _read(list(records))
    measured = {kind: _measure(_out_of_fold(pairs, kind, seed), pairs, seed) for kind in ("scale", "weights")}
    raw = _measure(pairs.probability, pairs, seed)
    kind: Kind = "weights" if measured["weights"].log_loss[0] < measured["scale"].log_loss[0] else "scale"
    weights = _fit(pairs.evidence, pairs.common, pairs.prompts, kind, seed)
    total, reach = float(weights.sum()), max(float(abs(weights).sum()), _COLDEST)
    calibration = Calibration(
        **judge._asdict(),
        pairs=len(pairs.prompts),
        kind=kind,
        temperature=1 / reach,
        sign=1 if total >= 0 else -1,
        principles={
            name: PrincipleCalibration(prior=prior, weight=weight)
            for name, prior, weight in zip(pairs.ids, pairs.priors, weights.tolist(), strict=True)
        },
        cross_validated=CrossValidated(before=raw.quality, after=measured[kind].quality),
    )
    anticorrelated = raw.accuracy[2] < 0.5 or _points_away(pairs, seed)
    finding = _finding(anticorrelated, kind, raw, measured[kind])
    return Fit(calibration, raw, measured["scale"], measured["weights"], anticorrelated, finding)


def _need_libraries() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as exc:
        raise ConfigError("calibrating a judge needs scikit-learn: pip install 'cai-toolkit[judge]'") from exc


def _read(records: list[Record]) -> _Pairs:
    import numpy as np

    verdicts = [_verdict(record) for record in records]
    prompts: dict[object, int] = {}
    numbers = [prompts.setdefault(record.prompt.messages, len(prompts)) for record in records]
    _need(len(records), len(prompts))
    weights = _constitution_weights(verdicts)
    ids = sorted(weights)
    rows = np.zeros((len(records), len(ids)))
    for row, record, verdict in zip(rows, records, verdicts, strict=True):
        for name, value in _evidence(record, verdict).items():
            row[ids.index(name)] = value * len(ids) / len(verdict.principles)
    own = np.array([weights[name] for name in ids])
    probability = np.array([verdict.probability for verdict in verdicts])
    return _Pairs(ids, _priors(verdicts, ids), probability, rows, own / own.sum(), np.array(numbers))


def _verdict(record: Record) -> Verdict:
    names = ("candidate-0", "candidate-1")
    if not record.verdicts or (record.verdicts[0].first, record.verdicts[0].second) != names:
        raise ConfigError(f"prompt '{record.prompt.id}': expected a first verdict of {names[0]} against {names[1]}")
    return record.verdicts[0]


def _evidence(record: Record, verdict: Verdict) -> dict[str, float]:
    try:
        return evidence(verdict)
    except VerdictError as exc:
        raise ConfigError(f"prompt '{record.prompt.id}': {exc}; leave this pair out, or use another judge") from exc


def _constitution_weights(verdicts: list[Verdict]) -> dict[str, float]:
    """The constitution's weights of all principles."""
    weights: dict[str, float] = {}
    for one in (one for verdict in verdicts for one in verdict.principles):
        if weights.setdefault(one.principle_id, one.weight) != one.weight:
            found = f"{weights[one.principle_id]} and {one.weight}"
            raise ConfigError(f"principle '{one.principle_id}' has the weights {found}: expected verdicts of one constitution")
    return weights


def _priors(verdicts: list[Verdict], ids: list[str]) -> list[float]:
    """The mean over pairs of each principle's bias for what is shown first; 0 where it never had two orders."""
    found: dict[str, list[float]] = {name: [] for name in ids}
    for one in (one for verdict in verdicts for one in verdict.principles):
        prior = order_prior(one)
        found[one.principle_id] += [] if prior is None else [prior]
    return [sum(found[name]) / max(len(found[name]), 1) for name in ids]


def _out_of_fold(pairs: _Pairs, kind: Kind, seed: int) -> Numbers:
    """Each pair's probability by a calibration that was fitted on other prompts."""
    import numpy as np
    from scipy import special
    from sklearn.model_selection import GroupKFold

    logits = np.empty(len(pairs.prompts))
    folds = GroupKFold(_FOLDS, shuffle=True, random_state=seed)
    for train, test in folds.split(pairs.evidence, groups=pairs.prompts):
        weights = _fit(pairs.evidence[train], pairs.common, pairs.prompts[train], kind, seed)
        logits[test] = pairs.evidence[test] @ weights
    probabilities: Numbers = special.expit(logits)
    return probabilities


def _fit(rows: Numbers, common: Numbers, prompts: Numbers, kind: Kind, seed: int) -> Numbers:
    """The principles' weights (K) by rows of evidence (n x K); the penalty is the one that predicts other prompts best."""
    import numpy as np
    from sklearn.model_selection import GroupKFold

    losses = np.zeros(len(_STRENGTHS))
    for train, test in GroupKFold(_FOLDS - 1, shuffle=True, random_state=seed).split(rows, groups=prompts):
        for number, strength in enumerate(_STRENGTHS):
            logits = rows[test] @ _regress(rows[train], common, kind, strength)
            losses[number] += np.logaddexp(0, -logits).sum()
    return _regress(rows, common, kind, _STRENGTHS[losses.argmin()])


def _regress(rows: Numbers, common: Numbers, kind: Kind, strength: float) -> Numbers:
    """The principles' weights (K) at one strength: a common direction and, for `weights`, one of each principle."""
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    directions = np.column_stack([common, np.eye(len(common))] if kind == "weights" else [common])
    columns = rows @ directions
    size = np.sqrt((columns**2).mean(axis=0))
    scale = 1 / np.where(size > 0, size, 1)
    scale[0] *= _COMMON
    both_ways = np.concatenate([columns, -columns]) * scale
    regression = LogisticRegression(C=strength, fit_intercept=False, solver="newton-cholesky")
    with warnings.catch_warnings():  # where it begins at its optimum, it asks another solver, which ends there
        warnings.filterwarnings("ignore", "Line search of Newton solver", ConvergenceWarning)
        regression.fit(both_ways, np.repeat([1, 0], len(rows)))
    weights: Numbers = directions @ (regression.coef_[0] * scale)
    return weights


def _measure(probability: Numbers, pairs: _Pairs, seed: int) -> Measures:
    """`probability` is that of what people chose."""
    import numpy as np

    right = (np.sign(probability - 0.5) + 1) / 2
    loss = -np.log(np.maximum(probability, _LEAST))
    return Measures(
        _range(share(right, pairs.prompts, seed)),
        _range(difference(loss, pairs.prompts, seed)),
        _range(calibration_error(abs(probability - 0.5) + 0.5, right, pairs.prompts, seed)),
    )


def _range(estimate: Estimate) -> Range:
    """Without an interval (all prompts have the same mean), the mean stands for its ends."""
    mean, low, high = estimate.value, estimate.low, estimate.high
    return mean, mean if low is None else low, mean if high is None else high


def _points_away(pairs: _Pairs, seed: int) -> bool:
    """Whether the interval of the coefficient of `scale` lies below 0, by a bootstrap over prompts.

    The loss is convex and its slope at 0 is minus half the sum of the evidence. So in each resample the coefficient, with
    or without a penalty, has the sign of the mean evidence, and this can be resampled without fitting.
    """
    return _range(difference(pairs.evidence @ pairs.common, pairs.prompts, seed))[2] < 0


def _finding(anticorrelated: bool, kind: Kind, raw: Measures, calibrated: Measures) -> str:
    before, after = _shown(raw.accuracy), _shown(calibrated.accuracy)
    if anticorrelated:
        return (
            f"The judge is anti-correlated with people: its accuracy is {before}, cross-validated {after} where "
            "the calibration turns it round."
        )
    if raw.accuracy[1] <= 0.5 and calibrated.accuracy[1] <= 0.5:
        return (
            f"There is no evidence that the judge knows what people prefer: its accuracy is {before}, cross-validated "
            f"{after} when calibrated; use more pairs or another judge."
        )
    return (
        f"The judge sees what people prefer: its accuracy is {before}, cross-validated {after} when calibrated by {kind}, "
        f"and its log loss goes from {raw.log_loss[0]:.3f} to {calibrated.log_loss[0]:.3f}."
    )


def _shown(estimate: Range) -> str:
    mean, low, high = estimate
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"

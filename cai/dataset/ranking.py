"""A ranking of candidates from all their comparisons (Bradley and Terry 1952)."""

from __future__ import annotations

from collections.abc import Sequence

from cai.errors import ConfigError
from cai.types import Verdict

_PRIOR = 0.01
"""Regularisation: comparisons that every candidate is taken to have won and lost besides; keeps strengths finite."""


def strengths(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The log-strength of each completion, fitted to the verdicts' probabilities; their mean is 0.

    Raises `ConfigError` where the extra `judge` is not installed.
    """
    try:
        import choix
        import numpy
    except ImportError as exc:
        raise ConfigError("dataset.ranking: bradley-terry needs choix: pip install 'cai-toolkit[judge]'") from exc
    names = sorted({name for verdict in verdicts for name in (verdict.first, verdict.second)})
    wins = numpy.zeros((len(names), len(names)))
    for verdict in verdicts:
        first, second = names.index(verdict.first), names.index(verdict.second)
        wins[first, second] += verdict.probability
        wins[second, first] += 1 - verdict.probability
    fitted = choix.ilsr_pairwise_dense(wins, alpha=_PRIOR)
    return dict(zip(names, map(float, fitted), strict=True))

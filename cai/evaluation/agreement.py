"""How far a judge agrees with people, on pairs that people have judged.

What `Agreement.to_json` gives, abridged. Every estimate is a `value` with the `low` and `high` end of its 95 % interval (null
where the pairs cannot tell) over so many `pairs`; rates and accuracies are shares in [0, 1], and a tie is half right.

    {"pairs": 500, "prompts": 480, "ties": 2, "failures": {"no verdict": 3}, "sureness": 0.74,
     "accuracy": {"value": 0.712, "low": 0.672, "high": 0.751, "pairs": 500},
     "usual": {"value": 0.654, ...}, "gain": {"value": 0.058, "low": 0.021, "high": 0.094, "pairs": 500},
     "order_flip_rate": 0.21, "verdict_flip_rate": 0.12, "first_position_rate": 0.57,
     "expected_calibration_error": 0.043, "brier": 0.19, "log_loss": 0.57,
     "reliability": [{"low": 0.5, "high": 0.55, "pairs": 61, "confidence": 0.52, "accuracy": 0.54}, ...],
     "length": {"always_longer": {"value": 0.56, ...}, "always_shorter": {"value": 0.44, ...},
                "by_difference": [{"shortest": 0, "longest": 80, "accuracy": {"value": 0.66, ...}}, ...],
                "by_chosen": {"longer": {"value": 0.75, ...}, "shorter": {...}, "equal": {...}}},
     "principles": [{"id": "no-harassment", "accuracy": {"value": 0.69, ...}, "leaning": 0.17, "flip_rate": 0.25,
                     "opposed": 0.14}, ...],
     "panel": {"judges": ["small", "large"], "alpha": 0.48}}

- `usual` is the same model asked the usual way: one principle, one order, the likelier answer; `gain` is what `accuracy` adds.
- `sureness` is the mean of max(p, 1 - p); above the accuracy, the judge is too sure.
- `order_flip_rate` is of principles' verdicts, `verdict_flip_rate` of whole ones, each order averaged over the principles by
  weight; `first_position_rate` is of readings that prefer what was shown first. Null where a method has no order.
- `length` is in characters: thirds by how far the two differ, and by what people's choice is beside the other.
- of a principle, `leaning` is the mean of |p - 0.5|, `opposed` the share of its pairs where it contradicts the verdict.
- `panel` is null where there is one judge; `alpha` is null where no pair has two that prefer something.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from cai import reliability
from cai.errors import VerdictError
from cai.evaluation.readings import Readings
from cai.intervals import Estimate, difference, share
from cai.reliability import ReliabilityBin
from cai.types import Record

if TYPE_CHECKING:
    from cai.intervals import Numbers


class LengthGroup(Struct, frozen=True):
    """The pairs whose lengths differ by `shortest` to `longest` characters."""

    shortest: int
    longest: int
    accuracy: Estimate


class Length(Struct, frozen=True):
    """What length alone explains; a group without pairs is left out."""

    always_longer: Estimate
    always_shorter: Estimate
    by_difference: tuple[LengthGroup, ...]
    by_chosen: dict[str, Estimate]


class PrincipleAgreement(Struct, frozen=True):
    """What one principle says alone; of a panel, its members' probabilities averaged by weight."""

    id: str
    accuracy: Estimate
    leaning: float
    flip_rate: float | None
    opposed: float


class Panel(Struct, frozen=True):
    """How far the judges agree with one another; 1 is always, 0 no more than by chance."""

    judges: tuple[str, ...]
    alpha: float | None


class Agreement(Struct, frozen=True, kw_only=True):
    """All that is measured; the module's docstring explains each."""

    pairs: int
    prompts: int
    ties: int
    failures: dict[str, int]
    accuracy: Estimate
    usual: Estimate
    gain: Estimate
    sureness: float
    order_flip_rate: float | None
    verdict_flip_rate: float | None
    first_position_rate: float | None
    expected_calibration_error: float
    brier: float
    log_loss: float
    reliability: tuple[ReliabilityBin, ...]
    length: Length
    principles: tuple[PrincipleAgreement, ...]
    panel: Panel | None

    def to_json(self) -> dict[str, Any]:
        """As a report holds it, numbers to six places."""
        plain: dict[str, Any] = _rounded(msgspec.to_builtins(self))
        return plain


def measure(records: Iterable[Record], failures: Mapping[str, int], seed: int = 0) -> Agreement:
    """Measure a judge on pairs whose first completion people chose and whose second they rejected.

    `failures` are the pairs that have no verdict, by reason; `seed` is for the intervals. Of each record only a few numbers
    are kept. Raises `VerdictError` where there is none.
    """
    readings = Readings()
    for record in records:
        readings.add(record)
    if not readings.count:
        raise VerdictError(f"no pair has a verdict, so there is no agreement to measure; failed: {dict(failures) or 'none'}")
    pairs, votes = readings.pairs, readings.votes
    probability, prompts, flipped = pairs["probability"], pairs["prompt"], pairs["flipped"]
    correct, confidence = _right(probability - 0.5), abs(probability - 0.5) + 0.5
    bins = reliability.bins(confidence, correct)
    return Agreement(
        pairs=readings.count,
        prompts=len(readings.prompts),
        ties=int((probability == 0.5).sum()),
        failures={reason: count for reason, count in sorted(failures.items()) if count},
        accuracy=share(correct, prompts, seed),
        usual=share(pairs["usual"], prompts, seed),
        gain=difference(correct - pairs["usual"], prompts, seed),
        sureness=float(confidence.mean()),
        order_flip_rate=_quotient(votes["flips"].sum(), votes["ordered"].sum()),
        verdict_flip_rate=_quotient((flipped == 1).sum(), (flipped >= 0).sum()),
        first_position_rate=_quotient(votes["first_shown"].sum(), 2 * votes["ordered"].sum()),
        expected_calibration_error=reliability.expected_error(bins),
        brier=reliability.brier(probability),
        log_loss=reliability.log_loss(probability),
        reliability=bins,
        length=_length(pairs["longer"], correct, prompts, seed),
        principles=tuple(_principles(readings, seed)),
        panel=_panel(readings),
    )


def _length(longer: Numbers, correct: Numbers, prompts: Numbers, seed: int) -> Length:
    """By thirds of the difference (equal differences stay together), and by whether people's choice is the longer."""
    import numpy as np

    distance = abs(longer)
    third = np.digitize(distance, np.quantile(distance, (1 / 3, 2 / 3)), right=True)
    groups = []
    for index in np.unique(third):
        inside = third == index
        ends = int(distance[inside].min()), int(distance[inside].max())
        groups.append(LengthGroup(*ends, share(correct[inside], prompts[inside], seed)))
    sides = {"longer": longer > 0, "shorter": longer < 0, "equal": longer == 0}
    return Length(
        share(_right(longer), prompts, seed),
        share(_right(-longer), prompts, seed),
        tuple(groups),
        {name: share(correct[side], prompts[side], seed) for name, side in sides.items() if side.any()},
    )


def _principles(readings: Readings, seed: int) -> Iterator[PrincipleAgreement]:
    votes = readings.votes
    lean, prompts, flips, ordered = votes["probability"] - 0.5, votes["prompt"], votes["flips"], votes["ordered"]
    opposed = lean * (votes["verdict"] - 0.5) < 0
    for name, number in readings.principles.items():
        own = votes["principle"] == number
        yield PrincipleAgreement(
            id=name,
            accuracy=share(_right(lean[own]), prompts[own], seed),
            leaning=float(abs(lean[own]).mean()),
            flip_rate=_quotient(flips[own].sum(), ordered[own].sum()),
            opposed=float(opposed[own].mean()),
        )


def _panel(readings: Readings) -> Panel | None:
    """Krippendorff's alpha for nominal data (Krippendorff 2004, chapter 11) over what each judge prefers: one, other or tie.

    Which completion is called the first is arbitrary in a comparison, but here it is always people's choice, and judges who
    are often right would seem to agree by chance. So each pair is counted under both namings: chance is then one half.
    """
    if len(readings.judges) < 2:
        return None
    import krippendorff
    import numpy as np

    opinions, judges = readings.opinions, tuple(readings.judges)
    preferred = np.full((len(judges), readings.count), np.nan)
    preferred[opinions["judge"].astype(int), opinions["pair"].astype(int)] = _right(opinions["probability"] - 0.5)
    preferred = preferred[:, (~np.isnan(preferred)).sum(axis=0) > 1]
    if not ((preferred == 0) | (preferred == 1)).any():
        return Panel(judges, None)
    both = np.concatenate([preferred, 1 - preferred], axis=1)
    return Panel(judges, float(krippendorff.alpha(both, level_of_measurement="nominal")))


def _right(lean: Numbers) -> Numbers:
    """1 where it leans towards people's choice, 0 where away, 0.5 at a tie."""
    import numpy as np

    return (np.sign(lean) + 1) / 2


def _quotient(part: float, whole: float) -> float | None:
    return float(part / whole) if whole else None


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 6) if isinstance(value, float) else value

"""What is in a dataset, counted record by record in flat memory, for the manifest, the card and the summary."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from cai.config import DatasetConfig
from cai.dataset import views
from cai.types import Record


@dataclass
class Mean:
    """A running mean."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one value in."""
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        """The mean, or None of nothing."""
        return self.total / self.count if self.count else None


@dataclass
class Statistics:
    """Counts and means over the records of a dataset; lengths are in characters, a tie is half of a preference.

    `paired` are the records with a pair that is kept.
    """

    records: int = 0
    paired: int = 0
    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    cleaned: Counter[str] = field(default_factory=Counter)
    revisions: int = 0
    candidates_truncated: Mean = field(default_factory=Mean)
    candidate_length: Mean = field(default_factory=Mean)
    order_flips: Mean = field(default_factory=Mean)
    first_shown: Mean = field(default_factory=Mean)
    revision_preferred: Mean = field(default_factory=Mean)
    chosen_probability: Mean = field(default_factory=Mean)
    chosen_length: Mean = field(default_factory=Mean)
    rejected_length: Mean = field(default_factory=Mean)

    def add(self, record: Record, config: DatasetConfig) -> None:
        """Count one record."""
        self.records += 1
        for candidate in record.candidates:
            self.candidates_truncated.add(candidate.finish_reason == "length")
            self.candidate_length.add(len(candidate.text))
        texts = [text for candidate in record.candidates if (text := candidate.text.strip())]
        self.dropped["candidates: empty"] += len(record.candidates) - len(texts)
        self.dropped["candidates: the same as an earlier one"] += len(texts) - len(set(texts))
        for revision in record.revisions:
            self.revisions += 1
            self.cleaned.update(revision.cleaned)
            if revision.problem:
                self.dropped[f"revisions: {revision.problem}"] += 1
        self._add_verdicts(record)
        kept = [pair for pair in views.pairs(record, config) if not isinstance(pair, views.Dropped)]
        self.paired += bool(kept)
        for pair in kept:
            self.chosen_probability.add(pair.chosen_probability)
            self.chosen_length.add(len(pair.chosen))
            self.rejected_length.add(len(pair.rejected))

    def _add_verdicts(self, record: Record) -> None:
        for verdict in record.verdicts:
            if verdict.source == "revision":
                self.revision_preferred.add(_above(0.5, verdict.probability))
            for one in verdict.principles:
                if len(one.readings) == 2:
                    (first, second), (turned_first, turned_second) = one.readings
                    self.order_flips.add(one.flipped)
                    self.first_shown.add(_above(first, second))
                    self.first_shown.add(_above(turned_second, turned_first))

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it; zero counts are left out."""
        return {
            "records": self.records,
            "paired": self.paired,
            "rows": self.rows,
            "revisions": self.revisions,
            "dropped": {reason: count for reason, count in sorted(self.dropped.items()) if count},
            "cleaned": dict(sorted(self.cleaned.items())),
            "means": {
                name: _rounded(getattr(self, name).value)
                for name in (
                    "candidates_truncated",
                    "candidate_length",
                    "order_flips",
                    "first_shown",
                    "revision_preferred",
                    "chosen_probability",
                    "chosen_length",
                    "rejected_length",
                )
            },
        }


def _above(one: float, other: float) -> float:
    return 0.5 if one == other else float(one > other)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)

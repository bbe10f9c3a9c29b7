"""What a running pass counts, for the progress display and the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from cai.engines import BatchWork

_GENERATED = 10
"""How many of a judge's calls, which generate nothing, take about as long as one that generates a text."""


@dataclass
class Tally:
    """Counters of one pass over the prompts; plain numbers, changed only on the event loop, but for `stops`."""

    calls_each: int = 1
    """The most calls that one prompt makes; 0 where a program judges."""
    judge_calls_each: int = 0
    """Those of them that only compare; they come last."""
    read: int = 0
    records_made: int = 0
    records_kept: int = 0
    duplicates: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    calls_made: int = 0
    calls_replayed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    stopping: bool = False
    """No call is begun any more; those in flight finish."""
    aborted: bool = False
    """Nor are those in flight waited for."""
    spent: str = ""
    """Why no call is begun any more, where the budget is the reason."""
    batches: BatchWork = field(default_factory=BatchWork)
    """What servers work on in batches."""
    stops: int = 0
    """How often another thread asked to stop; as good as so many signals."""

    @property
    def done(self) -> int:
        """Prompts that are dealt with, whatever came of them."""
        return self.records_made + self.records_kept + self.duplicates + self.quarantined.total()

    def share(self, total: int | None) -> float | None:
        """How much of the work on `total` prompts is done, with that on those in the making; None without a total."""
        if total is None or not total:
            return None
        return min(1.0, (self.done + self._in_the_making()) / total)

    def _in_the_making(self) -> float:
        """Prompts begun and not done, each by the share of its work that its calls make up: roughly, from their mean."""
        begun = self.read - self.done
        if begun <= 0 or not self.calls_each:
            return 0.0
        calls = (self.calls_made + self.calls_replayed - self.records_made * self.calls_each) / begun
        calls = min(max(calls, 0.0), self.calls_each)
        generating = self.calls_each - self.judge_calls_each
        work = min(calls, generating) * _GENERATED + max(0.0, calls - generating)
        return begun * work / (generating * _GENERATED + self.judge_calls_each)

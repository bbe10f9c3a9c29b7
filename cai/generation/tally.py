"""What a running pass counts, for the progress display and the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counters of one pass over the prompts; plain numbers, changed only on the event loop, but for `stops`."""

    calls_each: int = 1
    """The most calls that one prompt makes."""
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
    stops: int = 0
    """How often another thread asked to stop; as good as so many signals."""

    @property
    def done(self) -> int:
        """Prompts that are dealt with, whatever came of them."""
        return self.records_made + self.records_kept + self.duplicates + self.quarantined.total()

    def share(self, total: int | None) -> float | None:
        """How much of `total` prompts is done, counting the calls of those in the making; None where no total is known."""
        if total is None or not total:
            return None
        settled = self.records_kept + self.duplicates + self.quarantined.total()
        by_calls = settled + (self.calls_made + self.calls_replayed) / self.calls_each
        return min(1.0, max(self.done, by_calls) / total)

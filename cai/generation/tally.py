"""What a running pass counts, for the progress display and the manifest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Counters of one pass over the prompts; plain numbers, changed only on the event loop."""

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

    @property
    def done(self) -> int:
        """Prompts that are dealt with, whatever came of them."""
        return self.records_made + self.records_kept + self.duplicates + self.quarantined.total()

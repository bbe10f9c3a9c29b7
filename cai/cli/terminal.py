"""Texts of models and users made safe to show in a terminal, numbers with their words, and where all is shown."""

from __future__ import annotations

import contextlib
import re

from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]")


def printable(text: str) -> str:
    """A text without control characters (ANSI codes among them), which could rewrite what a terminal shows."""
    return _CONTROL.sub("�", text)


def shortened(text: str, characters: int) -> str:
    """A printable text on one line, cut to a number of characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"


def counted(number: int, word: str) -> str:
    """`1 call`, `2,000 calls`."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time as people say it: `under 1 s`, `40 s`, `6 min`, `2 h 5 min`."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def time_left(seconds: float) -> str:
    """`about 6 min left`, `under 1 s left`."""
    return f"{'' if seconds < 1 else 'about '}{duration(seconds)} left"


class _Console(Console):
    """Shows texts as they are: no emoji for `:names:`; and where the reader is gone (`| head`), the run is no failure."""

    def on_broken_pipe(self) -> None:
        """Print no more, but go on."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


console = _Console(highlight=False, emoji=False)
errors = _Console(stderr=True, highlight=False, emoji=False)

"""Texts of models and users made safe to show in a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]|[\ud800-\udfff]")


def printable(text: str) -> str:
    """A text without control characters (ANSI codes among them), which could rewrite what a terminal shows."""
    return _CONTROL.sub("�", text)


def shortened(text: str, characters: int) -> str:
    """A printable text on one line, cut to a number of characters."""
    line = " ".join(printable(text).split())
    return line if len(line) <= characters else line[: characters - 1].rstrip() + "…"

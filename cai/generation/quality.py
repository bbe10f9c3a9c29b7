"""Which revisions are none, and what can be cleaned off those that are.

Cleaned: a preamble ("Sure, here is the revised response:"), a label ("Revision:"), quotation marks around the whole.
Dropped, each with the first reason of this list that holds: `empty`, `truncated` (cut off by the token limit),
`repetition`, `refusal` (of the task, with nothing else said), `parroted critique`, `unchanged`.
"""

from __future__ import annotations

import re
import zlib
from typing import NamedTuple

from rapidfuzz import fuzz

_NOUN = r"(?:completions?|responses?|answers?|revisions?|versions?|rewrites?|texts?|repl(?:y|ies)|messages?|drafts?)"
_WORDS = r"(?:[\w'’-]+[ ,]+){0,8}?"
_PREAMBLE = re.compile(
    rf"\A(?:(?:sure|certainly|of course|okay|ok|absolutely|understood)\b[^\n:]{{0,40}}?[,.!:]?\s*)?"
    rf"(?:here(?:'s|’s| is| are)\s+{_WORDS}(?:{_NOUN}|rewritten|revised)\b[^\n:]{{0,120}}:"
    rf"|(?:the |my |a )?(?:revised|rewritten|new|updated|improved|better)\s+(?:\w+\s+)?{_NOUN}(?:\s+is)?\s*:"
    rf"|revision(?:\s+\d+)?\s*:)\s*",
    re.IGNORECASE,
)
_MARKS = re.compile(r"\A[*_#>\s]+(?=(?:sure|certainly|here|the revised|revised|revision|rewritten)\b)", re.IGNORECASE)
_QUOTES = {'"': '"', "“": "”", "«": "»"}
_REFUSAL = re.compile(
    r"\b(?:i(?:'m|’m| am)?\s+(?:sorry|afraid|unable|not able|not going to)|i (?:can(?:no|')?t|can’t|won(?:'|’)t|will not|"
    r"must decline|cannot)|as an ai)\b",
    re.IGNORECASE,
)
_BARE_WORDS = 25
"""A refusal of no more words than this says nothing but that it refuses."""
_LOOP = re.compile(r"(.{2,200}?)\1{4,}\s*\Z", re.DOTALL)
_PARROT = 85
"""Similarity (of 100) between a revision and its critique from which the one is a copy of the other."""


class Cleaned(NamedTuple):
    """A revision's text, and what was cleaned off it."""

    text: str
    cleaned: tuple[str, ...]


def clean_revision(text: str) -> Cleaned:
    """The text without what is not part of the revised completion."""
    cleaned: list[str] = []
    stripped = _MARKS.sub("", text.strip())
    if match := _PREAMBLE.match(stripped):
        rest = stripped[match.end() :].lstrip("*_ \n")
        if rest:
            text, cleaned = rest, ["preamble"]
    text = text.strip()
    inner = text[1:-1]
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1] and text[0] not in inner and text[-1] not in inner:
        text = inner.strip()
        cleaned.append("quotes")
    return Cleaned(text, tuple(cleaned))


def find_problem(text: str, before: str, critique: str, truncated: bool) -> str | None:
    """Why `text` is no revision of `before`, or None. `critique` is what the revision was to heed."""
    if not text.strip():
        return "empty"
    if truncated:
        return "truncated"
    if loops(text):
        return "repetition"
    if refuses_bare(text):
        return "refusal"
    if _plain(critique) and fuzz.ratio(_plain(text), _plain(critique)) >= _PARROT:
        return "parroted critique"
    return "unchanged" if _plain(text) == _plain(before) else None


def loops(text: str) -> bool:
    """Whether a text repeats itself: it compresses like no prose does, or ends in the same words over and over."""
    raw = text.encode()
    return (len(raw) >= 300 and len(zlib.compress(raw)) < 0.2 * len(raw)) or bool(_LOOP.search(text[-1200:]))


def refuses_bare(text: str) -> bool:
    """Whether a text refuses and says nothing else: no reason that helps, no other way, no question."""
    return len(text.split()) <= _BARE_WORDS and bool(_REFUSAL.search(text)) and "?" not in text


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))

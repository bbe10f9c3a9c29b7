"""The rows of a JSON file of any size, one at a time: those of a list, or of the list that an object holds."""

from __future__ import annotations

import io
import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any

from cai.errors import RowError
from cai.prompts.rows import COLUMNS

UNDECODED = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of a byte that is no UTF-8."""
_SPACE = re.compile(r"[ \t\r\n]*")
_CHUNK = 1 << 16
_LONGEST_TOKEN = 16
"""So near to the end of what was read, an error or a number may be one only because the rest was not read yet."""


def json_rows(opened: Callable[[], AbstractContextManager[IO[bytes]]]) -> Iterator[Any]:
    """The rows, or a RowError for one that is not UTF-8. Raises ValueError for what is no JSON or holds no list."""
    with opened() as file:
        stream = _Stream(file)
        start = stream.peek()
        if start == "[":
            yield from stream.items()
            stream.expect("")
            return
        key = _key_of_rows(stream) if start == "{" else None
    if key is None:
        raise ValueError("expected a list of rows, or an object that holds one; for a row a line use .jsonl")
    with opened() as file:
        stream = _Stream(file)
        for name in stream.each_key():
            if name == key:
                yield from stream.items()
            else:
                deque(stream.parts(), maxlen=0)


def _key_of_rows(stream: _Stream) -> str | None:
    """The key of the first list of objects in an object, else of texts; a list under a prompt's own key is one prompt."""
    texts = None
    for name in stream.each_key():
        may_be = stream.peek() == "[" and name not in COLUMNS
        parts = stream.parts()
        first = next(parts, None)
        if may_be and isinstance(first, dict):
            return name
        if may_be and isinstance(first, str):
            texts = texts or name
        deque(parts, maxlen=0)
    return texts


class _Stream:
    """Parses a file value by value, and holds no more of it than the value."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape")
        self._text, self._at = "", 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or not self._read():
                return self._text[self._at : self._at + 1]

    def expect(self, character: str) -> None:
        """Step over a character; an empty one is the end."""
        if self.peek() != character:
            raise json.JSONDecodeError(f"Expecting {repr(character) if character else 'the end'}", self._text, self._at)
        self._at += len(character)

    def each_key(self) -> Iterator[str]:
        """The keys of an object; after each, the caller reads its value."""
        self.expect("{")
        while self.peek() != "}":
            key = self._value()
            self.expect(":")
            yield key
            if self.peek() != "}":
                self.expect(",")
        self.expect("}")

    def items(self) -> Iterator[Any]:
        """The items of a list."""
        self.expect("[")
        while self.peek() != "]":
            yield self._value()
            if self.peek() != "]":
                self.expect(",")
        self.expect("]")

    def parts(self) -> Iterator[Any]:
        """The items of a list, or the one value that is no list."""
        if self.peek() == "[":
            yield from self.items()
        else:
            yield self._value()

    def _value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as exc:
                cut_off = exc.msg.startswith("Unterminated") or exc.pos > len(self._text) - _LONGEST_TOKEN
                if not cut_off or not self._read():
                    raise
                continue
            if end < len(self._text) - _LONGEST_TOKEN or not self._read():
                undecoded = UNDECODED.search(self._text, self._at, end)
                self._at = end
                return RowError("invalid UTF-8") if undecoded else value

    def _read(self) -> bool:
        """Read on, each time twice as far, so that a long value is not parsed many times."""
        chunk = self._file.read(max(_CHUNK, len(self._text) - self._at))
        if chunk:
            self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

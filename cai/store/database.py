"""What a run keeps while it works: one SQLite file (WAL) with the calls, the records and the quarantined rows.

Each finished call is committed before its result is used, so a kill loses no call that was finished and repeats none.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from cai.errors import StoreError
from cai.types import Record

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key BLOB PRIMARY KEY, role TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    result BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS records (prompt_id TEXT PRIMARY KEY, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS prompts (position INTEGER PRIMARY KEY, prompt_id TEXT NOT NULL UNIQUE, digest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (
    position INTEGER PRIMARY KEY, origin TEXT NOT NULL, prompt_id TEXT, reason TEXT NOT NULL, detail TEXT NOT NULL,
    row TEXT NOT NULL);
"""
FORMAT = 1


class Call(NamedTuple):
    """One finished model call as the journal keeps it; `result` is JSON."""

    key: bytes
    role: str
    prompt_tokens: int
    completion_tokens: int
    result: bytes


class Quarantined(msgspec.Struct, frozen=True):
    """One row that became no record: where it stood (`position`, `origin`), why, and the row as it was read."""

    position: int
    origin: str
    prompt_id: str | None
    reason: str
    detail: str
    row: str


class RoleUsage(NamedTuple):
    """Calls ever paid for in this folder, and their tokens; for judges, prompt tokens are those computed."""

    calls: int
    prompt_tokens: int
    completion_tokens: int


class Database:
    """The run's SQLite file. Every write is a transaction of its own unless inside `transaction()`."""

    def __init__(self, path: Path) -> None:
        """Open or create. Raises `StoreError` where that cannot be."""
        self.path = path
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(Record)
        with self._guard():
            self._db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, FORMAT):
                raise StoreError(f"{path}: written by another version of cai (format {version}); use another -o")
            self._db.execute(f"PRAGMA user_version={FORMAT}")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            hint = "free some space, then the same command continues" if "full" in str(exc) else "check the disk"
            raise StoreError(f"{self.path}: {exc}; {hint}") from exc

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Many writes, all or none."""
        with self._guard():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.rollback()
                raise
            self._db.execute("COMMIT")

    def call_results(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those calls that are finished."""
        marks = ",".join("?" * len(keys))
        with self._guard():
            return dict(self._db.execute(f"SELECT key, result FROM calls WHERE key IN ({marks})", keys))

    def add_calls(self, calls: list[Call]) -> None:
        """Keep finished calls; several in one transaction."""
        insert = "INSERT OR REPLACE INTO calls VALUES (?,?,?,?,?)"
        if len(calls) == 1:
            with self._guard():
                self._db.execute(insert, calls[0])
            return
        with self.transaction():
            self._db.executemany(insert, calls)

    def usage(self) -> dict[str, RoleUsage]:
        """Calls and tokens by role, over all that was ever paid for here."""
        query = "SELECT role, COUNT(*), SUM(prompt_tokens), SUM(completion_tokens) FROM calls GROUP BY role ORDER BY role"
        with self._guard():
            return {role: RoleUsage(*rest) for role, *rest in self._db.execute(query)}

    def begin_pass(self) -> None:
        """Forget which prompts were read and which rows failed; this pass over the prompts says it anew."""
        with self.transaction():
            self._db.execute("DELETE FROM prompts")
            self._db.execute("DELETE FROM quarantine")

    def forget_records(self) -> None:
        """Drop the records (their recipe changed); the calls stay and are not paid for again."""
        with self._guard():
            self._db.execute("DELETE FROM records")

    def claim(self, position: int, prompt_id: str, digest: bytes) -> bytes | None:
        """Note a prompt of this pass; the digest of the one that has this id already, else None."""
        with self._guard():
            if self._db.execute("INSERT OR IGNORE INTO prompts VALUES (?,?,?)", (position, prompt_id, digest)).rowcount:
                return None
            found = self._db.execute("SELECT digest FROM prompts WHERE prompt_id=?", (prompt_id,)).fetchone()
            return bytes(found[0])

    def has_record(self, prompt_id: str) -> bool:
        """Whether this prompt is done."""
        with self._guard():
            return self._db.execute("SELECT 1 FROM records WHERE prompt_id=?", (prompt_id,)).fetchone() is not None

    def add_record(self, record: Record) -> None:
        """Keep a finished record."""
        with self._guard():
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?,?)", (record.prompt.id, self._encoder.encode(record)))

    def records(self) -> Iterator[Record]:
        """The records of this pass's prompts, in the order of the prompts, one at a time."""
        query = "SELECT record FROM prompts JOIN records USING (prompt_id) ORDER BY position"
        with self._guard():
            for (record,) in self._db.execute(query):
                yield self._decoder.decode(record)

    def count_records(self) -> int:
        """How many records there are, of this pass or an earlier one."""
        with self._guard():
            return int(self._db.execute("SELECT COUNT(*) FROM records").fetchone()[0])

    def count_calls(self) -> int:
        """How many finished calls there are."""
        with self._guard():
            return int(self._db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])

    def quarantine(self, row: Quarantined) -> None:
        """Keep a row that failed, with its reason."""
        with self._guard():
            self._db.execute("INSERT OR REPLACE INTO quarantine VALUES (?,?,?,?,?,?)", msgspec.structs.astuple(row))

    def quarantined(self) -> Iterator[Quarantined]:
        """The rows that failed in this pass, in their order."""
        with self._guard():
            for row in self._db.execute("SELECT * FROM quarantine ORDER BY position"):
                yield Quarantined(*row)

    def close(self) -> None:
        """Fold the WAL back into the file and close."""
        with self._guard():
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

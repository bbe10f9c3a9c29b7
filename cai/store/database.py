"""What a run keeps while it works: one SQLite file (WAL) with the calls, the records and the quarantined rows.

Each finished call is committed before its result is used, so a kill loses no call that was finished and repeats none.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from cai.errors import StoreError
from cai.types import Prompt, Record

_SCHEMA = """
CREATE TABLE IF NOT EXISTS calls (
    key BLOB PRIMARY KEY, role TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    result BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS records (prompt_id TEXT PRIMARY KEY, digest BLOB NOT NULL, record BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS prompts (
    position INTEGER PRIMARY KEY, prompt_id TEXT NOT NULL UNIQUE, text_digest BLOB NOT NULL, digest BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS quarantine (
    position INTEGER PRIMARY KEY, origin TEXT NOT NULL, prompt_id TEXT, reason TEXT NOT NULL, detail TEXT NOT NULL,
    row TEXT NOT NULL);
"""
_BATCHES = """
CREATE TABLE IF NOT EXISTS batches (
    name TEXT PRIMARY KEY, endpoint TEXT NOT NULL, remote TEXT NOT NULL, status TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS batched (custom_id TEXT PRIMARY KEY, batch TEXT NOT NULL) WITHOUT ROWID;
"""
"""Not part of the format: a folder that an earlier version wrote gets these tables when it is opened."""
FORMAT = 2
_CACHE = 16 * 1024
"""KiB of pages in memory: keys are hashes, so that each write of a large run falls on another page."""
_SPACE = "free some space, then the same command continues"
_DAMAGED = "the file is damaged: put a copy of it back, or start over with --fresh"
_HINTS = {"SQLITE_FULL": _SPACE, "SQLITE_NOTADB": _DAMAGED, "SQLITE_CORRUPT": _DAMAGED}

Claim = Literal["new", "kept", "duplicate", "taken"]
"""A prompt of this pass has no record yet, or has one; or its id was read before, with the same text or another one."""


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


class Batch(NamedTuple):
    """Calls that were handed to a server's batch API together."""

    name: str
    """What the batch is called in its own metadata, so that it can be found before its id is known."""
    endpoint: str
    remote: str
    """The server's id of it; empty where it is not known whether it was created."""
    status: str
    """`intended`, `created`, `missing`, where the file of its answers was not there, or `ended`, where they were read."""


class _Noted(NamedTuple):
    """A prompt as a pass notes it, in the order of the table's columns."""

    position: int
    prompt_id: str
    text_digest: bytes
    digest: bytes


class RoleUsage(NamedTuple):
    """Calls ever paid for in this folder, and their tokens; for judges, prompt tokens are those computed."""

    calls: int
    prompt_tokens: int
    completion_tokens: int


class Database:
    """The run's SQLite file.

    Every write is a transaction of its own unless inside `transaction()`; only claims, which each pass makes anew, wait
    for the next one. A write that fails takes nothing with it that was pending before.
    """

    def __init__(self, path: Path) -> None:
        """Open or create. Raises `StoreError` where that cannot be."""
        self.path = path
        self._depth = 0
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(Record)
        with self._guard():
            self._db = sqlite3.connect(path, isolation_level=None, cached_statements=64)
            with ExitStack() as undo:
                undo.callback(self._db.close)
                self._set_up()
                undo.pop_all()

    def _set_up(self) -> None:
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, FORMAT):
            raise StoreError(f"{self.path}: written by another version of cai (format {version}); use another -o")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute(f"PRAGMA cache_size=-{_CACHE}")
        if version == 0:
            self._db.executescript(f"BEGIN;{_SCHEMA}PRAGMA user_version={FORMAT};COMMIT")
        if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name='batched'").fetchone():
            self._db.executescript(f"BEGIN;{_BATCHES}COMMIT")

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            name = getattr(exc, "sqlite_errorname", "")
            hint = _HINTS.get(name, "check the disk, then the same command continues")
            raise StoreError(f"{self.path}: {exc}; {hint}") from exc

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Many writes, all or none; they are on disk when the outermost one ends."""
        with self._guard():
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("SAVEPOINT writes")
            self._depth += 1
            whole = False
            try:
                yield
                whole = True
            finally:
                self._end(undo=not whole)

    def _end(self, undo: bool) -> None:
        """Leave the innermost `transaction()`; the outermost commits what is left."""
        self._depth -= 1
        if undo and not self._db.in_transaction:  # SQLite undid everything already, as it may on a full disk
            return
        with ExitStack() as failed:  # a transaction that is left open would take in what comes next
            failed.callback(self._db.rollback)
            if undo:
                self._db.execute("ROLLBACK TO writes")
            self._db.execute("RELEASE writes" if self._depth else "COMMIT")
            failed.pop_all()

    def call_results(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those calls that are finished."""
        marks = ",".join("?" * len(keys))
        with self._guard():
            return dict(self._db.execute(f"SELECT key, result FROM calls WHERE key IN ({marks})", keys))

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The same; on another machine it is a question to this one, and has to be waited for."""
        return self.call_results(keys)

    def add_calls(self, calls: list[Call]) -> None:
        """Keep finished calls; several in one transaction."""
        with self.transaction():
            self._db.executemany("INSERT OR REPLACE INTO calls VALUES (?,?,?,?,?)", calls)

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
        with self.transaction():
            self._db.execute("DELETE FROM records")

    def claim(self, rows: Sequence[tuple[int, Prompt, tuple[str, ...]]]) -> list[Claim]:
        """Note prompts of this pass (position, prompt, completions given with it), and say what there is of each already.

        A record counts only for the very same prompt and the same completions that were given with it.
        """
        noted = [_Noted(at, one.id, _digest((one.messages, given)), _digest((one, given))) for at, one, given in rows]
        if not noted:
            return []
        ids = msgspec.json.encode([row.prompt_id for row in noted]).decode()
        with self._guard():
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("INSERT OR IGNORE INTO prompts VALUES (?,?,?,?)", noted)
            within = "SELECT position FROM prompts WHERE position BETWEEN ? AND ?"
            first = {position for (position,) in self._db.execute(within, (noted[0].position, noted[-1].position))}
            made = "SELECT prompt_id, digest FROM records WHERE prompt_id IN (SELECT value FROM json_each(?))"
            kept = dict(self._db.execute(made, (ids,)))
            return [
                ("kept" if kept.get(row.prompt_id) == row.digest else "new") if row.position in first else self._repeated(row)
                for row in noted
            ]

    def _repeated(self, row: _Noted) -> Claim:
        """What a prompt is whose id was read before in this pass."""
        same = "SELECT 1 FROM prompts WHERE prompt_id=? AND text_digest=?"
        return "duplicate" if self._db.execute(same, (row.prompt_id, row.text_digest)).fetchone() else "taken"

    def add_record(self, record: Record, given: tuple[str, ...] = ()) -> None:
        """Keep a finished record, in place of an older one of that id."""
        row = (record.prompt.id, _digest((record.prompt, given)), self._encoder.encode(record))
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO records VALUES (?,?,?)", row)

    def records(self) -> Iterator[Record]:
        """The records of this pass's prompts, in the order of the prompts, one at a time."""
        return map(self._decoder.decode, self.encoded_records())

    def encoded_records(self) -> Iterator[bytes]:
        """The same as they are stored, in JSON."""
        query = "SELECT record FROM prompts JOIN records USING (prompt_id, digest) ORDER BY position"
        with self._guard():
            for (record,) in self._db.execute(query):
                yield record

    def count_calls(self) -> int:
        """How many finished calls there are."""
        with self._guard():
            return int(self._db.execute("SELECT COUNT(*) FROM calls").fetchone()[0])

    def quarantine(self, row: Quarantined) -> None:
        """Keep a row that failed, with its reason."""
        with self.transaction():
            self._db.execute("INSERT OR REPLACE INTO quarantine VALUES (?,?,?,?,?,?)", msgspec.structs.astuple(row))

    def quarantined(self) -> Iterator[Quarantined]:
        """The rows that failed in this pass, in their order."""
        with self._guard():
            for row in self._db.execute("SELECT * FROM quarantine ORDER BY position"):
                yield Quarantined(*row)

    # -- batches at servers ---------------------------------------------------------------------------------------------

    def add_batch(self, batch: Batch, custom_ids: list[str]) -> None:
        """Note a batch and its calls; a call that was in another batch before now belongs to this one."""
        with self.transaction():
            self._db.execute("INSERT INTO batches VALUES (?,?,?,?)", batch)
            rows = ((one, batch.name) for one in custom_ids)
            self._db.executemany("INSERT OR REPLACE INTO batched VALUES (?,?)", rows)

    def update_batch(self, name: str, remote: str, status: str) -> None:
        """Note how far a batch is."""
        with self.transaction():
            self._db.execute("UPDATE batches SET remote=?, status=? WHERE name=?", (remote, status, name))

    def drop_batch(self, name: str) -> None:
        """Forget a batch that the server does not have, or refuses: its calls can be made anew."""
        with self.transaction():
            self._db.execute("DELETE FROM batched WHERE batch=?", (name,))
            self._db.execute("DELETE FROM batches WHERE name=?", (name,))

    def find_batches(self, custom_ids: list[str]) -> dict[str, Batch]:
        """In which batch each of these calls was sent last; those that never were are left out."""
        query = (
            "SELECT custom_id, name, endpoint, remote, status FROM batched JOIN batches ON name = batch "
            "WHERE custom_id IN (SELECT value FROM json_each(?))"
        )
        with self._guard():
            found = self._db.execute(query, (msgspec.json.encode(custom_ids).decode(),))
            return {one: Batch(*rest) for one, *rest in found}

    def open_batches(self) -> tuple[int, int]:
        """How many batches were handed over whose answers were not read, and how many calls are in them."""
        query = "SELECT COUNT(DISTINCT name), COUNT(*) FROM batches JOIN batched ON batch = name WHERE status != 'ended'"
        with self._guard():
            batches, calls = self._db.execute(query).fetchone()
        return batches, calls

    def close(self) -> None:
        """Close; SQLite folds the WAL back into the file where it can."""
        with self._guard():
            try:
                if self._db.in_transaction:
                    self._db.execute("COMMIT")
            finally:
                self._db.close()


def _digest(value: object) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=16).digest()

"""The run folder `-o OUT`: who may write it, which run it holds, and what is left in it.

OUT/run/journal.sqlite    calls, records, quarantined rows        OUT/recipe.yaml         the resolved recipe
OUT/run/quarantine.jsonl  the quarantined rows, to read           OUT/constitution.yaml   the resolved constitution
OUT/run/lock              held while a process writes             OUT/manifest.json       counts, drops, cost, hashes
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
from filelock import FileLock, Timeout

from cai.errors import ConfigError, StoreError
from cai.store.database import Database

Mode = Literal["continue", "update", "fresh"]
_MEASURES = ("evaluation.json", "evaluation.html")
_RESULTS = ("README.md", "data", "manifest.json", "recipe.yaml", "constitution.yaml", *_MEASURES)
_LOCK, _OWNER, _JOURNAL, _IDENTITY = "lock", "owner", "journal.sqlite", "identity.json"


class RunFolder:
    """An open, locked run folder. Use as a context manager."""

    def __init__(self, path: Path, identity: dict[str, Any], mode: Mode = "continue") -> None:
        """Open `path`, made if need be, for the run that `identity` (what decides its records) describes.

        `continue` accepts only the same run; `update` keeps the finished calls and redoes what the change touches;
        `fresh` deletes everything. Raises `ConfigError` where it holds another run (naming what differs) or something
        else than a run, `StoreError` where another process writes it, or it is damaged or cannot be written.
        """
        with _disk_errors(path):
            self.path = path.absolute()  # a relative one with a colon would be taken for a URI
            self.run = self.path / "run"
            _refuse_foreign(self.path)
            self.run.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.run / _LOCK)
            self._acquire()
        with ExitStack() as undo:
            undo.callback(self._lock.release)
            self.database = self._open(identity, mode)
            undo.pop_all()

    def _open(self, identity: dict[str, Any], mode: Mode) -> Database:
        if mode == "fresh":
            self._start_over()
        with _disk_errors(self.run):
            (self.run / _OWNER).write_text(str(os.getpid()))
        before = self._identity(mode)
        if before is not None and before != identity and mode != "update":
            raise ConfigError(_other_run(self.path, before, identity))
        journal = self.run / _JOURNAL
        if before is not None and not journal.exists():
            raise StoreError(f"{journal} is gone, with all finished calls of this run: put it back, or start over with --fresh")
        database = Database(journal)
        with ExitStack() as undo:
            undo.callback(_close_quietly, database)
            if before != identity:
                database.forget_records()
                self._forget_measures(identity)
                self.write_json(f"run/{_IDENTITY}", identity)
            undo.pop_all()
        return database

    def _forget_measures(self, identity: dict[str, Any]) -> None:
        """Remove what tells of other verdicts: measures, and calibrations, but for one that this very run uses."""
        used = json.dumps(identity)
        with _disk_errors(self.path):
            for path in _calibrations(self.path):
                if content_hash(path.read_text(encoding="utf-8", errors="replace")) not in used:
                    _remove(path)
            for name in _MEASURES:
                _remove(self.path / name)

    def _identity(self, mode: Mode) -> dict[str, Any] | None:
        """Which run is there; None where there is none. A damaged one equals no identity, which `update` can mend."""
        try:
            return self.read_json(f"run/{_IDENTITY}")
        except StoreError as exc:
            if mode == "update":
                return {}
            raise StoreError(f"{exc}; --update keeps the finished calls, --fresh starts over") from exc

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as exc:
            owner = self.run / _OWNER
            process = f" (process {owner.read_text()})" if owner.exists() else ""
            raise StoreError(f"{self.path}: a live run{process} is writing here; wait for it or use another -o") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(StoreError) if exc else nullcontext():  # what failed first is what has to be told
            self.close()

    def close(self) -> None:
        """Close the database and give the lock back."""
        try:
            self.database.close()
        finally:
            self._lock.release()

    def _start_over(self) -> None:
        with _disk_errors(self.path):
            # first what says that there is a run: a kill from here on leaves an empty folder, not a damaged one
            for path in (self.run / _IDENTITY, *(self.path / name for name in _RESULTS), *_calibrations(self.path)):
                _remove(path)
            for entry in self.run.iterdir():
                if entry.name != _LOCK:
                    _remove(entry)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in a file of the folder; None where there is no file. Raises `StoreError` for a damaged one."""
        path = self.path / name
        with _disk_errors(path):
            try:
                value = json.loads(path.read_bytes())
            except FileNotFoundError:
                return None
            except ValueError as exc:
                raise StoreError(f"{path}: damaged: not valid JSON: {exc}") from exc
        if not isinstance(value, dict):
            raise StoreError(f"{path}: damaged: expected a JSON object, found {type(value).__name__}")
        return value

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all; what UTF-8 cannot hold (a file name's odd bytes) is written as an escape."""
        write_whole(self.path / name, text)

    def write_quarantine(self) -> dict[str, int]:
        """Write `run/quarantine.jsonl` and count its rows by reason; no file where there is nothing."""
        counts: dict[str, int] = {}
        target = self.run / "quarantine.jsonl"
        part = target.with_name("quarantine.jsonl.part")
        with _disk_errors(target), part.open("wb") as file:
            for row in self.database.quarantined():
                counts[row.reason] = counts.get(row.reason, 0) + 1
                file.write(msgspec.json.encode(row) + b"\n")
        if counts:
            part.replace(target)
        else:
            part.unlink()
            target.unlink(missing_ok=True)
        return counts

    @contextmanager
    def new_data(self) -> Iterator[Path]:
        """A folder to write `data/` into; it takes the old one's place only when the block ends well."""
        part, data = self.run / "data.part", self.path / "data"
        with _disk_errors(data):
            _remove(part)
            part.mkdir()
            try:
                yield part
                _remove(data)
                part.replace(data)
            finally:
                _remove(part)


def would_lose(path: Path) -> str | None:
    """What starting over in this folder would delete that was paid for, in words; None where that is nothing."""
    journal = path.absolute() / "run" / _JOURNAL
    if not journal.exists():
        return "a dataset" if (path / "data").exists() else None
    try:
        database = Database(journal)
    except StoreError:
        return "a journal that cannot be read"
    try:
        calls, (batches, begun) = database.count_calls(), database.open_batches()
    finally:
        database.close()
    kept = [f"{calls:,} finished calls"] if calls else []
    if batches:
        kept.append(f"{begun:,} calls that a server works on in batches")
    return " and ".join(kept) or None


def _calibrations(path: Path) -> list[Path]:
    """That of the run's judge, or one for each member of its panel that has one."""
    return [*path.glob("calibration.yaml"), *path.glob("calibration-[0-9]*.yaml")]


def _close_quietly(database: Database) -> None:
    with suppress(StoreError):  # what failed before is what has to be told
        database.close()


def content_hash(text: str) -> str:
    """16 hex digits over a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _refuse_foreign(path: Path) -> None:
    """A folder with files of others is never written into; hidden ones do not count."""
    if any("\ud800" <= char <= "\udfff" for char in str(path)):
        raise ConfigError(f"{str(path)!r}: expected a name of valid Unicode, for -o")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file; -o names a folder")
    run = path / "run"
    if any((run / name).exists() for name in (_LOCK, _JOURNAL, _IDENTITY)):
        return
    names = os.listdir(path) if path.exists() else []
    there = sorted(name for name in names if name != "run" and not name.startswith("."))
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        there.append("run")
    if there:
        shown = ", ".join([*there[:5], *(["more"] if there[5:] else [])])
        raise ConfigError(f"{path} holds {shown}, but no run of cai; nothing was touched; use another -o")


def write_whole(target: Path, text: str) -> None:
    """Write a file whole or not at all. Raises `StoreError`."""
    part = target.with_name(target.name + ".part")
    try:
        with _disk_errors(target):
            part.write_text(text, encoding="utf-8", errors="backslashreplace")
            part.replace(target)
    except StoreError:
        with suppress(OSError):
            part.unlink()
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except StoreError:
        raise
    except OSError as exc:
        raise StoreError(
            f"{path}: cannot be written: {exc.strerror or exc}; mend that, then the same command continues"
        ) from exc


def _other_run(path: Path, before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = [
        f"  {key}: {before.get(key)!r} there, {now.get(key)!r} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    return (
        f"{path} holds another run:\n" + "\n".join(changed) + "\nuse another -o; or --update to keep its finished calls "
        "and redo only what this changes; or --fresh to start over"
    )

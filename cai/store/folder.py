"""The run folder `-o OUT`: who may write it, which run it holds, and what is left in it.

OUT/run/journal.sqlite    calls, records, quarantined rows        OUT/recipe.yaml         the resolved recipe
OUT/run/quarantine.jsonl  the quarantined rows, to read           OUT/constitution.yaml   the resolved constitution
OUT/run/lock              held while a process writes             OUT/manifest.json       counts, drops, cost, hashes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec
from filelock import FileLock, Timeout

from cai.errors import ConfigError, StoreError
from cai.store.database import Database

Mode = Literal["continue", "update", "fresh"]
_OURS = ("README.md", "data", "manifest.json", "recipe.yaml", "constitution.yaml", "run")


class RunFolder:
    """An open, locked run folder. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Open `path`, made if need be. Raises `StoreError` where another process writes it or it cannot be written."""
        self.path = path
        self.run = path / "run"
        with _disk_errors(path):
            self.run.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.run / "lock")
            self._acquire()
            (self.run / "owner").write_text(str(os.getpid()))
        try:
            self.database = Database(self.run / "journal.sqlite")
        except BaseException:
            self._lock.release()
            raise

    def _acquire(self) -> None:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as exc:
            owner = self.run / "owner"
            process = f" (process {owner.read_text()})" if owner.exists() else ""
            raise StoreError(f"{self.path}: a live run{process} is writing here; wait for it or use another -o") from exc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and give the lock back."""
        try:
            self.database.close()
        finally:
            self._lock.release()

    def prepare(self, identity: dict[str, Any], mode: Mode) -> None:
        """Make the folder ready for the run that `identity` (what decides its records) describes.

        `continue` accepts only the same run; `update` keeps the finished calls and redoes what the change touches;
        `fresh` deletes everything. Raises `ConfigError` naming what differs.
        """
        if mode == "fresh":
            self._start_over()
        before = self.read_json("run/identity.json")
        if before is not None and before != identity:
            if mode != "update":
                raise ConfigError(_other_run(self.path, before, identity))
            self.database.forget_records()
        self.write_json("run/identity.json", identity)

    def _start_over(self) -> None:
        self.database.close()
        with _disk_errors(self.path):
            for name in _OURS[:-1]:
                _remove(self.path / name)
            for entry in self.run.iterdir():
                if entry.name not in ("lock", "owner"):
                    _remove(entry)
        self.database = Database(self.run / "journal.sqlite")

    def read_json(self, name: str) -> Any:
        """What a JSON file of the folder holds; None where it is not there."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as exc:
            raise StoreError(f"{self.path / name}: not valid JSON: {exc}; --fresh starts over") from exc

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file whole or not at all."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a file whole or not at all."""
        target = self.path / name
        part = target.with_name(target.name + ".part")
        with _disk_errors(target):
            part.write_text(text, encoding="utf-8")
            part.replace(target)

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
            yield part
            _remove(data)
            part.replace(data)


def holds_run(path: Path) -> int:
    """How many finished calls the folder holds that starting over would lose."""
    journal = path / "run" / "journal.sqlite"
    if not journal.exists():
        return 0
    database = Database(journal)
    try:
        return database.count_calls()
    finally:
        database.close()


def _remove(path: Path) -> None:
    if path.is_dir():
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

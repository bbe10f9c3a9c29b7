"""The folder that a stage trains into: a model folder as others read it, and beside it what the training needs to go on.

OUT/config.json, model.safetensors, tokenizer…   the trained model      OUT/recipe.yaml    the resolved settings
OUT/README.md                                    its model card         OUT/manifest.json  data, hashes, measures, versions
OUT/checkpoints/checkpoint-N                     where it goes on       OUT/run/           identity, log, lock, rows, seconds
OUT/run/quarantine.jsonl                         rows that were not of use, and why
OUT/best/, training.html                         of an online stage, the policy with the best gold, and pictures
OUT/reward.json, members/N                       what makes one reward of a reward model's outputs; the models of several
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from filelock import FileLock, Timeout

from cai.errors import ConfigError, StoreError
from cai.store import write_whole
from cai.training.checkpoints import find_last, is_whole, is_written, step_of
from cai.training.differences import Changes, changed_code, describe

Mode = Literal["continue", "fresh", "changed-code"]
"""`changed-code`: continue, though a function that rewards or measures is another one since."""
STARTS_OVER = "run again, where cai train needs --fresh (cai run makes a changed stage anew by itself)"
"""What to do when settings have been changed, whichever command trains."""
QUARANTINE = "run/quarantine.jsonl"
"""Rows that could not be used: where each stood, and why."""
PAGE = "training.html"
"""Pictures of an online stage."""
_SECONDS = "run/seconds.json"
_CHANGES = "run/changes.json"


def kept_in(folder: Path) -> str | None:
    """What of a training in a folder cannot be had again for nothing, in a word; None where there is nothing."""
    if any(any(folder.glob(one)) for one in ("manifest.json", "*.safetensors")):
        return "a trained model"
    if _has_members(folder):
        return "trained reward models"
    return "checkpoints" if any(map(is_written, _checkpoints(folder))) else None  # of a damaged one a person may still make use


def from_where(folder: Path) -> str:
    """Where the training that a folder holds goes on."""
    if any(map(is_whole, _checkpoints(folder))):
        return "from its last checkpoint"
    return "with the next reward model" if _has_members(folder) else "from the start, there being no checkpoint yet"


def _checkpoints(folder: Path) -> Iterable[Path]:
    return folder.glob("checkpoints/**/checkpoint-*")


def _has_members(folder: Path) -> bool:
    return any(folder.glob("members/*/done.json"))


class TrainFolder:
    """An open, locked folder of one stage. Use as a context manager."""

    _lock: FileLock | None

    def __init__(self, path: Path, identity: dict[str, Any], mode: Mode = "continue", leads: bool = True) -> None:
        """Open `path`, made if need be, for the training that `identity` describes.

        Of several processes one `leads`: only that one locks, checks and writes. Raises `ConfigError` where the folder holds
        another training (naming what differs) or something else, `StoreError` where another process trains there or it
        cannot be written.
        """
        self.path, self._run, self._lock = path.absolute(), path.absolute() / "run", None
        self._opened, self._before = time.monotonic(), 0.0
        if leads:
            self._take(path, identity, mode)

    def _take(self, path: Path, identity: dict[str, Any], mode: Mode) -> None:
        self._refuse_foreign()
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self._run / "lock")
            lock.acquire(timeout=0)
        except Timeout as exc:
            raise StoreError(f"{path}: another process trains here; wait for it or use another -o") from exc
        except OSError as exc:
            raise StoreError(f"{path}: cannot be written: {exc.strerror or exc}; mend that or use another -o") from exc
        self._lock = lock
        try:
            self._open(identity, mode)
        except BaseException:
            lock.release()
            raise

    def _open(self, identity: dict[str, Any], mode: Mode) -> None:
        if mode == "fresh":
            self._clear(*self.path.iterdir())
        before = self._read("run/identity.json")
        if before is not None and before != identity:
            changed = {} if self.finished else changed_code(before, identity)
            if not kept_in(self.path):
                self._clear(self.path / PAGE)
            elif changed and mode == "changed-code":
                self._tell_changed(changed)
            else:
                is_late = mode == "changed-code" and self.finished
                more = "; that one has ended, and --changed-code is for one that has not" if is_late else ""
                raise ConfigError(f"{self.path} holds {describe(before, identity, bool(changed))}{more}")
        self.write("run/identity.json", json.dumps(identity, indent=2) + "\n")
        told = (self._read(_SECONDS) or {}).get("seconds")
        self._before = float(told) if isinstance(told, int | float) else 0.0

    def _tell_changed(self, changed: Changes) -> None:
        last, _ = find_last(self.checkpoints)
        step = step_of(last) if last else 0
        told = [{"step": step, "key": key, "before": before, "after": after} for key, (before, after) in changed.items()]
        if self.changes[-len(told) :] != told:  # else told before, by a process that was killed
            self.write(_CHANGES, json.dumps([*self.changes, *told], indent=2) + "\n")

    @property
    def changes(self) -> list[dict[str, Any]]:
        """Functions that were changed in the midst: after which step, the key, and both versions."""
        with suppress(OSError, ValueError):
            return list(json.loads((self.path / _CHANGES).read_bytes()))
        return []

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; -o names a folder")
        names = os.listdir(self.path) if self.path.exists() else []
        there = sorted(name for name in names if not name.startswith("."))
        if there and not (self._run / "lock").exists():
            raise ConfigError(f"{self.path} holds {', '.join(there[:5])}, but no training of cai; use another -o")
        if (self._run / "journal.sqlite").exists():
            raise ConfigError(f"{self.path} holds a run of cai generate; use another -o")

    def _clear(self, *entries: Path) -> None:
        """Delete them, and what is in run/ but for the lock."""
        for entry in (*entries, *self._run.iterdir()):  # the identity is in run/, and goes after what is known by it
            if entry in (self._run, self._run / "lock"):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)

    @property
    def checkpoints(self) -> Path:
        """Where the trainer keeps what it needs to go on."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> dict[str, Any] | None:
        """The manifest, where the training has ended well; else None."""
        manifest = self._read("manifest.json")
        return manifest if manifest and manifest.get("status") == "done" else None

    def reopen(self) -> None:
        """A training that had ended goes on: its manifest tells of it no more."""
        if self._lock is not None:
            (self.path / "manifest.json").unlink(missing_ok=True)

    def drop_broken_checkpoints(self) -> None:
        """Delete those that were not written whole: they take room and nothing can go on from them."""
        for path in _checkpoints(self.path):
            if self._lock is not None and not is_written(path):
                shutil.rmtree(path, ignore_errors=True)

    @property
    def rows(self) -> Path:
        """Where the rows lie while they are trained on."""
        return self._run / "rows"

    @property
    def log(self) -> Path:
        """Measures as JSON, a line for each logged step."""
        return self._run / "log.jsonl"

    @property
    def seconds(self) -> float:
        """How long this and earlier sessions took; one that was killed counts up to its last checkpoint."""
        return round(self._before + time.monotonic() - self._opened, 1)

    def note_seconds(self) -> None:
        """Keep them for a session that goes on from here; where that cannot be, something else tells of the disk."""
        if self._lock is not None:
            with suppress(StoreError):
                self.write(_SECONDS, json.dumps({"seconds": self.seconds}) + "\n")

    def _read(self, name: str) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            value = json.loads((self.path / name).read_bytes())
            return value if isinstance(value, dict) else None
        return None

    def write(self, name: str, text: str) -> None:
        """Write a file whole or not at all. Raises `StoreError`."""
        write_whole(self.path / name, text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        if self._lock is not None:
            self._lock.release()

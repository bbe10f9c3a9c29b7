"""A run folder behind a URL (s3://, gs://, hf://, file://, memory://): worked on in a local copy that is mirrored there.

SQLite needs a local disk, so the run works in a local folder. Every minute, and at the end, a snapshot of the
journal goes to the URL; the dataset and what describes it go there whole at the end, the manifest last. Another machine
continues from the last snapshot, this one from where it was.

URL/run/mirror.json             which snapshot counts: written after it, so that a half-written one never does
URL/run/journal-STAMP.sqlite    that snapshot
URL/run/writer.json             who writes, and when it last said so
everything else                 as in a local run folder

A second writer is noticed by `writer.json`: when it starts, or before the first one's next snapshot counts. That is best
effort, for object stores have no locks, and the clocks of two machines have to agree to a minute; on one machine a file lock
holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cai.errors import CaiError, ConfigError, StoreError

EVERY = 60.0
"""Seconds between two snapshots; of Hub repositories, where each file that is written is a commit, ten times as many."""
_STALE = 3
"""Intervals without a sign after which a writer counts as dead."""
_POINTER, _WRITER, _JOURNAL, _IDENTITY = "run/mirror.json", "run/writer.json", "run/journal.sqlite", "run/identity.json"
_OWN = re.compile(r"run/(mirror\.json|writer\.json|journal-\w+\.sqlite)")
_LOCAL = re.compile(r"run/(lock|owner|journal\.sqlite.*|data\.part.*)|.*\.part")
"""What of a local folder is not copied: the journal goes as a snapshot."""
_LAST = ("README.md", "manifest.json")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


def is_remote(out: Path | str) -> bool:
    """Whether a run folder is behind a URL. Raises `ConfigError` for a URL that became a path."""
    if isinstance(out, Path):
        if re.match(r"[a-z][a-z0-9]+:/[^/]", str(out)):
            raise ConfigError(f"{out}: a URL does not survive in a Path; give it as a str")
        return False
    return "://" in out


def local_copy(url: str, cache: Path) -> Path:
    """The local folder in which a run behind a URL is worked on."""
    url = _tidy(url)
    name = re.sub(r"\W+", "-", url.rpartition("/")[2])[:40]
    return cache / "runs" / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


class _ReplacedError(StoreError):
    """Another process has become the writer."""


class Mirror:
    """One run folder behind a URL, and its local copy."""

    def __init__(self, url: str, local: Path) -> None:
        """Raises `ConfigError` for a URL that nothing here can read, naming the package that can."""
        self.url, self.local = _tidy(url), local
        self._fs, self._root = _file_system(self.url)
        self._every = EVERY * 10 if self.url.startswith("hf:") else EVERY
        self._mine = local.with_name(f"{local.name}.json")
        self._writer = {"id": uuid.uuid4().hex, "machine": f"{platform.node()}-{uuid.getnode():x}", "process": os.getpid()}
        self._pushed: object = None
        self._signing = threading.RLock()

    def holds_run(self) -> bool:
        """Whether there is a run at the URL."""
        with _failures(self.url, "read"):
            return self._read(_POINTER) is not None

    @contextmanager
    def writing(self, fresh: bool, stop: Callable[[], None]) -> Iterator[None]:
        """In the block, the local copy is up to date and this process is its writer; at the end all of it is mirrored.

        `stop` is called where another writer took over. Raises `StoreError`.
        """
        self.local.parent.mkdir(parents=True, exist_ok=True)
        with self._local_lock():
            self._become_writer()
            if not fresh:
                self._fetch()
            ended, lost = threading.Event(), threading.Event()
            thread = threading.Thread(target=self._keep_up, args=(ended, lost, stop), daemon=True)
            thread.start()
            failed: BaseException | None = None
            try:
                yield
            except BaseException as exc:
                failed = exc
                raise
            finally:
                ended.set()
                thread.join()
                self._leave(lost.is_set(), failed)

    @contextmanager
    def _local_lock(self) -> Iterator[None]:
        lock = FileLock(self.local.with_name(f"{self.local.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as exc:
            raise StoreError(f"{self.url}: a live run on this machine is writing there; wait for it or use another -o") from exc
        try:
            yield
        finally:
            lock.release()

    def _become_writer(self) -> None:
        with _failures(self.url, "read"):
            there = self._read(_WRITER)
        age = time.time() - there["time"] if there else 0.0
        if there and there["machine"] != self._writer["machine"] and age < self._every * _STALE:
            raise StoreError(
                f"{self.url}: {there['machine']} (process {there['process']}) is writing there, last heard of {age:.0f} s ago; "
                f"wait for it or use another -o; if it is dead, the same command works in {self._every * _STALE - age:.0f} s"
            )
        with _failures(self.url, "written"):
            self._refuse_foreign()
            self._say_alive()

    def _refuse_foreign(self) -> None:
        names = sorted({*self._names()} - {".gitattributes", "README.md"})  # of a new repository of the Hub
        if names and not any(name.startswith("run/") for name in names):
            shown = ", ".join([*names[:5], *(["more"] if names[5:] else [])])
            raise ConfigError(f"{self.url} holds {shown}, but no run of cai; nothing was touched; use another -o")

    def _say_alive(self) -> None:
        self._write(_WRITER, {**self._writer, "time": time.time()})

    def _require_writer(self) -> None:
        """Raises `_ReplacedError` where another process writes."""
        with self._signing:
            there = self._read(_WRITER)
        if there is None or there["id"] != self._writer["id"]:
            raise self._replaced()

    def _replaced(self) -> _ReplacedError:
        return _ReplacedError(f"{self.url}: another process writes there now; what was made since then is in {self.local}")

    def _stay_writer(self) -> None:
        """Say that this process lives. Raises as `_require_writer`."""
        with self._signing:
            self._require_writer()
            self._say_alive()

    @contextmanager
    def _staying_writer(self) -> Iterator[None]:
        """While the block uploads, however long, this process says that it lives."""
        ended = threading.Event()

        def say() -> None:
            while not ended.wait(self._every):
                with contextlib.suppress(StoreError), _failures(self.url, "written"):
                    self._stay_writer()

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _fetch(self) -> None:
        """What the URL holds, where the local copy did not come from there or go there last; its own calls stay."""
        with _failures(self.url, "read"):
            pointer, journal = self._read(_POINTER), self.local / _JOURNAL
            if pointer is None or (pointer == self._known() and journal.exists()):
                return
            self.local.joinpath("run").mkdir(parents=True, exist_ok=True)
            part = journal.with_name("journal.part")
            self._fs.get_file(self._at(f"run/{pointer['journal']}"), str(part))
            _adopt(part, journal)
            for name in self._names():
                if not (_OWN.fullmatch(name) or name.endswith(".part")):
                    (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                    self._fs.get_file(self._at(name), str(self.local / name))
            for old in (journal, journal.with_name("journal.sqlite-wal"), journal.with_name("journal.sqlite-shm")):
                old.unlink(missing_ok=True)
            part.replace(journal)
            self._mine.write_text(json.dumps(pointer))

    def _known(self) -> object:
        try:
            return json.loads(self._mine.read_text())
        except (OSError, ValueError):
            return None

    def _keep_up(self, ended: threading.Event, lost: threading.Event, stop: Callable[[], None]) -> None:
        while not ended.wait(self._every):
            # where the network is away, the next snapshot comes soon, and the last one tells
            with contextlib.suppress(StoreError), _failures(self.url, "written"):
                try:
                    self._stay_writer()
                    with self._staying_writer():
                        self._push_journal()
                except _ReplacedError:
                    lost.set()
                    stop()
                    return

    def _push_journal(self) -> None:
        """A snapshot, where anything was written since the last. Raises `_ReplacedError`."""
        journal = self.local / _JOURNAL
        state = [_stat(journal.with_name(name)) for name in ("journal.sqlite", "journal.sqlite-wal")]
        if state == self._pushed or not journal.exists():
            return
        name = f"journal-{uuid.uuid4().hex}.sqlite"
        with tempfile.TemporaryDirectory(dir=self.local.parent) as folder:
            with closing(sqlite3.connect(journal)) as source, closing(sqlite3.connect(Path(folder, name))) as copy:
                source.backup(copy)
            self._put(Path(folder, name), f"run/{name}")
        try:
            self._require_writer()  # who took over while this went up has a newer one
        except _ReplacedError:
            with contextlib.suppress(OSError):  # that one may have removed it already
                self._fs.rm_file(self._at(f"run/{name}"))
            raise
        self._push_identity()
        self._point_to(name)
        self._pushed = state

    def _push_identity(self) -> None:
        """Only where it is another one: in a repository of the Hub each file that is written is a commit."""
        identity = self.local / _IDENTITY
        if identity.exists() and self._read(_IDENTITY) != json.loads(identity.read_bytes()):
            self._put(identity, _IDENTITY)

    def _point_to(self, journal: str) -> None:
        pointer = {"journal": journal, "time": time.time(), "machine": self._writer["machine"]}
        self._write(_POINTER, pointer)
        self._mine.write_text(json.dumps(pointer))
        for name in self._names():
            if name.startswith("run/journal-") and name != f"run/{journal}":
                self._fs.rm_file(self._at(name))

    def _leave(self, lost: bool, failed: BaseException | None) -> None:
        try:
            with _failures(self.url, "written"):
                if lost:
                    raise self._replaced()
                self._require_writer()
                with self._staying_writer():
                    self._push_all()
                self._fs.rm_file(self._at(_WRITER))
        except _ReplacedError:
            raise
        except StoreError as exc:
            where = f"what was made since then is in {self.local}"
            told = f"{exc}; {where}, and the same command on this machine continues from there"
            if isinstance(failed, CaiError):
                raise type(failed)(f"{failed}; besides: {told}") from exc
            raise StoreError(told) from exc

    def _push_all(self) -> None:
        self._push_journal()
        files = [file for file in sorted(self.local.rglob("*")) if file.is_file()]
        here = [str(file.relative_to(self.local).as_posix()) for file in files]
        here = sorted((name for name in here if not _LOCAL.fullmatch(name)), key=lambda name: (name in _LAST, name))
        gone = [name for name in self._names() if name not in here and not _OWN.fullmatch(name) and name != ".gitattributes"]
        for name in here:
            if name not in _LAST:
                self._put(self.local / name, name)
        for name in gone:
            with contextlib.suppress(FileNotFoundError):  # half of a file that was moved in its place since
                self._fs.rm_file(self._at(name))
        for name in _LAST:
            if name in here:
                self._put(self.local / name, name)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _names(self) -> list[str]:
        """All files there, relative to the URL."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root)
        except FileNotFoundError:
            return []
        return [name.removeprefix(self._root).lstrip("/") for name in found]

    def _read(self, name: str) -> dict[str, Any] | None:
        self._fs.invalidate_cache()
        try:
            value = json.loads(self._fs.cat_file(self._at(name)))
        except (FileNotFoundError, ValueError):  # half written: it is about to be there
            return None
        return value if isinstance(value, dict) else None

    def _write(self, name: str, value: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "value.json")
            file.write_text(json.dumps(value))
            self._put(file, name)

    def _put(self, file: Path, name: str) -> None:
        """Write a file there, on a disk and in a store of objects whole or not at all; servers of files (sftp, smb) may be left
        with half of one."""
        there = self._at(name)
        if not self.url.startswith(("file:", "local:")):
            self._fs.put_file(str(file), there)
            return
        part = f"{there}.{self._writer['id']}.part"  # of one writer, where two machines share the disk
        self._fs.put_file(str(file), part)
        self._fs.mv(part, there)


def _tidy(url: str) -> str:
    """Without slashes at its end, so that one place has one local copy."""
    scheme, _, place = url.partition("://")
    return f"{scheme}://{place.rstrip('/')}"


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    scheme = url.partition("://")[0]
    if re.match(r"\w+://[^/@]*:[^/@]*@", url):
        raise ConfigError("-o: the URL holds a password; give it by the environment or a file of the storage's own instead")
    if scheme in ("http", "https"):
        raise ConfigError(f"-o {url}: {scheme}:// can only be read; expected s3://, gs://, hf://, file://, or a folder here")
    if not url.partition("://")[2].strip("/"):
        raise ConfigError(f"-o {url}: expected a folder there, as in {scheme}://bucket/folder")
    try:
        fs, root = url_to_fs(url, **({"auto_mkdir": True} if scheme in ("file", "local") else {}))
    except ImportError as exc:
        package = _PACKAGES.get(scheme)
        hint = f"pip install {package}" if package else str(exc)
        raise ConfigError(f"-o {url}: {scheme}:// needs a package that is not installed: {hint}") from exc
    except ValueError as exc:
        raise ConfigError(f"-o {url}: {exc}; expected s3://, gs://, hf://, file://, or a folder here") from exc
    return fs, str(root).rstrip("/")


def _adopt(into: Path, source: Path) -> None:
    """Calls that only the local journal has were paid for too, and its batches are under way."""
    if not source.exists():
        return
    with contextlib.suppress(sqlite3.Error), closing(sqlite3.connect(into)) as db:  # a damaged one has none to give
        db.execute("ATTACH ? AS local", (str(source),))
        for table in ("calls", "batches", "batched"):  # an earlier version's journal has no batches
            with contextlib.suppress(sqlite3.Error), db:
                db.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM local.{table}")


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


@contextmanager
def _failures(url: str, what: str) -> Iterator[None]:
    try:
        yield
    except CaiError:
        raise
    except Exception as exc:  # the boundary of storage: each kind raises errors of its own library
        said = " ".join(str(exc).split())[:300]
        raise StoreError(f"{url}: cannot be {what}: {type(exc).__name__}: {said}") from exc

"""Drives many prompts at once, a bounded number in flight; no stage waits for another, and memory stays flat.

Each worker takes the next row, makes its record, stores it. A row that fails goes to the quarantine with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
from collections.abc import Iterator

import msgspec

from cai.errors import CaiError, EngineError, Interrupted, PromptSourceError, RequestError, StoreError
from cai.generation.record import Generator
from cai.generation.tally import Tally
from cai.prompts import Row
from cai.store import Database, Quarantined
from cai.types import Prompt

_REFILL = 1000
"""Finished prompts that are passed over before the event loop gets a turn."""


class Runner:
    """One pass over the rows of a source."""

    def __init__(self, generator: Generator, database: Database, tally: Tally) -> None:
        """`tally.stopping` may be set from anywhere; then the calls in flight finish and no further one is made."""
        self._generator, self._database, self._tally = generator, database, tally
        self._source_error: PromptSourceError | None = None

    async def run(self, rows: Iterator[Row]) -> None:
        """Make a record of every row that has none yet.

        Raises `Interrupted` when it was asked to stop, and `EngineError` or `StoreError` where nothing can go on;
        whatever was finished by then is stored.
        """
        self._database.begin_pass()
        numbered = enumerate(self._readable(rows))
        workers = self._generator.recipe.generation.concurrency
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._work(numbered)) for _ in range(workers)]
                with _on_signals(self._tally, tasks):
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
                    while self._tally.in_flight and not all(task.cancelled() for task in tasks):
                        await asyncio.sleep(0.05)
        except* CaiError as failures:
            raise _first(failures) from None
        if self._source_error:
            raise self._source_error
        if self._tally.stopping:
            raise Interrupted("stopped before the end; the same command continues")

    def _readable(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows up to where the source breaks; what is in flight by then is still finished."""
        try:
            yield from rows
        except PromptSourceError as exc:
            self._source_error = exc

    async def _work(self, numbered: Iterator[tuple[int, Row]]) -> None:
        for position, row in numbered:
            self._tally.read += 1
            if row.prompt is None:
                self._set_aside(position, row, "unreadable row", str(row.error))
            elif self._is_new(position, row, row.prompt):
                await self._one(position, row, row.prompt)
            if self._tally.read % _REFILL == 0:
                await asyncio.sleep(0)
            if self._tally.stopping:
                return

    def _is_new(self, position: int, row: Row, prompt: Prompt) -> bool:
        digest = hashlib.blake2b(msgspec.json.encode(prompt.messages), digest_size=16).digest()
        taken = self._database.claim(position, prompt.id, digest)
        if taken is None:
            kept = self._database.has_record(prompt.id)
            self._tally.records_kept += kept
            return not kept
        if taken == digest:
            self._tally.duplicates += 1
        else:
            self._set_aside(position, row, "id used twice", f"the id '{prompt.id}' belongs to another prompt already")
        return False

    async def _one(self, position: int, row: Row, prompt: Prompt) -> None:
        try:
            record = await self._generator.make_record(prompt)
        except Interrupted:
            return
        except RequestError as exc:
            self._set_aside(position, row, exc.reason, str(exc))
            return
        except (CaiError, OSError):
            raise
        except Exception as exc:  # the boundary of one record: a bug on one row must not lose the others
            self._set_aside(position, row, type(exc).__name__, str(exc))
            return
        self._database.add_record(record)
        self._tally.records_made += 1

    def _set_aside(self, position: int, row: Row, reason: str, detail: str) -> None:
        prompt_id = row.prompt.id if row.prompt else None
        raw = msgspec.json.encode(row.prompt).decode() if row.prompt else row.raw
        self._database.quarantine(Quarantined(position, row.origin, prompt_id, reason, detail, raw))
        self._tally.quarantined[reason] += 1


def _first(failures: ExceptionGroup[CaiError]) -> CaiError:
    """The gravest of what the workers raised."""
    flat = [exc for exc in _flatten(failures) if isinstance(exc, CaiError)]
    return next((exc for exc in flat if isinstance(exc, StoreError | EngineError)), flat[0])


def _flatten(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _flatten(exc)
        else:
            yield exc


@contextlib.contextmanager
def _on_signals(tally: Tally, tasks: list[asyncio.Task[None]]) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) lets calls in flight finish; the second stops at once."""
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if tally.stopping:
            for task in tasks:
                task.cancel()
        tally.stopping = True

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    except (NotImplementedError, ValueError, RuntimeError):  # no handlers on Windows, nor outside the main thread
        yield
        return
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

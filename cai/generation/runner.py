"""Drives many prompts at once, a bounded number in flight; no stage waits for another, and memory stays flat.

Each worker takes the next row, makes its record, stores it. A row that fails goes to the quarantine with its reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from cai.errors import BudgetError, CaiError, EngineError, Interrupted, PromptSourceError, RequestError, StoreError
from cai.generation.tally import Tally
from cai.prompts import Row
from cai.store import Claim, Database, Quarantined
from cai.types import Prompt, Record

_AHEAD = 1000
"""Rows that are read before a worker asks for them."""
_LISTEN = 0.1
"""Seconds between two looks at what another thread asks."""
_DETAIL = 2000
"""Characters that the quarantine keeps of an error's message."""


_Item = tuple[int, Row, Prompt]
"""A row that a record is to be made of: its position, itself, its prompt."""


class RecordMaker(Protocol):
    """Makes records: a `Generator` here, or a fleet of workers on other machines."""

    async def make_record(self, prompt: Prompt, given: tuple[str, ...] = ()) -> Record:
        """As `Generator.make_record`."""
        raise NotImplementedError


class Runner:
    """One pass over the rows of a source."""

    def __init__(self, maker: RecordMaker, database: Database, tally: Tally, at_once: int) -> None:
        """`at_once`: the most prompts in flight; the tally is where the pass says how far it is."""
        self._maker, self._database, self._tally, self._at_once = maker, database, tally, at_once

    async def run(self, rows: Iterator[Row]) -> None:
        """Make a record of every row that has none yet.

        Raises `Interrupted` when it was asked to stop, and `EngineError` or `StoreError` where nothing can go on;
        whatever was finished by then is stored.
        """
        self._database.begin_pass()
        feed = _Feed(rows, self._sift)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._work(feed)) for _ in range(self._at_once)]
                with _on_signals(lambda: self._stop(feed, tasks)):
                    listening = group.create_task(self._listen(feed, tasks))
                    await asyncio.wait(tasks)
                    await self._settle()
                    listening.cancel()
        except BaseExceptionGroup as failures:
            raise _gravest(failures) from None
        finally:
            feed.close()
        if self._tally.spent:
            raise BudgetError(self._tally.spent)
        if self._tally.stopping:
            under_way = self._tally.batches.in_words
            begun = f"; {under_way}: they go on at the server, and the same command fetches them" if under_way else ""
            raise Interrupted(f"stopped before the end; the same command continues{begun}")
        if feed.error:
            raise feed.error

    def _stop(self, feed: _Feed, tasks: list[asyncio.Task[None]]) -> None:
        """At first begin nothing new, so that calls in flight finish; when asked again, stop at once."""
        if self._tally.stopping:
            self._tally.aborted = True
            for task in tasks:
                task.cancel()
        self._tally.stopping = True
        self._tally.batches.stop()
        feed.close()

    async def _listen(self, feed: _Feed, tasks: list[asyncio.Task[None]]) -> None:
        """Hear what another thread asks, where signals do not arrive."""
        heard = 0
        while True:
            while heard < self._tally.stops:
                heard += 1
                self._stop(feed, tasks)
            await asyncio.sleep(_LISTEN)

    async def _settle(self) -> None:
        """Wait for calls whose worker has gone on already, since a call beside them failed: they are paid for."""
        while self._tally.in_flight and not self._tally.aborted:
            await asyncio.sleep(0.02)

    async def _work(self, feed: _Feed) -> None:
        while (item := await feed.next()) and not self._tally.stopping:
            self._tally.read += 1
            await self._one(*item)

    def _sift(self, rows: list[tuple[int, Row]]) -> list[_Item]:
        """Those of the rows that a record is to be made of; the others are dealt with here."""
        readable = []
        for position, row in rows:
            if row.prompt is None:
                self._tally.read += 1
                self._set_aside(position, row, "unreadable row", str(row.error))
            else:
                readable.append((position, row, row.prompt))
        claims = self._database.claim([(position, prompt, row.given) for position, row, prompt in readable])
        return [item for item, claim in zip(readable, claims, strict=True) if not self._is_settled(item, claim)]

    def _is_settled(self, item: _Item, claim: Claim) -> bool:
        position, row, prompt = item
        match claim:
            case "new":
                return False
            case "kept":
                self._tally.records_kept += 1
            case "duplicate":
                self._tally.duplicates += 1
            case "taken":
                self._set_aside(position, row, "id used twice", f"the id '{prompt.id}' belongs to another prompt already")
        self._tally.read += 1
        return True

    async def _one(self, position: int, row: Row, prompt: Prompt) -> None:
        try:
            record = await self._maker.make_record(prompt, row.given)
        except Interrupted:
            return
        except RequestError as exc:
            self._set_aside(position, row, exc.reason, str(exc))
            return
        except CaiError:
            raise
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) and task.cancelling():  # it is this worker that is to stop
                raise
            self._set_aside(position, row, "cancelled", "the engine cancelled a call of this row")
            return
        except Exception as exc:  # the boundary of one record: a bug on one row must not lose the others
            self._set_aside(position, row, type(exc).__name__, str(exc))
            return
        self._database.add_record(record, row.given)
        self._tally.records_made += 1

    def _set_aside(self, position: int, row: Row, reason: str, detail: str) -> None:
        prompt_id = row.prompt.id if row.prompt else None
        raw = msgspec.json.encode(row.prompt).decode() if row.prompt else row.raw
        texts = (_storable(text) for text in (reason, detail[:_DETAIL], raw))
        self._database.quarantine(Quarantined(position, _storable(row.origin), prompt_id, *texts))
        self._tally.quarantined[reason] += 1


class _Feed:
    """Rows that a record is to be made of, read a little ahead in a thread: a slow pipe or Hub holds up nothing.

    All rows that are read by the time the loop looks are sifted together: of a run that is continued most are done.
    """

    def __init__(self, rows: Iterator[Row], sift: Callable[[list[tuple[int, Row]]], list[_Item]]) -> None:
        self._loop, self._sift = asyncio.get_running_loop(), sift
        self._queue: asyncio.Queue[_Item | None] = asyncio.Queue()
        self._room = threading.Semaphore(_AHEAD)
        self._taken = 0
        self._ready: deque[tuple[int, Row] | None] = deque()
        self._announced = self._closed = False
        self.error: Exception | None = None
        threading.Thread(target=self._read, args=(rows,), daemon=True).start()

    async def next(self) -> _Item | None:
        """The next row; None at the end, which is also where the source or the store broke (then `error` says how)."""
        item = await self._queue.get()
        if item is None:
            self._queue.put_nowait(None)
        else:
            self._make_room(1)
        return item

    def _make_room(self, rows: int) -> None:
        """Wake the reading thread for a quarter of the rows at a time: for each row that would cost more than the row."""
        self._taken += rows
        if self._taken >= _AHEAD // 4:
            self._room.release(self._taken)
            self._taken = 0

    def close(self) -> None:
        """Wake up all that wait for a row; no further one is read."""
        self._closed = True
        self._room.release()
        self._queue.put_nowait(None)

    def _read(self, rows: Iterator[Row]) -> None:
        try:
            for item in enumerate(rows):
                self._room.acquire()
                if self._closed:
                    return
                self._hand_over(item)
        except PromptSourceError as exc:
            self.error = exc
        except BaseException as exc:  # the boundary of a source: libraries that are not ours, and what Rust panics with
            self.error = PromptSourceError(f"reading the prompts stopped: {type(exc).__name__}: {exc}")
        finally:  # or the workers would wait for ever
            self._hand_over(None)

    def _hand_over(self, item: tuple[int, Row] | None) -> None:
        """Wake the loop once for all rows that are read before it comes to take them."""
        self._ready.append(item)
        if not self._announced:
            self._announced = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._announced = False  # at first, so that a row that comes now is announced again
        rows = []
        while self._ready:
            rows.append(self._ready.popleft())
        read = [row for row in rows if row is not None]
        if not self._closed:
            try:
                new = self._sift(read)
            except Exception as exc:  # the boundary of a callback: the loop would log it, and the workers wait for ever
                self.error = exc
                self.close()
                return
            self._make_room(len(read) - len(new))
            for item in new:
                self._queue.put_nowait(item)
        if len(read) < len(rows):
            self._queue.put_nowait(None)


def _storable(text: str) -> str:
    """Without lone surrogates, which a file name or another's error message may hold and no database takes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _gravest(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """What the run is said to have failed of, among all that its workers raised."""
    flat = list(_flatten(failures))
    for kind in (StoreError, EngineError, CaiError):
        for exc in flat:
            if isinstance(exc, kind):
                return exc
    return flat[0]


def _flatten(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _flatten(exc)
        else:
            yield exc


@contextlib.contextmanager
def _on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` on Ctrl-C and on SIGTERM, as often as they come; then the handlers are again what they were."""
    loop, before = asyncio.get_running_loop(), {}
    with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):  # on Windows; outside the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, stop)
            before[number] = handler
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)

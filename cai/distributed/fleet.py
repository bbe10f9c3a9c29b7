"""The driver's side: rows become blocks, outcomes go into the journal, which is written here and nowhere else.

To a `Runner`, a fleet is what a `Generator` is: it makes records. A block is finished when its outcome is in the journal;
until then a cluster may do it again, and only one outcome counts.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import msgspec

from cai import errors
from cai.distributed.jobs import Block, Item, Outcome, RowOutcome, decode_outcome, encode
from cai.errors import CaiError, EngineError, Interrupted, RequestError, StoreError
from cai.generation import Tally
from cai.prompts import Row
from cai.store import Database
from cai.types import Prompt, Record

_LOOK = 0.1
"""Seconds between two looks whether the rows have ended, or whether to stop."""
_GATHER = 0.05
"""Seconds that a block waits for more rows."""
_LEAVE = 30.0
"""Seconds that a cluster has to come to its end when there is nothing more to do, or nothing more can be done."""


class Cluster(Protocol):
    """Workers that blocks are handed to."""

    def outcomes(self) -> Iterator[bytes]:
        """The encoded outcome of each block, as they come; ends after `end`. Raises `EngineError`. Blocks; for a thread."""

    async def put(self, number: int, block: bytes) -> None:
        """Hand over a block, by its number."""

    async def done(self, number: int) -> None:
        """This block's outcome is kept, so that nobody needs it any more."""

    async def stop(self) -> None:
        """No worker begins a call any more."""

    async def end(self) -> None:
        """There are no more blocks."""


class Fleet:
    """Makes records on a cluster."""

    def __init__(self, cluster: Cluster, database: Database, tally: Tally, block_rows: int) -> None:
        """`block_rows`: the most rows of a block."""
        self._cluster, self._database, self._tally, self._block_rows = cluster, database, tally, block_rows
        self._waiting: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._out: dict[int, list[_Waiting]] = {}
        self._unsent = 0
        self._number = 0
        self._rows_read: int | None = None
        self._broken: CaiError | None = None
        self._fatal = False
        self._over = asyncio.Event()

    def counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The same rows; so it is known here when they have ended."""
        count = 0
        try:
            for row in rows:
                count += 1
                yield row
        finally:
            self._rows_read = count

    async def make_record(self, prompt: Prompt, given: tuple[str, ...] = ()) -> Record:
        """As a `Generator` makes it, on a worker. Raises as that does, and `EngineError` where the cluster fails."""
        if self._broken:
            raise self._broken
        if self._tally.stopping:
            raise Interrupted("stopping")
        waiting = _Waiting(Item(prompt, given))
        self._waiting.put_nowait(waiting)
        self._unsent += 1
        self._tally.in_flight += 1
        try:
            return await waiting.answer
        finally:
            self._tally.in_flight -= 1

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block runs, rows are handed out and outcomes come in.

        Where a worker ended the run, the others' calls in flight finish and are kept.
        """
        threading.Thread(target=self._receive, args=(asyncio.get_running_loop(),), daemon=True).start()
        tasks = [asyncio.create_task(self._guarded(one())) for one in (self._cut, self._attend)]
        try:
            yield
            if not self._tally.aborted and not self._broken:
                await self._leave()
        except CaiError:
            if self._fatal and not self._tally.aborted:
                with suppress(Exception):  # why the run ends is known already
                    await self._cluster.stop()
                    await self._leave()
            raise
        finally:
            for task in tasks:
                task.cancel()

    async def _leave(self) -> None:
        """Receive what is still to come."""
        await self._cluster.end()
        with suppress(TimeoutError):
            async with asyncio.timeout(_LEAVE):
                await self._over.wait()

    async def _guarded(self, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        except asyncio.CancelledError:
            raise
        except Exception as exc:  # the boundary of a task that nobody awaits: the rows that wait have to hear of it
            self._break(exc if isinstance(exc, CaiError) else EngineError(f"the cluster failed: {exc}"))

    async def _cut(self) -> None:
        """Cut what waits into blocks: full ones, or smaller ones where rows come slowly."""
        while True:
            block = [await self._waiting.get()]
            try:
                async with asyncio.timeout(_GATHER):
                    while len(block) < self._block_rows:
                        block.append(await self._waiting.get())
            except TimeoutError:
                pass
            self._number += 1
            self._out[self._number] = block
            await self._cluster.put(self._number, encode(Block(self._number, [one.item for one in block])))
            self._unsent -= len(block)

    async def _attend(self) -> None:
        """Tell the cluster when to stop, and when there is nothing more to come."""
        while not self._tally.stopping and not (self._rows_read is not None and self._tally.read >= self._rows_read):
            await asyncio.sleep(_LOOK)
        if self._tally.stopping:
            await self._cluster.stop()
        while self._unsent:
            await asyncio.sleep(_LOOK)
        await self._cluster.end()
        while not self._tally.stopping:
            await asyncio.sleep(_LOOK)
        await self._cluster.stop()

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: what the cluster sends, handed to the loop."""

        def hand_over(function: Callable[..., None], value: object) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(function, value)

        try:
            for encoded in self._cluster.outcomes():
                hand_over(self._take, encoded)
        except CaiError as exc:
            hand_over(self._break, exc)
        except Exception as exc:  # the boundary of the cluster's library
            hand_over(self._break, EngineError(f"the cluster failed: {type(exc).__name__}: {exc}; the same command continues"))
        else:
            hand_over(self._left, None)
        finally:
            hand_over(lambda _: self._over.set(), None)

    def _take(self, encoded: bytes) -> None:
        outcome = decode_outcome(encoded)
        block = self._out.pop(outcome.number, None)
        if block is None:  # a block that was done twice, since a worker died before it could hand over the first outcome
            return
        try:
            self._keep(outcome)
        except StoreError as exc:
            self._break(exc)
            return
        error = _error(*outcome.fatal) if outcome.fatal else Interrupted("stopping")
        for one, row in zip(block, outcome.rows, strict=True):
            one.end(row, error)
        if outcome.fatal:
            self._fatal = True
            self._break(error)
        self._last = asyncio.create_task(self._guarded(self._cluster.done(outcome.number)))

    def _keep(self, outcome: Outcome) -> None:
        """All calls of a block in one transaction; the runner then stores the records."""
        self._database.add_calls(outcome.calls)
        self._tally.calls_made += len(outcome.calls)
        self._tally.calls_replayed += outcome.replayed
        self._tally.prompt_tokens += sum(call.prompt_tokens for call in outcome.calls)
        self._tally.completion_tokens += sum(call.completion_tokens for call in outcome.calls)

    def _break(self, error: CaiError) -> None:
        """Nothing can go on: every row that waits hears why."""
        self._broken = self._broken or error
        for one in [one for block in self._out.values() for one in block]:
            one.fail(self._broken)
        while not self._waiting.empty():
            self._waiting.get_nowait().fail(self._broken)

    def _left(self, _: object) -> None:
        if self._out:
            self._break(EngineError(f"the cluster ended without {len(self._out)} of the blocks; the same command continues"))


class _Waiting:
    """A row on its way: to a worker and back."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.answer: asyncio.Future[Record] = asyncio.get_running_loop().create_future()

    def end(self, row: RowOutcome, otherwise: CaiError) -> None:
        """Answer with what became of it, and with `otherwise` where nothing did."""
        if self.answer.done():  # the run was told to stop at once
            return
        if row.record is not None:
            self.answer.set_result(msgspec.json.decode(row.record, type=Record))
        elif row.reason is not None:
            failure = RequestError(row.detail)
            failure.reason = row.reason
            self.answer.set_exception(failure)
        else:
            self.answer.set_exception(otherwise)

    def fail(self, error: CaiError) -> None:
        """Answer with an error after which nothing goes on."""
        if not self.answer.done():
            self.answer.set_exception(error)


def _error(kind: str, message: str) -> CaiError:
    """The error that an outcome tells of."""
    found = getattr(errors, kind, None)
    return found(message) if isinstance(found, type) and issubclass(found, CaiError) else EngineError(message)

"""What the journal has of a row already: its record, or the calls to send along so that no worker makes them again.

Which calls a row needs is known only by going through it, so the same coroutine runs here, on engines that answer from
the journal and stop at the first call that is not there. It has a thread, a loop and a connection of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cai.errors import Interrupted
from cai.generation import Generator, Tally
from cai.store import Call, Database
from cai.types import Prompt, Record


class Found:
    """A journal that notes what is found in it, and takes nothing."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.calls: dict[bytes, bytes] = {}
        """By key, what was found since this was last emptied."""

    def call_results(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """Those of them that are in the journal."""
        found = self._database.call_results(keys)
        self.calls |= found
        return found

    def add_calls(self, calls: list[Call]) -> None:
        """Never reached: no call is made here."""
        raise AssertionError(f"{len(calls)} calls were made in a replay")


class Replay:
    """Looks up rows one at a time."""

    def __init__(self, journal: Path, generator: Callable[[Found, Tally], Generator]) -> None:
        """`generator` makes one on engines that are journaled in what it is given."""
        self._journal, self._make = journal, generator
        self._thread = ThreadPoolExecutor(1, "replay")
        self._ready: tuple[asyncio.Runner, Database, Found, Generator] | None = None
        self.tally = Tally(stopping=True)
        """With this, a call that is not in the journal raises `Interrupted`."""

    async def of(self, prompt: Prompt, given: tuple[str, ...]) -> tuple[Record | None, list[Call]]:
        """The record, where every call of it is in the journal; else None and those that are. Raises what the row raises."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._look_up, prompt, given)

    def _look_up(self, prompt: Prompt, given: tuple[str, ...]) -> tuple[Record | None, list[Call]]:
        if self._ready is None:
            database = Database(self._journal)
            found = Found(database)
            self._ready = asyncio.Runner(), database, found, self._make(found, self.tally)
        runner, _, found, generator = self._ready
        found.calls = {}
        self.tally.calls_replayed = 0
        record = runner.run(_attempt(generator, prompt, given))
        return record, [Call(key, "", 0, 0, result) for key, result in found.calls.items()]

    def close(self) -> None:
        """Give the connection back."""
        self._thread.submit(self._close).result()
        self._thread.shutdown()

    def _close(self) -> None:
        if self._ready is not None:
            runner, database, *_ = self._ready
            runner.close()
            database.close()


async def _attempt(generator: Generator, prompt: Prompt, given: tuple[str, ...]) -> Record | None:
    try:
        return await generator.make_record(prompt, given)
    except Interrupted:
        return None
    finally:  # calls beside the one that was missing may be in the journal too
        while beside := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(beside)

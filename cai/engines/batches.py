"""Calls in batches: gathered, handed over, waited for, and each given its answer; see `batch_api.py` for what is sent.

What is gathered becomes a batch when nothing new has come for `server.batch_wait` seconds. A call's `custom_id` is a hash of
URL, path and body. The run's database notes a batch and its calls before it is created, under a name that is also in the
batch's metadata: so a run that was killed at any point finds the batch again, waits for it, and pays for no call twice.
A line means what the same answer to a single call means; what can succeed goes into the next batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from asyncio import Future
from collections.abc import Callable, Coroutine, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt, wait_exponential

from cai.engines.base import BatchWork
from cai.engines.batch_api import BatchApi, Look, encode_line
from cai.engines.http import FAILING, UNREADABLE, Client, Post
from cai.engines.replies import Transient
from cai.errors import CaiError, EngineError, Interrupted, RequestError, VerdictError
from cai.servers import ServerConfig
from cai.store import Batch, Database

Answer = TypeVar("Answer")
_MOST_LINES, _MOST_BYTES = 50_000, 90_000_000
"""Of one batch; OpenAI takes 50,000 lines, and 100 MB at least."""
_AROUND = 160
"""Bytes of a line around its body."""
_GROWTH, _LONGEST = 1.5, 12
"""Each pause between two looks is so much longer than the last, up to so many times the first."""
_LOOKS = 5
"""How often a file of answers is looked for that a batch names and the server does not have yet."""


class _Line:
    """A call, and who waits for what is read from its answer."""

    def __init__(self, custom_id: str, call: Post) -> None:
        self.custom_id, self.call = custom_id, call
        self.waiting: list[tuple[Callable[[Any], Any], Future[Any]]] = []
        self.looked_up = False
        self.failed = self.unreadable = 0

    @property
    def is_wanted(self) -> bool:
        """Whether anybody still waits."""
        return any(not answer.done() for _, answer in self.waiting)

    def settle(self, said: Any) -> None:
        """Give all that wait what they read. Raises `Transient` where one cannot; that one goes on waiting."""
        problem = None
        for read, answer in self.waiting:
            if answer.done():
                continue
            try:
                answer.set_result(read(said))
            except Transient as exc:
                problem = exc
            except CaiError as exc:
                answer.set_exception(exc)
        if problem:
            raise problem

    def fail(self, problem: Exception) -> None:
        """Tell all that wait."""
        for _, answer in self.waiting:
            if not answer.done():
                answer.set_exception(problem)


class Batches:
    """Gathers the calls of one model. Belongs to the event loop in which it is first used."""

    def __init__(self, client: Client, config: ServerConfig) -> None:
        """Calls go to the client's first URL."""
        self._client, self._api = client, BatchApi(client)
        self._config, self._base = config, client.endpoints[0].base
        self._database: Database | None = None
        self._work = BatchWork()
        self._lines: dict[str, _Line] = {}
        self._gathered: list[_Line] = []
        self._bytes, self._latest = 0, 0.0
        self._gathering: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken: CaiError | None = None
        self._last_problem = ""
        self._under_way = 0

    def keep(self, database: Database, work: BatchWork) -> None:
        """Note batches there; say there how far they are."""
        self._database, self._work = database, work
        work.on_stop(lambda: self._break(Interrupted("stopped; batches go on at the server")))

    @property
    def _log(self) -> Database:
        """The run's database; without a run one in memory."""
        if self._database is None:
            self._database = Database(Path(":memory:"))
        return self._database

    async def post(self, call: Post, read: Callable[[Any], Answer]) -> Answer:
        """What `read` makes of the answer, in hours perhaps. Raises as `Client.post`, and `Interrupted`."""
        if self._broken:
            raise self._broken
        custom_id = hashlib.sha256(f"{self._base}\n{call.path}\n".encode() + call.body).hexdigest()[:32]
        answer: Future[Answer] = asyncio.get_running_loop().create_future()
        line = self._lines.get(custom_id)
        if line is None:
            line = self._lines[custom_id] = _Line(custom_id, call)
            self._gather(line)
        line.waiting.append((read, answer))
        return await answer

    # -- gathering ------------------------------------------------------------------------------------------------------

    def _gather(self, line: _Line) -> None:
        size = len(line.call.body) + _AROUND
        if len(self._gathered) >= _MOST_LINES or self._bytes + size > _MOST_BYTES:
            self._flush()
        self._gathered.append(line)
        self._bytes += size
        self._latest = asyncio.get_running_loop().time()
        if self._gathering is None:
            self._gathering = asyncio.ensure_future(self._when_quiet())

    async def _when_quiet(self) -> None:
        loop = asyncio.get_running_loop()
        while (left := self._latest + self._config.batch_wait - loop.time()) > 0:
            await asyncio.sleep(left)
        self._gathering = None
        self._flush()

    def _flush(self) -> None:
        """One batch for each path; calls that were handed over before are looked for first."""
        gathered, self._gathered, self._bytes = self._gathered, [], 0
        lines = [line for line in gathered if line.is_wanted]
        for line in gathered:
            if not line.is_wanted:
                self._lines.pop(line.custom_id, None)
        try:
            known = self._log.find_batches([line.custom_id for line in lines if not line.looked_up])
        except CaiError as exc:  # a timer may run this: nobody else would hear of it
            self._break(exc)
            return
        earlier: dict[Batch, list[_Line]] = {}
        new: dict[str, list[_Line]] = {}
        for line in lines:
            line.looked_up = True
            batch = known.get(line.custom_id)
            (earlier.setdefault(batch, []) if batch else new.setdefault(line.call.path, [])).append(line)
        for batch, some in earlier.items():
            self._start(self._resume(batch, some))
        for path, some in new.items():
            self._start(self._submit(path, some))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        async def run() -> None:
            try:
                await work
            except CaiError as exc:
                self._break(exc)
            except Exception as exc:  # the boundary of a batch: whoever waits for it would wait for ever
                self._break(EngineError(f"a batch failed: {type(exc).__name__}: {self._client.quoted(exc)}"))

        task = asyncio.ensure_future(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _break(self, problem: CaiError) -> None:
        """All that wait fail, and so does what comes."""
        if isinstance(problem, RequestError):
            problem = EngineError(f"{problem}; the same command continues")
        self._broken = self._broken or problem
        lines, self._lines, self._gathered = self._lines, {}, []
        for line in lines.values():
            line.fail(self._broken)

    # -- from the file to the answers -----------------------------------------------------------------------------------

    async def _submit(self, path: str, lines: list[_Line]) -> None:
        if self._broken:
            return
        name = uuid.uuid4().hex
        file = await self._api.upload(b"".join(encode_line(line.custom_id, line.call) for line in lines))
        self._log.add_batch(Batch(name, path, "", "intended"), [line.custom_id for line in lines])
        remote = await self._api.create(name, path, file)
        self._log.update_batch(name, remote, "created")
        batch = Batch(name, path, remote, "created")
        look = await self._wait(batch, len(lines), self._config.batch_poll)
        if look is None:
            raise EngineError(f"the server does not know batch {remote} any more; the same command hands its calls over again")
        if look.status == "failed":
            self._log.drop_batch(name)
            if look.is_too_much and (self._under_way or len(lines) > 1):
                await self._submit_less(path, lines)
                return
            raise EngineError(f"the server refuses batch {remote}: {look.problems}; mend that, then the same command continues")
        good = await self._read(batch, look, lines, final=True)
        self._log.update_batch(name, remote, "ended")
        waiting = any(line.is_wanted for line in lines)
        if look.status == "cancelled" and waiting:
            raise EngineError(f"batch {remote} was cancelled at the server; the same command asks again for what is left")
        if not (good or waiting) and len(lines) >= FAILING:
            raise EngineError(f"all {len(lines):,} calls of batch {remote} failed, the last of them: {self._last_problem}")

    async def _submit_less(self, path: str, lines: list[_Line]) -> None:
        """The server takes no more for now: later, when others of our batches have ended; else in halves, one after another."""
        if self._under_way:
            await asyncio.sleep(_LONGEST * self._config.batch_poll)
            for line in lines:
                self._gather(line)
            return
        half = len(lines) // 2
        await self._submit(path, lines[:half])
        await self._submit(path, lines[half:])

    async def _resume(self, batch: Batch, lines: list[_Line]) -> None:
        """Calls that were handed over before, perhaps by a process that was killed; what failed there is asked anew."""
        remote = batch.remote or await self._api.find(batch.name)
        if remote and not batch.remote:
            self._log.update_batch(batch.name, remote, "created")
        batch = batch._replace(remote=remote or "")
        look = await self._wait(batch, len(lines), 0) if remote else None
        if look is None or look.status == "failed":
            self._log.drop_batch(batch.name)
            for line in lines:
                self._gather(line)
            return
        await self._read(batch, look, lines, final=False)
        self._log.update_batch(batch.name, batch.remote, "ended")

    async def _wait(self, batch: Batch, calls: int, first: float) -> Look | None:
        """The batch when it has ended; None where the server does not know it."""

        async def look() -> Look | None:
            seen = await self._api.look(batch.remote)
            if seen:
                self._work.note(batch.name, max(calls, seen.total), seen.finished)
            return seen

        self._work.note(batch.name, calls, 0)
        looking = AsyncRetrying(
            wait=self._pauses(), retry=retry_if_result(lambda seen: seen is not None and not seen.has_ended)
        )
        self._under_way += 1
        try:
            await asyncio.sleep(first)
            ended: Look | None = await looking(look)
        finally:
            self._under_way -= 1
        self._work.ended(batch.name)
        return ended

    def _pauses(self) -> wait_exponential:
        pause = self._config.batch_poll
        return wait_exponential(multiplier=pause * _GROWTH, exp_base=_GROWTH, max=_LONGEST * pause)

    async def _answers(self, batch: Batch, look: Look) -> Iterable[dict[str, Any]]:
        """What is in a batch's files. Raises `EngineError` where one is not there, once: next time it answers no call."""
        looking = AsyncRetrying(
            wait=self._pauses(),
            retry=retry_if_result(lambda found: found is None),
            stop=stop_after_attempt(_LOOKS),
            retry_error_callback=lambda _: None,
        )
        found: list[Iterable[dict[str, Any]] | None] = [await looking(self._api.answers, file) for file in look.files]
        if None in found and batch.status not in ("missing", "ended"):
            self._log.update_batch(batch.name, batch.remote, "missing")
            raise EngineError(
                f"batch {batch.remote} is {look.status}, and the server has no file of its answers (HTTP 404); the same "
                "command looks again, and hands its calls over anew where the file is still not there"
            )
        return chain.from_iterable(lines for lines in found if lines is not None)

    async def _read(self, batch: Batch, look: Look, lines: list[_Line], final: bool) -> int:
        """Give each line its answer; those that have none, and can have one, go into the next batch. How many were good.

        A failure is `final` where this process handed the batch over.
        """
        good, left = 0, {line.custom_id: line for line in lines}
        for answered in await self._answers(batch, look):
            if line := left.pop(str(answered.get("custom_id")), None):
                good += self._settle(line, answered, final)
        if look.status != "cancelled" or not final:
            for line in left.values():
                self._again(line, Transient(f"the batch is {look.status} and has no answer to this call"), final)
        return good

    def _settle(self, line: _Line, answered: dict[str, Any], final: bool) -> bool:
        try:
            line.settle(self._api.body(answered, line.call.path))
        except Transient as exc:
            self._again(line, exc, final)
        except CaiError as exc:
            if not final:
                self._gather(line)
            elif isinstance(exc, RequestError):
                self._give_up(line, exc)
            else:
                raise
        else:
            self._lines.pop(line.custom_id, None)
            return True
        return False

    def _again(self, line: _Line, problem: Transient, final: bool) -> None:
        """Into the next batch, as often as the recipe says."""
        line.failed += final
        line.unreadable += final and problem.kind == "no numbers"
        if line.failed <= self._config.retries and line.unreadable < UNREADABLE:
            self._gather(line)
            return
        kind = VerdictError if problem.kind == "no numbers" else RequestError
        self._give_up(line, kind(f"{self._client.quoted(problem)}; tried {line.failed} times"))

    def _give_up(self, line: _Line, problem: RequestError) -> None:
        self._lines.pop(line.custom_id, None)
        line.fail(problem)
        self._last_problem = str(problem)

    async def close(self) -> None:
        """Wait for nothing more; what was handed over goes on."""
        tasks = [*self._tasks, *([self._gathering] if self._gathering else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for line in self._lines.values():
            for _, answer in line.waiting:
                answer.cancel()
        self._lines.clear()

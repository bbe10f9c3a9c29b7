"""The runner: bounded, in order, one bad row at a time; what stops it, and what it has stored by then."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cai.config import Recipe
from cai.constitution import load_constitution
from cai.engines import ChoiceRequest, GenerateRequest, ScriptedEngine
from cai.errors import ConfigError, ContextLengthError, EngineError, Interrupted, PromptSourceError, RowError, StoreError
from cai.generation import Generator, JournaledEngine, Runner, Tally
from cai.judging.choice import ChoiceJudge
from cai.prompts import Row
from cai.seeds import derive_seed
from cai.store import Database
from cai.types import Message, Prompt
from tests.runs import recipe, wait_until
from tests.scripted import respond

RECIPE = recipe()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "journal.sqlite")
    yield database
    database.close()


def row(number: int, text: str = "", prompt_id: str | None = None) -> Row:
    prompt = Prompt(prompt_id or f"p{number}", (Message("user", text or f"question {number}"),))
    return Row(f"file:{number}", prompt, None, "")


class Pass:
    """One pass of the runner over some rows, and what it counted."""

    def __init__(self, database: Database, function: Callable[[Any], Any] = respond, recipe: Recipe = RECIPE) -> None:
        self.database, self.tally = database, Tally()
        engine = JournaledEngine(ScriptedEngine(function), database, "policy", self.tally)
        constitution = load_constitution(recipe.constitution)
        self.generator = Generator(recipe, constitution, engine, ChoiceJudge(engine, recipe.judge, constitution))

    async def run(self, rows: Iterable[Row]) -> Tally:
        at_once = self.generator.recipe.generation.concurrency
        await Runner(self.generator, self.database, self.tally, at_once).run(iter(rows))
        return self.tally

    async def fails(self, rows: Iterable[Row], error: type[BaseException]) -> str:
        with pytest.raises(error) as caught:
            await self.run(rows)
        return str(caught.value)


def ids(database: Database) -> list[str]:
    return [record.prompt.id for record in database.records()]


def reasons(database: Database) -> dict[str, str]:
    return {row.origin: row.reason for row in database.quarantined()}


# --- the way of the rows


async def test_every_row_becomes_a_record_and_is_kept_the_next_time(database):
    rows = [row(number) for number in range(7)]
    tally = await Pass(database).run(rows)
    assert ids(database) == [f"p{number}" for number in range(7)]
    assert (tally.read, tally.records_made, tally.done) == (7, 7, 7)
    again = await Pass(database).run(reversed(rows))
    assert (again.records_made, again.records_kept, again.calls_made, again.calls_replayed) == (0, 7, 0, 0)
    assert ids(database) == [f"p{number}" for number in reversed(range(7))]


async def test_no_rows_are_no_error_here(database):
    tally = await Pass(database).run([])
    assert (tally.read, tally.done) == (0, 0)


@pytest.mark.parametrize("concurrency", [1, 3, 50])
async def test_no_more_prompts_are_in_flight_than_may_be(database, concurrency):
    flying: set[str] = set()
    most = 0

    async def function(request: Any) -> Any:
        nonlocal most
        if isinstance(request, GenerateRequest):
            name = next(message.content for message in reversed(request.messages) if message.content.startswith("question"))
            flying.add(name)
            most = max(most, len(flying))
            await asyncio.sleep(0.001)
            flying.discard(name)
        return respond(request)

    await Pass(database, function, recipe(generation={"concurrency": concurrency})).run(row(number) for number in range(12))
    assert most == min(concurrency, 12)


async def test_no_prompt_waits_for_a_slow_one(database):
    slow = asyncio.Event()

    async def function(request: Any) -> Any:
        if isinstance(request, GenerateRequest) and request.messages[0].content == "question 0":
            await slow.wait()
        return respond(request)

    running = Pass(database, function, recipe(generation={"concurrency": 2, "exemplars": 0}))
    task = asyncio.create_task(running.run(row(number) for number in range(6)))
    while running.tally.records_made < 5:
        await asyncio.sleep(0.001)
    slow.set()
    await task
    assert ids(database)[0] == "p0", "records come in the order of the prompts, not of their ends"


async def test_a_prompt_with_one_id_and_text_twice_is_a_duplicate_and_with_another_text_set_aside(database):
    rows = [row(0), row(1), row(2, "question 0", "p0"), row(3, "another", "p1"), row(4)]
    tally = await Pass(database).run(rows)
    assert (tally.duplicates, dict(tally.quarantined), tally.done) == (1, {"id used twice": 1}, 5)
    assert ids(database) == ["p0", "p1", "p4"]
    [aside] = database.quarantined()
    assert (aside.position, aside.origin, aside.prompt_id) == (3, "file:3", "p1")
    assert "the id 'p1' belongs to another prompt already" in aside.detail
    assert '"content":"another"' in aside.row


async def test_a_prompt_whose_text_changed_is_made_anew(database):
    await Pass(database).run([row(0), row(1)])
    tally = await Pass(database).run([row(0), row(1, "changed")])
    assert (tally.records_kept, tally.records_made) == (1, 1)
    assert [record.prompt.messages[0].content for record in database.records()] == ["question 0", "changed"]


# --- rows that fail


async def test_rows_that_fail_are_set_aside_with_their_reasons_and_the_others_go_on(database):
    def function(request: Any) -> Any:
        text = request.messages[0].content
        if "broken" in text:
            raise KeyError("a bug on one row")
        if "file" in text:
            raise FileNotFoundError(2, "No such file", "x")
        if "long" in text:
            raise ContextLengthError("needs 9000 tokens")
        if "surrogate" in text:
            raise ValueError("a message with \ud800")
        return respond(request)

    rows = [row(0), row(1, "broken"), row(2, "file"), row(3, "long"), row(4, "surrogate"), row(5)]
    rows.insert(3, Row("odd \udcff name:9", None, RowError("no prompt"), "{'a': 1}"))
    tally = await Pass(database, function, recipe(generation={"exemplars": 0})).run(rows)
    assert ids(database) == ["p0", "p5"]
    assert reasons(database) == {
        "file:1": "KeyError",
        "file:2": "FileNotFoundError",
        "odd \\udcff name:9": "unreadable row",
        "file:3": "too long for the context",
        "file:4": "ValueError",
    }
    assert (tally.quarantined.total(), tally.done) == (5, 7)


async def test_a_call_that_the_engine_cancels_takes_its_row_only(database):
    async def function(request: Any) -> Any:
        if request.messages[0].content == "cancelled":
            closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            closed.cancel()
            return await closed
        return respond(request)

    tally = await Pass(database, function, recipe(generation={"concurrency": 1})).run([row(0), row(1, "cancelled"), row(2)])
    assert (reasons(database), ids(database), tally.done) == ({"file:1": "cancelled"}, ["p0", "p2"], 3)


async def test_an_endless_message_is_cut_in_the_quarantine(database):
    def function(request: Any) -> Any:
        raise ValueError("x" * 10_000_000)

    await Pass(database, function).run([row(0)])
    [aside] = database.quarantined()
    assert len(aside.detail) == 2000


async def test_a_row_that_failed_is_tried_again_and_what_it_finished_is_not_paid_for_again(database):
    def fails_to_judge(request: Any) -> Any:
        return [float("nan"), 0.0] if isinstance(request, ChoiceRequest) else respond(request)

    tally = await Pass(database, fails_to_judge).run([row(0)])
    assert (dict(tally.quarantined), tally.calls_made) == ({"no verdict": 1}, 5)
    again = await Pass(database).run([row(0)])
    assert (again.records_made, again.calls_made, again.calls_replayed) == (1, 8, 5)
    assert list(database.quarantined()) == []


async def test_calls_beside_the_one_that_failed_are_finished_and_kept(database):
    async def function(request: Any) -> Any:
        if request.seed == seeds[0]:
            raise ValueError("one of three candidates")
        await asyncio.sleep(0.1)
        seen.append(request.seed)
        return respond(request)

    asked = recipe(generation={"candidates": 3, "pairs": "samples", "rounds": 0})
    seen: list[int] = []
    seeds = [derive_seed(0, "p0", "answer", number) for number in range(3)]
    tally = await Pass(database, function, asked).run([row(0)])
    assert sorted(seen) == sorted(seeds[1:])
    assert (tally.calls_made, tally.in_flight, database.count_calls()) == (2, 0, 2)


# --- what stops the run


@pytest.mark.parametrize(
    ("error", "message"), [(EngineError, "out of memory"), (ConfigError, "no chat template"), (StoreError, "disk is full")]
)
async def test_what_no_further_row_can_survive_stops_the_run(database, error, message):
    async def function(request: Any) -> Any:
        await asyncio.sleep(0.001)
        if isinstance(request, ChoiceRequest):
            raise error(message)
        return respond(request)

    running = Pass(database, function)
    assert await running.fails((row(number) for number in range(100)), error) == message
    assert running.tally.read < 10
    assert database.count_calls() > 0
    assert list(database.quarantined()) == [], "the rows are not to blame"
    assert (await Pass(database).run([row(0)])).calls_replayed == 5


async def test_the_gravest_of_several_failures_is_told(database):
    errors = iter([ConfigError("a recipe"), EngineError("an engine"), StoreError("a disk")])

    async def function(_: Any) -> Any:
        error = next(errors, None) or ConfigError("more")
        try:
            await asyncio.sleep(0.01)
        finally:
            raise error

    assert await Pass(database, function).fails([row(number) for number in range(4)], StoreError) == "a disk"


async def test_a_full_journal_stops_the_run_and_the_same_pass_continues(database):
    await Pass(database).run([row(0)])
    pages = database._db.execute("PRAGMA page_count").fetchone()[0]
    database._db.execute(f"PRAGMA max_page_count={pages + 4}")
    message = await Pass(database).fails([row(number) for number in range(50)], StoreError)
    assert "full; free some space, then the same command continues" in message
    database._db.execute("PRAGMA max_page_count=1000000")
    kept = database.count_calls()
    tally = await Pass(database).run([row(number) for number in range(50)])
    assert tally.calls_made == database.count_calls() - kept
    assert len(ids(database)) == 50


class Panic(BaseException):
    """What a library in Rust raises."""


def broken_after(count: int, error: BaseException) -> Iterator[Row]:
    yield from (row(number) for number in range(count))
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PromptSourceError("file: cut short"), "file: cut short"),
        (ConnectionResetError(104, "reset by peer"), r"reading the prompts stopped: ConnectionResetError: \[Errno 104\]"),
        (RuntimeError("a library's"), "reading the prompts stopped: RuntimeError: a library's"),
        (Panic("index out of bounds"), "reading the prompts stopped: Panic: index out of bounds"),
    ],
)
async def test_where_the_source_breaks_what_was_read_is_finished(database, error, message):
    with pytest.raises(PromptSourceError, match=message):
        await asyncio.wait_for(Pass(database).run(broken_after(5, error)), 20)
    assert len(ids(database)) == 5


async def test_a_source_that_makes_us_wait_holds_up_no_call(database):
    gate = threading.Event()

    def rows() -> Iterator[Row]:
        yield row(0)
        assert gate.wait(20)
        yield row(1)

    running = Pass(database)
    task = asyncio.create_task(running.run(rows()))
    while not running.tally.records_made:
        await asyncio.sleep(0.001)
    gate.set()
    assert (await task).records_made == 2


async def test_a_source_is_read_only_a_little_ahead(database):
    read = 0
    gate = asyncio.Event()

    def rows() -> Iterator[Row]:
        nonlocal read
        for number in range(100_000):
            read += 1
            yield row(number)

    async def function(_: Any) -> Any:
        await gate.wait()
        raise EngineError("enough")

    task = asyncio.create_task(Pass(database, function).fails(rows(), EngineError))
    await asyncio.sleep(0.1)
    assert 1000 <= read <= 1010
    gate.set()
    await task
    threads = [thread for thread in threading.enumerate() if "_read" in thread.name]
    wait_until(lambda: not any(thread.is_alive() for thread in threads))


@pytest.mark.parametrize("problem", [StoreError("the disk is gone"), ValueError("a bug")])
async def test_a_claim_that_fails_ends_the_run(database, monkeypatch, problem):
    def claim(rows: Any) -> Any:
        if rows and rows[-1][0] >= 3:
            raise problem
        return ["new"] * len(rows)

    monkeypatch.setattr(database, "claim", claim)
    assert await asyncio.wait_for(Pass(database).fails([row(n) for n in range(20)], type(problem)), 10) == str(problem)


# --- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_first_signal_lets_calls_in_flight_finish_and_begins_no_other(database, number):
    begun = ended = 0

    async def function(request: Any) -> Any:
        nonlocal begun, ended
        begun += 1
        if begun == 4:
            os.kill(os.getpid(), number)
        await asyncio.sleep(0.05)
        ended += 1
        return respond(request)

    before = signal.getsignal(number)
    message = await Pass(database, function).fails([row(n) for n in range(20)], Interrupted)
    assert message == "stopped before the end; the same command continues"
    assert (begun, ended, database.count_calls()) == (4, 4, 4)
    assert signal.getsignal(number) is before
    tally = await Pass(database).run([row(n) for n in range(20)])
    assert (tally.calls_replayed, tally.records_made) == (4, 20)


async def test_a_second_signal_stops_at_once(database):
    async def function(_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)

    began = time.monotonic()
    running = Pass(database, function)
    await running.fails([row(0)], Interrupted)
    assert time.monotonic() - began < 5
    assert (running.tally.stopping, running.tally.aborted, running.tally.in_flight) == (True, True, 0)


async def test_a_second_signal_stops_waiting_for_calls_whose_row_has_failed(database):
    async def function(request: Any) -> Any:
        if request.seed % 2:
            os.kill(os.getpid(), signal.SIGINT)
            asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGINT)
            raise ValueError("fails")
        await asyncio.sleep(60)

    asked = recipe(generation={"candidates": 8, "pairs": "samples", "rounds": 0})
    began = time.monotonic()
    await Pass(database, function, asked).fails([row(0)], Interrupted)
    assert time.monotonic() - began < 5


async def test_a_signal_is_heard_while_the_source_makes_us_wait(database):
    gate = threading.Event()

    def rows() -> Iterator[Row]:
        yield row(0)
        gate.wait(20)

    running = Pass(database)
    task = asyncio.create_task(running.fails(rows(), Interrupted))
    while not running.tally.records_made:
        await asyncio.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(task, 5)
    gate.set()
    assert ids(database) == ["p0"]


@pytest.mark.parametrize(("stops", "answered"), [(1, 4), (2, 0)])
async def test_another_thread_can_ask_to_stop_like_a_signal(database, stops, answered):
    async def function(request: Any) -> Any:
        if running.tally.in_flight == 4:
            threading.Thread(target=lambda: setattr(running.tally, "stops", stops)).start()
        await asyncio.sleep(0.3 if stops == 1 else 60)
        return respond(request)

    running = Pass(database, function)
    await asyncio.wait_for(running.fails([row(n) for n in range(20)], Interrupted), 20)
    assert database.count_calls() == answered
    assert running.tally.aborted == (stops == 2)


async def test_who_is_asked_to_stop_before_beginning_begins_nothing(database):
    running = Pass(database)
    running.tally.stops = 1
    await running.fails([row(n) for n in range(20)], Interrupted)
    assert database.count_calls() == 0


def test_outside_the_main_thread_it_runs_without_signals(tmp_path):
    done: list[Tally] = []

    def run() -> None:
        database = Database(tmp_path / "journal.sqlite")
        done.append(asyncio.run(Pass(database).run([row(0)])))
        database.close()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done[0].records_made == 1


# --- memory


def test_memory_does_not_grow_with_the_number_of_prompts(tmp_path, monkeypatch):
    def peak(rows: int) -> int:
        database = Database(tmp_path / f"{rows}.sqlite")
        asked = recipe(generation={"rounds": 1, "exemplars": 0}, judge={"principles": 1})
        tracemalloc.start()
        asyncio.run(Pass(database, recipe=asked).run(row(number, "word " * 200) for number in range(rows)))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        database.close()
        return highest

    monkeypatch.setattr("cai.generation.runner._AHEAD", 50)
    few, many = peak(150), peak(900)
    assert many - few < 600 * 750, "of 750 further prompts of 1 KB each, not one text each is kept"

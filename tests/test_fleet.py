"""The driver's side and the workers, without Ray: a cluster of threads that hands blocks over as this file likes."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cai.config import Recipe
from cai.distributed import jobs
from cai.distributed.fleet import Fleet
from cai.distributed.jobs import Job, decode_block, decode_outcome, encode, make_job
from cai.distributed.worker import Worker
from cai.errors import CaiError, ConfigError, EngineError, Interrupted, PromptSourceError
from cai.generation import Runner, Tally
from cai.pipeline import generate, plan, planning, read_records
from cai.prompts import Row, read_prompts
from cai.store import Database
from cai.types import Message, Prompt
from tests.runs import CALLS, log_lines, model, recipe, written_rows

PROMPTS = 20


class Threads:
    """A cluster of one worker, in this process; `change` may turn an outcome into several, or none."""

    def __init__(
        self, job: Job, journal: Path, change: Callable[[int, bytes], list[bytes]] = lambda _, outcome: [outcome]
    ) -> None:
        self._blocks: queue.Queue[tuple[int, bytes] | None] = queue.Queue()
        self._change, self._stopping = change, False
        self.sizes: list[int] = []
        self.finished: list[int] = []
        self.questions: list[int] = []
        self._journal = journal
        self._worker = Worker(job, "node-7", self)

    async def asked_to_stop(self) -> bool:
        return self._stopping

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        self.questions.append(len(keys))
        database = Database(self._journal)
        try:
            return database.call_results(keys)
        finally:
            database.close()

    def outcomes(self) -> Iterator[bytes]:
        while (item := self._blocks.get()) is not None:
            number, block = item
            self.sizes.append(len(decode_block(block).items))
            yield from self._change(number, self._worker.work(block))

    async def put(self, number: int, block: bytes) -> None:
        self._blocks.put((number, block))

    async def done(self, number: int) -> None:
        self.finished.append(number)

    async def stop(self) -> None:
        self._stopping = True

    async def end(self) -> None:
        self._blocks.put(None)


class Pass:
    """One pass over the prompts on such a cluster."""

    def __init__(self, told: Recipe, journal: Path, **threads: Any) -> None:
        self.recipe, self.tally = told, Tally()
        checked = plan(told)
        self.engines, self.constitution = checked.engines, checked.constitution
        database = Database(journal)
        begun = database.count_calls() > 0
        database.close()
        self.cluster = Threads(make_job(told, checked.constitution, self.engines, begun), journal, **threads)
        self.journal = journal

    def run(self, rows: Iterator[Row] | None = None, at_once: int = 12) -> None:
        database = Database(self.journal)
        fleet = Fleet(self.cluster, database, self.tally, self.recipe.ray.block_rows)

        async def run() -> None:
            async with fleet.running():
                source = fleet.counted(rows or read_prompts(self.recipe.prompts))
                await Runner(fleet, database, self.tally, at_once).run(source)

        try:
            asyncio.run(run())
        finally:
            database.close()


@pytest.fixture
def told() -> Recipe:
    return recipe("logged", prompts={"limit": PROMPTS}, ray={"block_rows": 5})


def expected(told: Recipe, folder: Path) -> list[Any]:
    generate(told.model_copy(update={"ray": recipe().ray}), folder / "alone")
    return read_records(folder / "alone")


def records(journal: Path) -> list[Any]:
    database = Database(journal)
    try:
        return list(database.records())
    finally:
        database.close()


def test_the_same_records_as_alone_in_blocks_as_large_as_the_recipe_says(told, tmp_path, log):
    one = Pass(told, tmp_path / "journal")
    one.run()
    assert records(tmp_path / "journal") == expected(told, tmp_path)
    assert sum(one.cluster.sizes) == PROMPTS
    assert one.cluster.questions == [], "nothing can be there"
    assert max(one.cluster.sizes) == 5
    assert one.tally.calls_made == PROMPTS * CALLS
    assert one.tally.records_made == one.tally.read == PROMPTS
    assert one.tally.in_flight == 0
    assert one.tally.completion_tokens > 0


def test_a_block_that_is_done_twice_counts_once(told, tmp_path, log):
    one = Pass(told, tmp_path / "journal", change=lambda _, outcome: [outcome, outcome])
    one.run()
    assert one.tally.calls_made == PROMPTS * CALLS
    assert len(records(tmp_path / "journal")) == PROMPTS
    assert sorted(one.cluster.finished) == sorted(set(one.cluster.finished))


def test_a_cluster_that_ends_without_a_block_ends_the_run(told, tmp_path, log):
    def lose(number: int, outcome: bytes) -> list[bytes]:
        return [] if number == 2 else [outcome]

    one = Pass(told, tmp_path / "journal", change=lose)
    with pytest.raises(EngineError, match="the cluster ended without 1 of the blocks; the same command continues"):
        one.run()
    finished = PROMPTS - one.cluster.sizes[1]
    assert len(records(tmp_path / "journal")) == finished
    again = Pass(told, tmp_path / "journal")
    again.run()
    assert again.tally.records_kept == finished
    assert again.tally.calls_made == one.cluster.sizes[1] * CALLS


def test_what_breaks_in_the_stream_ends_the_run_and_is_named(told, tmp_path, log):
    def broken(number: int, outcome: bytes) -> list[bytes]:
        raise OSError("the head is gone")

    with pytest.raises(EngineError, match=r"the cluster failed: OSError: the head is gone; the same command continues"):
        Pass(told, tmp_path / "journal", change=broken).run()


def test_finished_calls_are_looked_for_and_not_made_again(told, tmp_path, log):
    Pass(told, tmp_path / "journal").run()
    database = Database(tmp_path / "journal")
    with database.transaction():
        database.forget_records()
        database._db.execute("DELETE FROM calls WHERE rowid % 10 = 0")
    database.close()
    lost = PROMPTS * CALLS // 10
    again = Pass(told, tmp_path / "journal")
    again.run()
    assert len(log_lines(log)) == PROMPTS * CALLS + lost
    assert again.tally.calls_made == lost
    assert again.tally.calls_replayed == PROMPTS * CALLS - lost
    assert len(again.cluster.questions) < PROMPTS * CALLS / 2, "many at a time"
    assert records(tmp_path / "journal") == expected(told, tmp_path)


def test_a_record_is_made_again_from_calls_that_are_there(told, tmp_path, log):
    Pass(told, tmp_path / "journal").run()
    database = Database(tmp_path / "journal")
    database.forget_records()
    database.close()
    again = Pass(told, tmp_path / "journal")
    again.run()
    assert again.tally.calls_made == 0
    assert again.tally.calls_replayed == PROMPTS * CALLS
    assert len(records(tmp_path / "journal")) == PROMPTS


def test_stopping_keeps_what_is_finished(told, tmp_path, log, monkeypatch):
    monkeypatch.setenv("SLOW", "0.05")
    one = Pass(recipe("slow", prompts={"limit": PROMPTS}, ray={"block_rows": 3}), tmp_path / "journal")

    def rows() -> Iterator[Row]:
        for number, row in enumerate(read_prompts(one.recipe.prompts)):
            if number == 10:
                one.tally.stops = 1
            yield row

    with pytest.raises(Interrupted):
        one.run(rows(), at_once=6)
    database = Database(tmp_path / "journal")
    assert database.count_calls() == len(log_lines(log, "begun")) == len(log_lines(log)) < PROMPTS * CALLS
    database.close()


def test_where_one_worker_ends_the_run_the_calls_of_the_others_are_kept(tmp_path, log, monkeypatch):
    monkeypatch.setenv("SLOW", "0.1")
    script = """
from cai.errors import EngineError
async def respond(request):
    if any(message.content == "fatal" for message in request.messages):
        raise EngineError("the GPU is gone")
    return await slow(request)
"""
    prompts = [{"prompt": "fatal"}, *({"prompt": f"Question {number}?"} for number in range(8))]
    source = written_rows(tmp_path, *prompts)
    policy = {"model": model(tmp_path, script)}
    told = recipe(policy=policy, prompts={"source": source, "limit": None}, ray={"block_rows": 1})
    one = Pass(told, tmp_path / "journal")
    with pytest.raises(EngineError, match="a worker on node-7: the GPU is gone"):
        one.run()
    database = Database(tmp_path / "journal")
    assert 0 < database.count_calls() == len(log_lines(log, "begun")) == len(log_lines(log)) < 8 * CALLS
    assert one.tally.calls_made == database.count_calls()
    database.close()


def test_rows_that_fail_say_why(tmp_path):
    source = written_rows(tmp_path, {"id": "bad", "prompt": "fault:raise"}, {"id": "good", "prompt": "fine"})
    one = Pass(recipe("faulty", prompts={"source": source}, ray={"block_rows": 32}), tmp_path / "journal")
    one.run()
    assert one.tally.quarantined == {"ValueError": 1}
    assert one.tally.records_made == 1
    database = Database(tmp_path / "journal")
    [bad] = database.quarantined()
    database.close()
    assert (bad.position, bad.prompt_id, bad.reason) == (0, "bad", "ValueError")
    assert "the \x1b[31mscripted\x1b[0m function" in bad.detail


def test_a_source_that_breaks_ends_the_run_after_what_was_read(told, tmp_path, log):
    def rows() -> Iterator[Row]:
        yield Row("a", Prompt("a", (Message("user", "Why?"),)), None, "")
        raise PromptSourceError("the disk is gone")

    one = Pass(told, tmp_path / "journal")
    with pytest.raises(PromptSourceError, match="the disk is gone"):
        one.run(rows())
    assert one.tally.records_made == 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"code": "another"}, ConfigError, r"a worker on node-7: cai is .* here, and another where the run was started"),
        ({"policy": "another"}, ConfigError, r"a worker on node-7: the model is scripted:.* here, and another where the run"),
        ({"constitution": "{"}, EngineError, r"a worker on node-7: ValidationError: .*"),
    ],
)
def test_a_node_that_differs_ends_the_run(told, tmp_path, log, change, error, message):
    one = Pass(told, tmp_path / "journal")
    one.cluster._worker._job = one.cluster._worker._job._replace(**change)
    with pytest.raises(error, match=message):
        one.run()
    assert log_lines(log) == []


def test_files_travel_with_their_contents(tmp_path, monkeypatch):
    script = model(tmp_path, "respond = usual\n")
    told = recipe(policy={"model": script}, judge={"model": script}, prompts={"limit": 2}, ray={"block_rows": 32})
    alone = expected(told, tmp_path)
    one = Pass(told, tmp_path / "journal")
    (tmp_path / "model.py").unlink()
    one.run()
    assert records(tmp_path / "journal") == alone


def test_a_file_that_is_here_is_used_where_it_lies(tmp_path):
    script = model(tmp_path, "respond = usual\n")
    told = recipe(policy={"model": script})
    checked = plan(told)
    job = make_job(told, checked.constitution, checked.engines, False)
    assert jobs.unpacked_recipe(job) == told
    (tmp_path / "model.py").write_text("other = 1\n")
    moved = jobs.unpacked_recipe(job).policy.model
    assert moved != script
    assert moved.endswith("/model.py:respond")


def test_an_outcome_is_read_back_as_it_was():
    outcome = jobs.Outcome(3, [jobs.RowOutcome(b"{}"), jobs.RowOutcome(None, "why", "how")], [], 2, ("EngineError", "x"))
    assert decode_outcome(encode(outcome)) == outcome
    assert issubclass(EngineError, CaiError)


def test_without_ray_it_is_told_how_to_install_it(monkeypatch):
    monkeypatch.setattr(planning, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'cai-toolkit\[ray\]'"):
        plan(recipe(ray={"address": "local"}))


def test_a_budget_that_workers_would_not_share_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="budget: the workers of a Ray cluster do not share one yet"):
        plan(recipe(ray={"address": "local"}, budget={"tokens": 5}))

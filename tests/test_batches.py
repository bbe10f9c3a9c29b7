"""Runs through a server's batch API: the same dataset as direct calls, and nothing is paid for twice, whatever happens."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cai.config import ModelConfig, Recipe
from cai.engines import BatchWork, GenerateRequest, build_engine
from cai.errors import BudgetError, ConfigError, EngineError, RequestError
from cai.pipeline import generate
from cai.store import Batch, Database, would_lose
from cai.types import Message
from tests.runs import data_bytes, forked, generate_in, manifest, quarantine, recipe, start, wait_until, written_rows
from tests.server import Server, served

PROMPTS = 6
QUICK = {"batch": True, "batch_wait": 0.1, "batch_poll": 0.05}


def on(url: str, server: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A run of some built-in prompts on a server, in quick batches; 13 calls a prompt."""
    policy = {"model": url, "server": QUICK if server is None else server}
    sections = {"prompts": {"limit": PROMPTS}, "generation": {"max_tokens": 80}, **sections}
    return recipe(policy=policy, **sections)


def asked_twice(server: Server) -> list[str]:
    """The questions that got two good answers, but for those that probe the server."""
    return [body for body in server.stats()["repeated_bodies"] if "Say OK." not in body]


def batches(out: Path) -> list[tuple[str, str]]:
    """Of the run's notes: the server's id of each batch, and its status."""
    journal = out / "run" / "journal.sqlite"
    if not journal.exists():
        return []
    with closing(sqlite3.connect(journal)) as db:
        known = db.execute("SELECT 1 FROM sqlite_master WHERE name='batches'").fetchone()
        return db.execute("SELECT remote, status FROM batches ORDER BY rowid").fetchall() if known else []


def is_whole(server: Server, out: Path, reference: dict[str, bytes]) -> bool:
    """Whether the run ended in the same dataset with no answer paid for twice, and no direct call but the probing ones."""
    assert asked_twice(server) == []
    assert server.stats()["paths"].get("/v1/chat/completions", 0) < 20
    return data_bytes(out) == reference and manifest(out)["status"] == "done"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset of a run by direct calls."""
    out = tmp_path_factory.mktemp("reference") / "run"
    with served() as server:
        generate(on(server.url, {}), out)
    return data_bytes(out)


def test_the_dataset_is_that_of_direct_calls_and_the_judge_is_asked_in_batches_too(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    with served() as server:
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        stats = server.stats()["batches"]
        assert stats["lines"] == manifest(out)["sessions"][0]["calls_made"]
        assert next(iter(stats["sizes"].values())) == PROMPTS, "all first answers in one batch"
        assert list(stats["sizes"].values())[-1] == PROMPTS * 8, "all verdicts in one batch"
    assert {status for _, status in batches(out)} == {"ended"}
    assert would_lose(out) == f"{stats['lines']:,} finished calls"


@pytest.mark.parametrize("settings", [{"flavour": "openai"}, {"joined": "true"}])
@pytest.mark.parametrize("api", ["chat", "completions"])
def test_other_servers_and_plain_completions(api: str, settings: dict[str, Any], tmp_path: Path) -> None:
    with served(**settings) as server:
        generate(on(server.url, {"api": api}), tmp_path / "direct")
        server.control(clear=True)
        generate(on(server.url, {"api": api, **QUICK}), tmp_path / "batch")
        path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
        assert set(server.stats()["batches"]["endpoints"].values()) == {path}
        assert server.stats()["paths"][path] < 20
    assert data_bytes(tmp_path / "batch") == data_bytes(tmp_path / "direct")


def test_policy_and_judge_on_two_servers(tmp_path: Path) -> None:
    with served() as policy, served(seed=1) as judge:
        section = {"model": judge.url, "server": QUICK}
        generate(on(policy.url, judge=section), tmp_path / "both")
        assert policy.stats()["batches"]["lines"] == PROMPTS * 5
        assert judge.stats()["batches"]["lines"] == PROMPTS * 8
        generate(on(policy.url, {}, judge=section), tmp_path / "judge")
        assert policy.stats()["batches"]["lines"] == PROMPTS * 5, "only the judge works in batches"
        assert judge.stats()["batches"]["lines"] == PROMPTS * 16
        direct = on(policy.url, {}, judge={"model": judge.url})
        generate(direct, tmp_path / "direct")
        generate(direct, tmp_path / "both")  # to and fro: it is the same run
    assert data_bytes(tmp_path / "both") == data_bytes(tmp_path / "judge") == data_bytes(tmp_path / "direct")


# -- crashes --------------------------------------------------------------------------------------------------------------


def test_killed_while_a_batch_is_under_way(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_delay=3600) as server:
        run = forked(generate_in, {}, on(server.url), out)
        wait_until(lambda: batches(out) == [("batch_1", "created")])
        run.kill()
        run.join()
        assert would_lose(out) == f"{PROMPTS} calls that a server works on in batches"
        server.control(batch_delay=0.2)
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        stats = server.stats()["batches"]
        assert stats["lines"] == PROMPTS * 13
        assert len(stats["statuses"]) == len(batches(out))


def test_killed_before_it_heard_that_the_batch_was_created(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(create_hang="true", batch_page=1) as server:
        run = forked(generate_in, {}, on(server.url), out)
        wait_until(lambda: server.stats()["batches"]["statuses"])
        run.kill()
        run.join()
        assert batches(out) == [("", "intended")]
        server.control(create_hang=False)
        for _ in range(2):  # newer ones of somebody else, so that it is not on the list's first page
            body = {"input_file_id": "file-1", "endpoint": "/v1/embeddings", "completion_window": "24h"}
            urllib.request.urlopen(f"{server.url}/batches", json.dumps(body).encode(), timeout=10).close()
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        assert batches(out)[0] == ("batch_1", "ended")


def test_killed_before_the_batch_was_created(tmp_path: Path, reference: dict[str, bytes]) -> None:
    """The note is there and the batch is not: its calls are handed over anew."""
    out = tmp_path / "run"
    with served(create_hang="true") as server:
        run = forked(generate_in, {}, on(server.url), out)
        wait_until(lambda: batches(out))
        run.kill()
        run.join()
    with served() as server:
        generate(on(server.url), out)
        assert is_whole(server, out, reference)


def test_killed_when_answers_were_read_and_not_yet_kept(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served() as server:
        generate(on(server.url), out)
        with closing(sqlite3.connect(out / "run" / "journal.sqlite")) as db, db:
            db.execute("DELETE FROM calls")
            db.execute("DELETE FROM records")
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        assert server.stats()["batches"]["lines"] == PROMPTS * 13


def test_ctrl_c_does_not_wait_and_says_what_goes_on(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_delay=3600) as server:
        file = tmp_path / "recipe.yaml"
        file.write_text(on(server.url).to_yaml())
        process = start("generate", "--recipe", file, "-o", out)
        wait_until(lambda: batches(out) == [("batch_1", "created")])
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        told = " ".join(err.split())
        assert f"1 batch of {PROMPTS} calls under way, 0% finished: they go on at the server, and the same command" in told
        assert manifest(out)["status"] == "interrupted"
        server.control(batch_delay=0.2)
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        assert "Unclosed" not in err


# -- faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"error": 0.1}, {"overload": 0.1}, {"empty": 0.1}, {"batch_expire": 2}])
def test_lines_that_fail_go_into_the_next_batch(fault: dict[str, Any], tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(seed=3) as server:
        asked = on(server.url)
        build_engine(asked.policy).fingerprint  # noqa: B018
        server.control(**fault, clear=True)
        run = forked(generate_in, {}, asked, out)
        run.join(60)
        assert is_whole(server, out, reference)
        assert quarantine(out) == []
        assert len(server.stats()["batches"]["sizes"]) > 6


def test_rows_that_are_refused_are_set_aside(tmp_path: Path) -> None:
    out = tmp_path / "run"
    prompts = [{"prompt": "Say something forbidden"}, {"prompt": "Say hello"}, {"prompt": "word " * 4000}]
    with served(refuse="forbidden", context=15_000) as server:
        done = generate(on(server.url, prompts={"source": written_rows(tmp_path, *prompts), "limit": None}), out)
        assert done["dataset"]["records"] == 1
        assert done["prompts"]["quarantined"] == {"request failed": 1, "too long for the context": 1}
        assert "this dialogue violates the mock's policy" in quarantine(out)[0]["detail"]
        server.control(refuse="")
        assert (
            generate(on(server.url, prompts={"source": written_rows(tmp_path, *prompts), "limit": None}), out)["dataset"][
                "records"
            ]
            == 2
        ), "what failed in an earlier session is asked again"
        assert asked_twice(server) == []


def test_what_always_fails_is_tried_as_often_as_the_recipe_says() -> None:
    async def ask(engine: Any) -> None:
        try:
            await engine.generate(GenerateRequest((Message("user", "Hi"),), 4, 0.0, 1.0, 1))
        finally:
            await engine.close()

    with served() as server:
        one = build_engine(ModelConfig.model_validate({"model": server.url, "server": {**QUICK, "retries": 1}}))
        assert one.fingerprint
        server.control(error=1.0)
        with pytest.raises(RequestError, match="HTTP 500: the mock has an error; tried 2 times"):
            asyncio.run(ask(one))
        assert server.stats()["batches"]["sizes"] == {"batch_1": 1, "batch_2": 1}


def test_a_batch_that_is_refused_stops_the_run_and_says_why(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_refuse="the quota of enqueued tokens is exceeded") as server:
        with pytest.raises(EngineError, match=r"refuses batch batch_1: the quota .* is exceeded; mend that, then the same"):
            generate(on(server.url), out)
        assert manifest(out)["status"] == "failed"
        server.control(batch_refuse="")
        generate(on(server.url), out)
        assert is_whole(server, out, reference)


def test_a_key_that_a_batch_repeats_is_in_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "geheim0123456789abcdefghijklmnopqrstuvwx"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    out = tmp_path / "run"
    with served(key=key, echo_at=225) as server:
        asked = on(server.url, {**QUICK, "retries": 0})
        server.control(batch_refuse=f"{'.' * 285}{key} is not liked here")
        with pytest.raises(EngineError, match="refuses batch batch_1"):
            generate(asked, out)
        assert "..." in manifest(out)["error"]
        server.control(batch_refuse="", batch_delay=3600)
        run = forked(generate_in, {"OPENAI_API_KEY": key}, asked, out)
        wait_until(lambda: batches(out))
        server.control(batch_delay=0.1, echo=0.3)
        run.join(60)
        assert any("(no 'choices'): ..." in row["detail"] for row in quarantine(out))
    files = [file.read_bytes() for file in out.rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not any(b"geheim" in content for content in files)


def test_a_file_of_answers_that_comes_late_is_waited_for(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_late=3) as server:
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        assert server.stats()["batches"]["lines"] == PROMPTS * 13


def test_a_file_of_answers_that_is_not_there_stops_the_run_and_the_batch_stays_noted(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    with served(batch_late=1000) as server:
        with pytest.raises(EngineError, match=r"batch_1 is completed, and the server has no file of its answers \(HTTP 404\)"):
            generate(on(server.url), out)
        assert server.stats()["batches"]["sizes"] == {"batch_1": PROMPTS}
        assert batches(out) == [("batch_1", "missing")]
        assert would_lose(out) == f"{PROMPTS} calls that a server works on in batches"
        server.control(batch_late=0)
        generate(on(server.url), out)
        assert is_whole(server, out, reference)


def test_a_file_of_answers_that_never_comes_is_given_up_by_the_next_command(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with served(batch_late=1000) as server:
        for number in (1, 2):
            with pytest.raises(EngineError, match=f"batch_{number} is completed, and the server has no file"):
                generate(on(server.url), out)
        assert server.stats()["batches"]["sizes"] == {"batch_1": PROMPTS, "batch_2": PROMPTS}


def test_a_batch_of_which_all_calls_fail_stops_the_run() -> None:
    async def ask(engine: Any) -> None:
        requests = [GenerateRequest((Message("user", f"Question {number}?"),), 4, 0.0, 1.0, 1) for number in range(40)]
        try:
            found = await asyncio.gather(*map(engine.generate, requests), return_exceptions=True)
            assert all(isinstance(one, RequestError) for one in found)
            await engine.generate(requests[0])
        finally:
            await engine.close()

    with served(refuse="Question") as server:
        one = build_engine(ModelConfig.model_validate({"model": server.url, "server": QUICK}))
        with pytest.raises(
            EngineError, match="all 40 calls of batch batch_1 failed, the last of them: HTTP 400: this dialogue"
        ):
            asyncio.run(ask(one))
        assert len(server.stats()["batches"]["sizes"]) == 1


def test_equal_calls_share_a_line_and_limits_make_more_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.engines import batches

    monkeypatch.setattr(batches, "_MOST_LINES", 10)

    async def ask(engine: Any) -> list[str]:
        requests = [GenerateRequest((Message("user", f"Question {number % 25}?"),), 4, 0.0, 1.0, 1) for number in range(50)]
        try:
            return [one.text for one in await asyncio.gather(*map(engine.generate, requests))]
        finally:
            await engine.close()

    with served() as server:
        one = build_engine(ModelConfig.model_validate({"model": server.url, "server": QUICK}))
        found = asyncio.run(ask(one))
        assert found[:25] == found[25:]
        assert len(set(found)) == 25
        assert sorted(server.stats()["batches"]["sizes"].values()) == [5, 10, 10]


def test_a_server_that_takes_few_lines_at_a_time_gets_no_more(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_room=14, batch_delay=0.05) as server:
        generate(on(server.url), out)
        assert is_whole(server, out, reference)
        stats = server.stats()["batches"]
        taken = [stats["sizes"][name] for name, status in stats["statuses"].items() if status == "completed"]
        assert taken == [PROMPTS] * 5 + [12] * 4


def test_a_batch_that_finds_no_room_beside_another_is_handed_over_later(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai.engines import batches

    monkeypatch.setattr(batches, "_MOST_LINES", 10)

    async def ask(engine: Any) -> int:
        requests = [GenerateRequest((Message("user", f"Question {number}?"),), 4, 0.0, 1.0, 1) for number in range(20)]
        try:
            return len(await asyncio.gather(*map(engine.generate, requests)))
        finally:
            await engine.close()

    with served(batch_room=10, batch_delay=0.5) as server:
        one = build_engine(ModelConfig.model_validate({"model": server.url, "server": QUICK}))
        assert asyncio.run(ask(one)) == 20
        assert server.stats()["batches"]["lines"] == 20
        assert set(server.stats()["batches"]["sizes"].values()) == {10}


def test_a_key_that_is_refused_while_a_batch_is_under_way(
    tmp_path: Path, reference: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine-1234567")
    with served(batch_delay=3600, key="sk-mine-1234567") as server:
        run = forked(generate_in, {"OPENAI_API_KEY": "sk-mine-1234567"}, on(server.url), out)
        wait_until(lambda: batches(out) == [("batch_1", "created")])
        server.control(key="another")
        run.join(30)
        told = manifest(out)["error"]
        assert "HTTP 401: Incorrect API key provided" in told
        assert "OPENAI_API_KEY is refused" in told
        assert "sk-mine" not in told
        server.control(key="sk-mine-1234567", batch_delay=0.2)
        generate(on(server.url), out)
        assert is_whole(server, out, reference)


def test_a_batch_that_was_cancelled_at_the_server(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_delay=3600) as server:
        run = forked(generate_in, {}, on(server.url), out)
        wait_until(lambda: batches(out) == [("batch_1", "created")])
        urllib.request.urlopen(f"{server.url}/batches/batch_1/cancel", b"", timeout=10).close()
        run.join(30)
        assert "batch batch_1 was cancelled at the server" in manifest(out)["error"]
        server.control(batch_delay=0.2)
        generate(on(server.url), out)
        assert is_whole(server, out, reference)


def test_a_server_without_a_batch_api_is_refused_before_any_call(tmp_path: Path) -> None:
    with served(batches="false") as server:
        with pytest.raises(ConfigError, match=r"/v1/batches answers HTTP 404: .*; it has no batch API: leave out"):
            generate(on(server.url), tmp_path / "run")
        assert server.stats()["answered"] == 0


def test_a_server_that_is_away_for_a_while_is_waited_for(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(batch_delay=1.5) as server:
        run = forked(generate_in, {}, on(server.url), out)
        wait_until(lambda: batches(out) == [("batch_1", "created")])
        server.control(die=True, dead_for=2)
        run.join(60)
        assert is_whole(server, out, reference)


def test_a_batch_and_replicas_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="replicas are not used with batch"):
        on("http://127.0.0.1/v1", {"batch": True, "replicas": ["http://127.0.0.2/v1"]})


def test_a_ray_cluster_does_not_take_batches() -> None:
    pytest.importorskip("ray")
    with served() as server, pytest.raises(ConfigError, match=r"server.batch: only a run on one machine"):
        generate(on(server.url, ray={"address": "local"}), Path("unused"))


def test_a_budget_holds_in_batches_too(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served() as server:
        with pytest.raises(BudgetError, match=r"budget\.tokens"):
            generate(on(server.url, budget={"tokens": 6000}), out)
        stats = server.stats()
        assert 2000 < stats["prompt_tokens"] + stats["completion_tokens"] < 6300
        generate(on(server.url, budget={"tokens": 10**9}), out)
        assert is_whole(server, out, reference)


def test_notes_of_batches(tmp_path: Path) -> None:
    database = Database(tmp_path / "journal.sqlite")
    first, second = Batch("a", "/v1/x", "", "intended"), Batch("b", "/v1/x", "r2", "created")
    database.add_batch(first, ["1", "2", "3"])
    database.add_batch(second, ["3", "4"])
    assert database.find_batches(["1", "3", "5"]) == {"1": first, "3": second}
    assert database.open_batches() == (2, 4)
    database.update_batch("b", "r2", "ended")
    assert database.open_batches() == (1, 2)
    database.drop_batch("a")
    assert database.find_batches(["1", "4"]) == {"4": second._replace(status="ended")}
    database.close()


def test_what_is_under_way_in_words() -> None:
    work = BatchWork()
    assert work.in_words == ""
    work.note("a", 1500, 700)
    work.note("b", 500, 100)
    assert work.in_words == "2 batches of 2,000 calls under way, 40% finished"
    work.ended("a")
    assert work.in_words == "1 batch of 500 calls under way, 20% finished"

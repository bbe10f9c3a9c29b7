"""Runs against a server with every fault there is: all rows end as records or in quarantine, nothing is paid for twice."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from cai.config import ModelConfig, Recipe
from cai.engines import Engine, GenerateRequest, build_engine
from cai.errors import BudgetError, ConfigError, EngineError, PromptSourceError, RequestError, VerdictError
from cai.pipeline import generate, plan, plan_labels
from cai.types import Message
from tests.runs import (
    SCRIPTED,
    data_bytes,
    forked,
    generate_in,
    kept_calls,
    manifest,
    quarantine,
    recipe,
    start,
    wait_until,
    written_rows,
)
from tests.runs import rows as written
from tests.server import Server, served

PROMPTS = 8


def on(url: str, server: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    """A run of some built-in prompts on a server: 13 calls each, all of a kind that the faults hit."""
    policy = {"model": url, "server": server or {}}
    sections = {"prompts": {"limit": PROMPTS}, "generation": {"concurrency": 8, "max_tokens": 80}, **sections}
    return recipe(policy=policy, **sections)


def asked_twice(server: Server) -> list[str]:
    """The questions that got two good answers, but for those that probe the server."""
    return [body for body in server.stats()["repeated_bodies"] if "Say OK." not in body]


def finish(server: Server, out: Path, asked: Recipe, rows: int = PROMPTS) -> Any:
    """Run to the end; asserts that every row is a record, and no good answer was asked for again."""
    done = generate(asked, out)
    assert (done["status"], done["dataset"]["records"], quarantine(out)) == ("done", rows, [])
    assert asked_twice(server) == []
    return done


async def and_close(engine: Engine, call: Awaitable[Any]) -> Any:
    try:
        return await call
    finally:
        await engine.close()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The dataset of a run without a fault."""
    out = tmp_path_factory.mktemp("reference") / "run"
    with served() as server:
        generate(on(server.url), out)
    return data_bytes(out)


FAULTS: dict[str, dict[str, Any]] = {
    "errors": {"error": 0.1},
    "gateway errors": {"error": 0.1, "error_status": 502},
    "overload": {"overload": 0.1},
    "overload with seconds": {"overload": 0.1, "retry_after": "0.5"},
    "overload with a date": {"overload": 0.05, "retry_after": "date:1"},
    "503": {"overload": 0.1, "overload_status": 503},
    "resets in mid-body": {"reset": 0.1},
    "truncated": {"truncated": 0.1},
    "invalid": {"invalid": 0.1},
    "no choices": {"empty": 0.1},
    "no log-probabilities": {"missing": 0.06},
    "NaN": {"nan": 0.06},
    "time-outs": {"hang": 0.08},
    "everything": {"error": 0.03, "overload": 0.03, "reset": 0.03, "truncated": 0.03, "invalid": 0.03, "empty": 0.03},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_through_faults_ends_in_the_same_dataset(fault: str, tmp_path: Path, reference: dict[str, bytes]) -> None:
    with served(seed=3) as server:
        asked = on(server.url, {"timeout": 0.7 if fault == "time-outs" else 20})
        server.control(**FAULTS[fault], clear=True)
        finish(server, tmp_path / "run", asked)
        stats = server.stats()
        assert sum(stats["faults"].values()) >= 2
        assert stats["early"] == 0, "before the time that a Retry-After named, whichever call it answered"
    assert data_bytes(tmp_path / "run") == reference


def test_the_same_command_again_asks_for_nothing(tmp_path: Path) -> None:
    with served() as server:
        finish(server, tmp_path / "run", on(server.url))
        server.control(clear=True)
        finish(server, tmp_path / "run", on(server.url))
        assert server.stats()["completion_tokens"] < 10, "the probing questions"


@pytest.mark.parametrize("fault", ["nan", "missing"])
def test_a_judge_without_numbers_is_no_verdict_and_no_tie(fault: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with served() as server:
        one = build_engine(ModelConfig(model=server.url))
        assert "choice_logprobs" in one.capabilities
        server.control(**{fault: 1.0}, clear=True)
        asked = (Message("user", "(A) or (B)?"),)
        with pytest.raises(VerdictError, match="tried 4 times"):
            asyncio.run(and_close(one, one.choice_logprobs([asked], ["A", "B"])))
        assert server.stats()["calls"] == 4
        server.control(**{fault: 0.15})
        done = generate(on(server.url, prompts={"limit": 30}), out)
    assert done["dataset"]["records"] == 30 - done["prompts"]["quarantined"].get("no verdict", 0)
    assert {row["reason"] for row in quarantine(out)} <= {"no verdict"}


def test_a_principle_that_fails_does_not_cost_the_answers_beside_it_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    policy, judge = 5, 2 * 4
    with served() as server:
        asked = on(server.url, judge={"principles": "all"}, budget={"tokens": 10**9})
        server.control(latency=0.02, refuse="Which completion is more calm?")
        with pytest.raises(PromptSourceError, match=f"none of {PROMPTS} rows became a record"):
            generate(asked, out)
        assert kept_calls(out) == PROMPTS * (policy + judge)
        assert server.stats()["answered"] - kept_calls(out) < 20, "the probing questions"
        server.control(refuse="")
        finish(server, out, asked)
    assert kept_calls(out) == PROMPTS * (policy + judge + 2)


def test_rows_that_are_refused_are_set_aside_with_what_the_server_said(tmp_path: Path) -> None:
    out = tmp_path / "run"
    prompts = [
        {"prompt": "Say something forbidden"},
        {"prompt": "Say hello"},
        {"prompt": "word " * 4000},
        {"prompt": "Say bye"},
    ]
    with served(refuse="forbidden", context=15_000) as server:
        done = generate(on(server.url, prompts={"source": written_rows(tmp_path, *prompts), "limit": None}), out)
        assert server.stats()["statuses"]["400"] == 2
    assert done["dataset"]["records"] == 2
    assert done["prompts"]["quarantined"] == {"request failed": 1, "too long for the context": 1}
    assert "this dialogue violates the mock's policy" in quarantine(out)[0]["detail"]


def test_what_always_fails_is_tried_as_often_as_the_recipe_says() -> None:
    with served() as server:
        one = build_engine(ModelConfig.model_validate({"model": server.url, "server": {"retries": 1}}))
        assert one.fingerprint
        server.control(error=1.0, clear=True)
        with pytest.raises(RequestError, match="HTTP 500: the mock has an internal error; tried 2 times"):
            asyncio.run(and_close(one, one.generate(GenerateRequest((Message("user", "Hi"),), 4, 0.0, 1.0, 1))))
        assert server.stats()["calls"] == 2


def test_a_run_that_is_only_failing_stops_with_a_sentence_that_says_why(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with served() as server:
        rows = [{"prompt": f"Question {number}?"} for number in range(400)]
        asked = on(server.url, {"retries": 0}, prompts={"source": written_rows(tmp_path, *rows), "limit": None})
        run = forked(generate_in, {}, asked, out)
        wait_until(lambda: kept_calls(out) > 60)
        server.control(error=1.0)
        run.join(30)
        assert run.exitcode == 1
    told = manifest(out)
    assert told["status"] == "failed"
    assert "requests all failed, the last of them: HTTP 500: the mock has an internal error; tried 1 times" in told["error"]
    assert "the same command continues" in told["error"]
    assert len(quarantine(out)) < 200


@pytest.mark.parametrize("gone", [{"away": True}, {"error": 1.0, "error_status": 504}])
def test_a_gateway_whose_server_is_away_is_waited_for(
    gone: dict[str, Any], tmp_path: Path, reference: dict[str, bytes]
) -> None:
    with served() as server:
        asked = on(server.url, {"retries": 1})
        run = forked(generate_in, {}, asked, tmp_path / "run")
        wait_until(lambda: kept_calls(tmp_path / "run") > 10)
        server.control(**gone)
        time.sleep(4)
        assert run.is_alive()
        server.control(away=False, error=0.0)
        run.join(60)
        assert (run.exitcode, quarantine(tmp_path / "run")) == (0, [])
        assert asked_twice(server) == []
        stats = server.stats()["statuses"]
        assert 3 <= sum(stats.get(status, 0) for status in ("502", "504")) < 200, "nor is it flooded"
    assert data_bytes(tmp_path / "run") == reference


@pytest.mark.parametrize("dead_for", [3, 20])
def test_a_server_that_dies_and_returns_is_survived(dead_for: int, tmp_path: Path, reference: dict[str, bytes]) -> None:
    with served(die_at=40, dead_for=dead_for) as server:
        began = time.monotonic()
        done = generate(on(server.url), tmp_path / "run")
        assert (done["dataset"]["records"], quarantine(tmp_path / "run")) == (PROMPTS, [])
        assert len(asked_twice(server)) <= 20, "what was under way when it died"
        assert dead_for < time.monotonic() - began < dead_for + 15
    assert data_bytes(tmp_path / "run") == reference


def test_a_server_that_dies_for_ever_stops_the_run_which_goes_on_when_it_is_back(
    tmp_path: Path, reference: dict[str, bytes]
) -> None:
    out = tmp_path / "run"
    with served(die_at=40, dead_for=-1) as server:
        port = int(server.url.split(":")[-1].removesuffix("/v1"))
        with pytest.raises(EngineError, match=r"cannot be reached for 2 s: .*; mend that, then the same command continues"):
            generate(on(server.url, {"give_up": 2}), out)
    assert manifest(out)["status"] == "failed"
    kept = kept_calls(out)
    assert kept >= 20
    with served(port=port) as server:
        finish(server, out, on(server.url))
        assert server.stats()["paths"]["/v1/chat/completions"] < 13 * PROMPTS - kept + 10
    assert data_bytes(out) == reference


def test_one_of_two_servers_dying_is_survived(tmp_path: Path, reference: dict[str, bytes]) -> None:
    with served(latency=0.02) as one, served(latency=0.02, die_at=30, dead_for=-1) as other:
        asked = on(one.url, {"replicas": [other.url], "concurrency": 4})
        done = generate(asked, tmp_path / "run")
        assert (done["dataset"]["records"], quarantine(tmp_path / "run")) == (PROMPTS, [])
        assert one.stats()["answered"] > 40
    assert data_bytes(tmp_path / "run") == reference


def test_two_servers_share_the_work_and_a_dead_one_is_used_again(tmp_path: Path) -> None:
    with served(latency=0.2) as one, served(latency=0.2) as other:
        other.control(die=True, dead_for=1)
        generate(on(one.url, {"replicas": [other.url], "concurrency": 4}), tmp_path / "run")
        assert one.stats()["answered"] > 20
        assert other.stats()["answered"] > 20


def test_an_overloaded_server_is_not_flooded(tmp_path: Path) -> None:
    with served(latency=0.02, concurrency=4, queue=0) as server:
        finish(server, tmp_path / "run", on(server.url, generation={"concurrency": 64, "max_tokens": 80}))
        stats = server.stats()
        assert stats["statuses"]["429"] < stats["answered"] * 2


def test_killed_in_the_middle_nothing_is_paid_for_twice(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served(latency=0.03) as server:
        run = forked(generate_in, {}, on(server.url), out)
        wait_until(lambda: kept_calls(out) > 30)
        run.kill()
        run.join()
        kept, answered = kept_calls(out), server.stats()["answered"]
        generate(on(server.url), out)
        again = len(asked_twice(server))
        assert again <= answered - kept, "only what was under way when it was killed"
        assert again <= 8 * 8
    assert data_bytes(out) == reference


def test_ctrl_c_waits_for_what_is_under_way(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with served(latency=0.3) as server:
        process = start("generate", "benign", "-n", 20, "-m", server.url, "-o", out, "--set", "generation.concurrency=4")
        wait_until(lambda: kept_calls(out) > 6)
        process.terminate()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 130, err
        probes = 6
        assert kept_calls(out) == server.stats()["answered"] - probes
        assert "Unclosed" not in err


# -- budgets --------------------------------------------------------------------------------------------------------------


def spent(server: Server) -> int:
    stats = server.stats()
    return int(stats["prompt_tokens"] + stats["completion_tokens"])


def test_a_budget_of_tokens_is_not_exceeded_and_a_higher_one_continues(tmp_path: Path, reference: dict[str, bytes]) -> None:
    out = tmp_path / "run"
    with served() as server:
        with pytest.raises(BudgetError, match=r"budget.tokens: [\d,]+ of 8,000 tokens are spent, .* higher budget.tokens"):
            generate(on(server.url, budget={"tokens": 8000}), out)
        first = spent(server)
        assert 5000 < first < 8200, "the probing questions come on top"
        assert manifest(out)["status"] == "interrupted"
        with pytest.raises(BudgetError):
            generate(on(server.url, budget={"tokens": 8000}), out)
        assert spent(server) < first + 300, "what the folder has cost already counts"
        generate(on(server.url, budget={"tokens": 10**9}), out)
        assert asked_twice(server) == []
    assert data_bytes(out) == reference


def test_a_budget_of_money_goes_by_the_prices_of_policy_and_judge(tmp_path: Path) -> None:
    out = tmp_path / "run"
    prices = {"input_price": 2.0, "output_price": 10.0}
    with served() as server:
        asked = on(server.url, prices, judge={"model": server.url, "server": {"input_price": 1.0}}, budget={"money": 0.03})
        with pytest.raises(BudgetError, match=r"budget.money: 0.0[\d]+ of 0.03 is spent"):
            generate(asked, out)
    usage = manifest(out)["usage"]
    cost = (usage["policy"]["prompt_tokens"] * 2 + usage["policy"]["completion_tokens"] * 10) / 1e6
    cost += usage.get("judge", {"prompt_tokens": 0})["prompt_tokens"] / 1e6
    assert 0.02 < cost <= 0.03


URL, OTHER = "http://127.0.0.1:9/v1", "http://127.0.0.2:9/v1"
PRICED = {"output_price": 3.0}


@pytest.mark.parametrize(
    ("policy", "judge", "missing"),
    [
        ({}, {}, "policy"),
        (PRICED, {"model": OTHER}, "judge"),
        (PRICED, {"server": {"retries": 1}}, "judge"),
        (PRICED, {"method": "panel", "members": [{"name": "a"}, {"name": "b", "model": OTHER}]}, "judge.members[1]"),
    ],
)
def test_a_budget_of_money_is_refused_where_a_price_is_not_known(
    policy: dict[str, Any], judge: dict[str, Any], missing: str, tmp_path: Path
) -> None:
    needed = f"set {missing}.server.input_price and {missing}.server.output_price to the price of a million tokens"
    with pytest.raises(ConfigError, match=re.escape(needed)):
        generate(on(URL, policy, judge=judge, budget={"money": 1}), tmp_path / "run")


def test_what_is_free_or_local_or_does_not_work_needs_no_price(tmp_path: Path) -> None:
    scripted = f"scripted:{SCRIPTED}:respond"
    with served() as server:
        for policy, judge in (
            ({"model": server.url, "server": PRICED}, {"model": scripted}),
            ({"model": server.url, "server": PRICED}, {"model": server.url, "server": {"input_price": 0}}),
            ({"model": scripted}, {"model": server.url, "server": {"input_price": 1}}),
            ({"model": scripted}, {}),
        ):
            asked = recipe(policy=policy, judge=judge, budget={"money": 1})
            assert plan(asked).recipe.budget.money == 1
        judged = recipe(policy={"model": server.url}, judge={"model": scripted}, budget={"money": 1})
        assert plan_labels(judged).policy is None, "a policy that only labels answers nothing"


def test_server_settings_and_budget_are_not_what_makes_a_run_another_one(tmp_path: Path) -> None:
    with served() as server:
        first = finish(server, tmp_path / "run", on(server.url, prompts={"limit": 2}), 2)
        other = {"timeout": 5, "concurrency": 3, "input_price": 1.0, "retries": 2, "give_up": 9}
        judge = {"model": server.url, "server": other}
        again = generate(on(server.url, other, prompts={"limit": 2}, judge=judge, budget={"tokens": 10**9}), tmp_path / "run")
    assert again["usage"] == first["usage"]
    assert written(tmp_path / "run", "trace")

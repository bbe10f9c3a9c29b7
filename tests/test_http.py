"""What requests to a server that fails mean: which are refused for their own sake, which stop the run, what is waited for."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from tenacity import wait_none

from cai.config import ModelConfig
from cai.engines import GenerateRequest, build_engine
from cai.engines.http import FAILING
from cai.engines.openai import OpenAIEngine
from cai.errors import CaiError, ConfigError, ContextLengthError, EngineError, RequestError
from cai.types import Completion, Message
from tests.server import Server, served


def engine(*servers: Server, **options: Any) -> OpenAIEngine:
    """One that knows what the first server can; the others are its replicas."""
    first, *others = (server.url for server in servers)
    built = build_engine(ModelConfig.model_validate({"model": first, "server": {**options, "replicas": others}}))
    assert isinstance(built, OpenAIEngine)
    assert built.fingerprint
    return built


async def ask(one: OpenAIEngine, text: str = "Hello?", seed: int = 1) -> Completion:
    return await one.generate(GenerateRequest((Message("user", text),), 4, 0.0, 1.0, seed))


async def failures(one: OpenAIEngine, text: str, count: int) -> list[type[CaiError]]:
    """What each of so many calls fails with, one after another."""
    found = []
    for seed in range(count):
        with pytest.raises(CaiError) as caught:
            await ask(one, text, seed)
        found.append(caught.type)
    return found


# -- refused ----------------------------------------------------------------------------------------------------------------


async def test_a_403_is_of_its_row_once_the_key_was_accepted_and_a_revoked_key_stops_the_run() -> None:
    with served(refuse="forbidden", refuse_status=403) as server:
        one = engine(server)
        with pytest.raises(RequestError, match=r"HTTP 403: this dialogue violates the mock's policy$"):
            await ask(one, "Say something forbidden")
        assert (await ask(one)).text
        server.control(refuse="Hello")
        kinds = await failures(one, "Hello?", FAILING + 1)
        assert [issubclass(kind, RequestError) for kind in kinds] == [True] * (FAILING - 1) + [False] * 2
        assert issubclass(kinds[-1], EngineError)
        await one.close()


def test_a_403_from_the_begin_is_the_keys() -> None:
    with (
        served(refuse="OK", refuse_status=403) as server,
        pytest.raises(ConfigError, match=r"HTTP 403: .*there is no key: set the environment variable OPENAI_API_KEY"),
    ):
        engine(server)


@pytest.mark.parametrize("status", [400, 422])
async def test_rows_that_are_refused_for_their_own_sake_do_not_stop_the_run(status: int) -> None:
    with served(refuse="forbidden", refuse_status=status) as server:
        one = engine(server)
        await ask(one)
        assert all(issubclass(kind, RequestError) for kind in await failures(one, "forbidden", FAILING + 5))
        assert (await ask(one, seed=2)).text
        await one.close()


async def test_requests_of_which_none_was_ever_good_stop_the_run() -> None:
    with served(refuse="forbidden") as server:
        one = engine(server)
        kinds = await failures(one, "forbidden", FAILING)
        assert [issubclass(kind, EngineError) for kind in kinds] == [False] * (FAILING - 1) + [True]
        await one.close()


async def test_prompts_that_are_too_long_never_stop_the_run() -> None:
    with served(context=200) as server:
        one = engine(server)
        assert set(await failures(one, "long " * 80, FAILING + 5)) == {ContextLengthError}
        assert (await ask(one)).text
        await one.close()


# -- waited for -------------------------------------------------------------------------------------------------------------


async def test_giving_up_is_counted_from_when_the_server_died() -> None:
    with served() as server:
        one = engine(server, give_up=2)
        await ask(one)
        await asyncio.sleep(2.2)
        server.control(die=True, dead_for=1.3)
        await asyncio.sleep(0.1)
        assert (await ask(one, seed=2)).text
        await one.close()


async def test_a_gateway_without_its_server_takes_no_requests_from_the_other_url() -> None:
    with served(latency=0.02) as good, served() as gone:
        one = engine(good, gone, concurrency=4)
        gone.control(away=True)
        await asyncio.gather(*(ask(one, seed=seed) for seed in range(100)))
        assert good.stats()["answered"] >= 100
        assert gone.stats()["statuses"]["502"] < 12
        await one.close()


async def test_a_retry_after_holds_back_every_call_and_only_at_its_url() -> None:
    with served(latency=0.02) as good, served(overload=1.0, retry_after="1.5") as busy:
        one = engine(good, busy, concurrency=4)
        began = time.monotonic()
        calls = [asyncio.ensure_future(ask(one, seed=seed)) for seed in range(60)]
        await asyncio.sleep(1.2)
        assert busy.stats()["calls"] <= 4, "what was under way when it first said so"
        assert good.stats()["answered"] > 50
        busy.control(overload=0.0)
        await asyncio.gather(*calls)
        assert time.monotonic() - began > 1.4
        assert busy.stats()["early"] == 0
        await one.close()


async def test_a_retry_after_beyond_what_is_waited_for_stops_the_run_where_there_is_no_other_url() -> None:
    with served() as good, served() as full:
        one, both = engine(full, give_up=30.0), engine(full, good, give_up=30.0)
        full.control(overload=1.0, retry_after="86400")
        with pytest.raises(EngineError, match=r"asks to wait 3600 s, more than policy\.server\.give_up; the same command"):
            await asyncio.wait_for(ask(one), 10)
        assert full.stats()["calls"] <= 20
        answers = await asyncio.wait_for(asyncio.gather(*(ask(both, seed=seed) for seed in range(8))), 20)
        assert all(answer.text for answer in answers)
        await one.close()
        await both.close()


# -- finding out ------------------------------------------------------------------------------------------------------------


def test_the_questions_honour_retry_after() -> None:
    with served(overload=0.5, retry_after="0.7", seed=0) as server:
        assert engine(server).capabilities == {"generate", "choice_logprobs", "loglikelihood"}
        stats = server.stats()
        assert stats["statuses"]["429"] >= 3
        assert stats["early"] == 0


def test_a_server_that_lists_its_models_and_never_answers_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.engines.http._PROBING", 0.3)
    with served(hang=1.0) as server:
        began = time.monotonic()
        with pytest.raises(ConfigError, match=r"/chat/completions: no answer within 0.3 s; see the server's log, or try later"):
            engine(server)
        assert time.monotonic() - began < 5


def test_a_server_that_only_fails_is_not_taken_for_one_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.engines.http._wait", wait_none())
    with served(error=1.0) as server:
        with pytest.raises(ConfigError, match=r"model 'mock' answers HTTP 500: the mock has an internal error$"):
            engine(server)
        assert server.stats()["calls"] == 5


@pytest.mark.parametrize(
    ("stumble", "offered"),
    [('"logprobs":true', {"generate"}), ('"prompt_logprobs"', {"generate", "choice_logprobs"})],
)
def test_a_question_that_always_gets_an_error_means_no(
    stumble: str, offered: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai.engines.http._wait", wait_none())
    with served(stumble=stumble, error_status=500) as server:
        assert engine(server).capabilities == offered


def test_a_server_that_goes_away_while_it_is_asked_is_not_taken_for_one_that_can_do_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cai.engines.http._wait", wait_none())
    monkeypatch.setattr("cai.engines.http._PROBING", 0.5)
    with served(fail_from=3, error_status=503) as server, pytest.raises(ConfigError, match="model 'mock' answers HTTP 503"):
        engine(server)

"""Answers of a form that no good server gives: each is an error of its call or no fact, and never a text or a traceback."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
from tenacity import wait_none

from cai.config import ModelConfig
from cai.engines import GenerateRequest, build_engine
from cai.engines.replies import Transient, counted, read_ids, read_texts, retry_after
from cai.errors import ConfigError, RequestError
from cai.servers import url_problem
from cai.types import Completion, Message
from tests.odd_server import Odd, answering

MODELS: Any = {"data": [{"id": "odd"}]}
GOOD: Any = {"choices": [{"message": {"content": "Fine."}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 3}}
DEEP = b"[" * 100_000


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.engines.http._wait", wait_none())


def form(said: Any) -> bytes:
    return said if isinstance(said, bytes) else json.dumps(said).encode()


async def asked(said: Any, headers: dict[str, str] | None = None) -> Completion:
    """What a call gets whose server answers its questions well, and then so."""

    def answer(path: str, body: bytes) -> Odd:
        if path.endswith("/models"):
            return Odd(form(MODELS))
        return Odd(form(GOOD)) if b"Say OK" in body else Odd(form(said), headers or {})

    with answering(answer) as url:
        one = build_engine(ModelConfig.model_validate({"model": url, "server": {"retries": 1, "api": "chat"}}))
        try:
            return await one.generate(GenerateRequest((Message("user", "Hello?"),), 4, 0.0, 1.0, 1))
        finally:
            await one.close()


@pytest.mark.parametrize(
    "said", [5, None, [], [1], "text", {}, {"choices": 5}, {"choices": [5]}, {"choices": [{"message": 5}]}, DEEP]
)
async def test_an_answer_of_another_form_is_tried_again_and_then_an_error(said: Any) -> None:
    with pytest.raises(RequestError, match="tried 2 times"):
        await asked(said)


@pytest.mark.parametrize("usage", [5, [1], {"prompt_tokens": None}, {"prompt_tokens": "many"}, {"prompt_tokens": -1}, None])
async def test_counts_that_are_none_are_estimated(usage: Any) -> None:
    answer = await asked({**GOOD, "usage": usage})
    assert (answer.text, answer.completion_tokens) == ("Fine.", 1)
    assert answer.prompt_tokens > 3


def test_an_infinite_count_is_none() -> None:
    assert counted({"usage": {"prompt_tokens": float("inf")}}, "prompt_tokens", 7) == 7
    assert counted({"usage": {"prompt_tokens": 2**70}}, "prompt_tokens", 7) == 7
    assert counted({"usage": {"prompt_tokens": 12.0}}, "prompt_tokens", 7) == 12


async def test_of_an_answer_in_parts_the_texts_are_taken() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": "Fi"}]
    content = [*parts, {"type": "text", "text": "ne."}]
    assert (await asked({"choices": [{"message": {"content": content}}]})).text == "Fine."
    with pytest.raises(RequestError, match="without a completion"):
        await asked({"choices": [{"message": {"content": ["text"]}}]})


async def test_an_answer_that_unpacks_to_too_much_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai.engines.replies._MOST_BYTES", 1_000_000)
    bomb = gzip.compress(b" " * 2_000_000)
    with pytest.raises(RequestError, match="an answer of more than 1 MB"):
        await asked(bomb, {"Content-Encoding": "gzip"})


@pytest.mark.parametrize("models", [5, {"data": 5}, {"data": [5]}, {"data": {"id": "odd"}}, {"data": [{"name": "odd"}]}])
def test_a_list_of_models_that_is_none_is_told(models: Any) -> None:
    with answering(lambda path, body: Odd(form(models))) as url:
        one = build_engine(ModelConfig.model_validate({"model": url}))
        with pytest.raises(ConfigError, match=r"does not list its models; name one by policy\.server\.name$"):
            assert one.fingerprint


def test_a_models_name_that_no_request_can_carry_is_mended() -> None:
    models = {"data": [{"id": "odd\ud800", "root": "\ud800"}]}
    with answering(lambda path, body: Odd(form(models if path.endswith("/models") else GOOD))) as url:
        assert build_engine(ModelConfig.model_validate({"model": url})).fingerprint.isprintable()


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize(
    "said",
    [
        [],
        {"choices": [{"logprobs": 5}], "usage": 5, "prompt_logprobs": 5, "tokens": 5},
        {"choices": [{"logprobs": {"content": [{"top_logprobs": [5, 5]}], "top_logprobs": [5]}}], "tokens": {"a": 1}},
    ],
)
def test_facts_that_have_another_form_are_no_facts(said: Any, api: str) -> None:
    with answering(lambda path, body: Odd(form(MODELS if path.endswith("/models") else said))) as url:
        one = build_engine(ModelConfig.model_validate({"model": url, "server": {"api": api}}))
        assert one.capabilities == {"generate"}


@pytest.mark.parametrize("name", [None, "odd"])
def test_a_url_that_lacks_its_version_is_told_so(name: str | None) -> None:
    with answering(lambda path, body: Odd(b'{"detail": "Not Found"}', status=404)) as url:
        bare = url.removesuffix("/v1")
        one = build_engine(ModelConfig.model_validate({"model": bare, "server": {"name": name}}))
        with pytest.raises(ConfigError, match=f"most servers have their API at {url}"):
            assert one.fingerprint
        one = build_engine(ModelConfig.model_validate({"model": url, "server": {"name": name}}))
        with pytest.raises(ConfigError) as caught:
            assert one.fingerprint
        assert "most servers" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("http:/127.0.0.1:8000/v1", "expected the base URL"),
        ("http://127.0.0.1:8000/v1/chat/completions", "without '/chat/completions'"),
        ("http://127.0.0.1:8000/v1/models/", "without '/models/'"),
    ],
)
def test_what_is_no_base_url_is_refused(url: str, problem: str) -> None:
    assert problem in (url_problem(url) or "")
    with pytest.raises(ValueError, match="URL"):
        ModelConfig.model_validate({"model": url})


def test_a_retry_after_that_is_no_number_is_none() -> None:
    assert retry_after("nan") == 0.0
    assert retry_after("inf") == 3600.0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.5, 1e308, 2**70])
def test_what_no_log_probability_can_be_is_none(value: float) -> None:
    top = [{"token": "A", "logprob": value}, {"token": "B", "logprob": -1.0}]
    said = {"choices": [{"logprobs": {"content": [{"top_logprobs": top}]}}]}
    by_id = json.loads(json.dumps(said).replace('"A"', '"token_id:7"'))
    for read in (lambda: read_texts(said, []), lambda: read_ids(by_id, [7], [])):
        with pytest.raises(Transient) as caught:
            read()
        assert caught.value.kind == "no numbers"


def test_a_log_probability_that_rounding_lifted_above_0_is_one() -> None:
    assert read_texts({"choices": [{"logprobs": {"top_logprobs": [{"A": 1e-6, "B": -20.0}]}}]}, []) == {"A": 1e-6, "B": -20.0}

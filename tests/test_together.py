"""Candidates of one prompt by one request: each its own choice, and the prompt paid for once."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cai.config import ModelConfig, Recipe
from cai.engines import GenerateRequest, build_engine
from cai.engines.openai import OpenAIEngine
from cai.engines.replies import Transient, read_completions
from cai.engines.together import Together
from cai.errors import RequestError
from cai.pipeline import generate
from cai.types import Completion, Message
from tests.runs import data_bytes, manifest, recipe, rows
from tests.server import Server, served

CHAT = "/v1/chat/completions"
PROMPTS, CANDIDATES = 3, 4


@pytest.fixture
def server() -> Iterator[Server]:
    with served() as running:
        yield running


def engine(server: Server, **options: Any) -> OpenAIEngine:
    """An engine that has probed the server already, whose counters are empty."""
    built = build_engine(ModelConfig.model_validate({"model": server.url, "server": {"n": True, **options}}))
    assert isinstance(built, OpenAIEngine)
    assert built.facts
    server.control(clear=True)
    return built


def asked(seed: int, text: str = "Hello?", **fields: Any) -> GenerateRequest:
    return GenerateRequest(
        (Message("user", text),), **{"max_tokens": 8, "temperature": 0.7, "top_p": 1.0, "seed": seed, **fields}
    )


def many(seeds: range, text: str = "Hello?", **fields: Any) -> list[GenerateRequest]:
    return [asked(seed, text, **fields) for seed in seeds]


async def answers(one: OpenAIEngine, requests: list[GenerateRequest]) -> list[Any]:
    try:
        return await asyncio.gather(*map(one.generate, requests), return_exceptions=True)
    finally:
        await one.close()


async def test_requests_that_differ_in_the_seed_alone_are_one_and_the_prompt_is_paid_for_once(server: Server) -> None:
    found = await answers(engine(server), many(range(5, 9)))
    stats = server.stats()
    assert stats["paths"] == {CHAT: 1}
    assert len({one.text for one in found}) == 4
    assert [one.prompt_tokens for one in found] == [stats["prompt_tokens"], 0, 0, 0]
    assert [one.completion_tokens for one in found] == [8] * 4
    assert {one.seed for one in found} == {5}, "the seed that was sent"
    assert found[0].text == (await answers(engine(server), [asked(5)]))[0].text


async def test_what_differs_in_more_or_is_greedy_goes_alone(server: Server) -> None:
    different = [asked(1), asked(2, "Bye?"), asked(3, max_tokens=9), asked(4, top_p=0.5), asked(5, stop=("x",))]
    greedy = many(range(2), temperature=0.0)
    alone = await answers(engine(server, n=False), [*different, *greedy])
    assert await answers(engine(server), [*different, *greedy]) == alone
    assert server.stats()["paths"] == {CHAT: 7}


async def test_more_than_a_server_takes_are_several_requests(server: Server) -> None:
    found = await answers(engine(server), many(range(300)))
    assert server.stats()["paths"] == {CHAT: 3}
    assert len({one.text for one in found}) > 250
    assert [index for index, one in enumerate(found) if one.prompt_tokens] == [0, 128, 256]


async def test_what_the_server_leaves_out_is_asked_for_singly() -> None:
    with served(choices=2) as server:
        found = await answers(engine(server), many(range(5)))
        assert server.stats()["paths"] == {CHAT: 4}
        assert server.stats()["prompt_tokens"] == sum(one.prompt_tokens for one in found)
        assert found[2:] == await answers(engine(server, n=False), many(range(2, 5)))


@pytest.mark.parametrize("api", ["chat", "completions"])
async def test_texts_that_end_by_themselves_and_plain_completions(server: Server, api: str) -> None:
    found = await answers(engine(server, api=api), many(range(3), max_tokens=100))
    assert {one.finish_reason for one in found} == {"stop"}
    assert sum(one.completion_tokens for one in found) == server.stats()["completion_tokens"] == 3 * 64


async def test_a_refusal_is_told_to_each() -> None:
    with served(refuse="forbidden") as server:
        found = await answers(engine(server), many(range(3), "forbidden"))
        assert [type(one) for one in found] == [RequestError] * 3
        assert server.stats()["calls"] == 1


async def test_one_that_is_cancelled_leaves_the_others(server: Server) -> None:
    server.control(latency=0.2)
    one = engine(server)
    tasks = [asyncio.ensure_future(one.generate(request)) for request in many(range(3))]
    await asyncio.sleep(0.1)
    tasks[0].cancel()
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in done] == [asyncio.CancelledError, Completion, Completion]
    await one.close()


async def test_closing_ends_what_waits() -> None:
    async def ask(request: GenerateRequest, count: int) -> Any:
        await asyncio.sleep(3600)

    together = Together(ask)
    under_way = asyncio.ensure_future(together.generate(asked(1)))
    await asyncio.sleep(0.01)
    gathered = asyncio.ensure_future(together.generate(asked(2)))
    await asyncio.sleep(0)
    await together.close()
    for task in (under_way, gathered):
        with pytest.raises(asyncio.CancelledError):
            await task


# -- runs -----------------------------------------------------------------------------------------------------------------


def on(server: Server, **options: Any) -> Recipe:
    generation = {"candidates": CANDIDATES, "pairs": "samples", "rounds": 0, "max_tokens": 20}
    policy = {"model": server.url, "server": {"n": True, **options}}
    return recipe(policy=policy, generation=generation, prompts={"limit": PROMPTS}, judge={"principles": 1})


def candidates(out: Path) -> list[str]:
    return [one["text"] for row in rows(out, "trace") for one in row["candidates"]]


def test_a_run_pays_for_each_prompt_once(server: Server, tmp_path: Path) -> None:
    single = generate(on(server, n=False), tmp_path / "single")["usage"]["policy"]
    together = generate(on(server), tmp_path / "together")["usage"]["policy"]
    assert together["prompt_tokens"] * CANDIDATES == single["prompt_tokens"]
    assert (together["calls"], together["completion_tokens"]) == (single["calls"], single["completion_tokens"])
    assert manifest(tmp_path / "together")["policy"] == "openai:mock=weights/mock chat n"
    assert len(set(candidates(tmp_path / "together"))) == PROMPTS * CANDIDATES


def test_a_run_that_lacks_one_candidate_asks_for_that_one_alone(server: Server, tmp_path: Path) -> None:
    generate(on(server), tmp_path / "run")
    before = candidates(tmp_path / "run")
    with closing(sqlite3.connect(tmp_path / "run" / "run" / "journal.sqlite")) as db, db:
        unpaid = "SELECT key FROM calls WHERE role='policy' AND prompt_tokens=0 LIMIT 1"
        assert db.execute(f"DELETE FROM calls WHERE key IN ({unpaid})").rowcount == 1
        db.execute("DELETE FROM records")
    again = generate(on(server), tmp_path / "run")
    changed = [new for old, new in zip(before, candidates(tmp_path / "run"), strict=True) if old != new]
    assert len(changed) == 1, "by its own seed now"
    assert again["usage"]["policy"]["calls"] == PROMPTS * CANDIDATES


def test_batches_hold_a_line_for_each_prompt_and_give_the_same(server: Server, tmp_path: Path) -> None:
    generate(on(server), tmp_path / "direct")
    generate(on(server, batch=True, batch_wait=0.1, batch_poll=0.05), tmp_path / "batch")
    assert next(iter(server.stats()["batches"]["sizes"].values())) == PROMPTS
    assert data_bytes(tmp_path / "batch") == data_bytes(tmp_path / "direct")


# -- answers --------------------------------------------------------------------------------------------------------------


def said(*choices: tuple[str, str], **usage: int) -> Any:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish} for text, finish in choices], "usage": usage}


def test_what_was_generated_is_shared_out_by_the_lengths_of_the_texts() -> None:
    whole = said(("a", "stop"), ("a" * 29, "length"), ("", "stop"), prompt_tokens=7, completion_tokens=11)
    found = read_completions(whole, asked(1), 40, 3)
    assert [(one.prompt_tokens, one.completion_tokens) for one in found if isinstance(one, Completion)] == [
        (7, 0),
        (0, 10),
        (0, 1),
    ]
    unknown = read_completions(said(("a" * 9, "stop"), ("b" * 9, "stop")), asked(1), 40, 2)
    assert [(one.prompt_tokens, one.completion_tokens) for one in unknown if isinstance(one, Completion)] == [(10, 2), (0, 3)]


def test_a_completion_that_is_none_takes_no_other_with_it() -> None:
    mixed = said(("x", "content_filter"), ("fine", "stop"), ("y", "error"), prompt_tokens=7, completion_tokens=9)
    filtered, fine = read_completions(mixed, asked(1), 40, 3)
    assert isinstance(filtered, RequestError)
    assert fine == Completion("fine", "stop", 7, 9, 1)
    with pytest.raises(RequestError, match="content filter"):
        read_completions(said(("x", "content_filter"), ("y", "error")), asked(1), 40, 2)
    for nothing in (said(), said(("y", "error")), {}, {"choices": None}, {"choices": ["x"]}):
        with pytest.raises(Transient):
            read_completions(nothing, asked(1), 40, 2)

"""An estimate's calls are the calls that a run makes; its tokens are about right."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from cai.config import Recipe
from cai.constitution import load_constitution
from cai.engines import ChoiceRequest, ScriptedEngine
from cai.errors import RowError
from cai.generation.estimate import estimate
from cai.generation.record import Generator
from cai.judging.choice import ChoiceJudge
from cai.prompts import Row, read_prompts
from cai.types import Message, Prompt

CONSTITUTION = load_constitution("harmless")


def recipe(**generation) -> Recipe:
    return Recipe.model_validate({"prompts": {"source": "red-team", "limit": 5}, "generation": generation})


def rows(*texts: str) -> list[Row]:
    return [Row(str(index), Prompt(str(index), (Message("user", text),)), None, "") for index, text in enumerate(texts)]


@pytest.mark.parametrize(
    "generation",
    [{}, {"rounds": 1, "exemplars": 0}, {"candidates": 3, "pairs": "both"}, {"candidates": 2, "rounds": 0, "pairs": "samples"}],
)
async def test_the_calls_are_those_a_run_makes_when_no_revision_fails(generation):
    asked = recipe(**generation)
    made: Counter[str] = Counter()

    def respond(request):
        if isinstance(request, ChoiceRequest):
            made["judge"] += 1
            return [-0.5, -0.6]
        made["policy"] += 1
        return f"A text of seed {request.seed}."

    engine = ScriptedEngine(respond)
    generator = Generator(asked, CONSTITUTION, engine, ChoiceJudge(engine, asked.judge, CONSTITUTION))
    for row in read_prompts(asked.prompts):
        await generator.make_record(row.prompt)
    told = estimate(asked, CONSTITUTION, read_prompts(asked.prompts))
    assert told.prompts == 5
    assert told.calls["judge"] == made["judge"] > 0
    assert told.calls["answer"] + told.calls["critique"] + told.calls["revision"] == made["policy"]


def test_tokens_are_within_a_tenth_of_those_of_texts_of_full_length():
    asked, sent = recipe(max_tokens=50), Counter()
    words = " ".join(principle.preference for principle in CONSTITUTION.comparing)

    def count(request):
        kind = "judge" if isinstance(request, ChoiceRequest) else "policy"
        sent[kind] += sum(len(message.content) for message in request.messages) / 4
        return [-0.5, -0.6] if kind == "judge" else words[request.seed % 1500 :][:200]

    engine = ScriptedEngine(count)
    generator = Generator(asked, CONSTITUTION, engine, ChoiceJudge(engine, asked.judge, CONSTITUTION))
    for row in read_prompts(asked.prompts):
        asyncio.run(generator.make_record(row.prompt))
    told = estimate(asked, CONSTITUTION, read_prompts(asked.prompts))
    assert told.policy_prompt_tokens == pytest.approx(sent["policy"], rel=0.1)
    assert told.judge_prompt_tokens == pytest.approx(sent["judge"], rel=0.1)
    assert told.policy_completion_tokens == 5 * 5 * 50


def test_bad_rows_are_counted_and_cost_nothing():
    bad = Row("x", None, RowError("no prompt"), "")
    told = estimate(recipe(), CONSTITUTION, [bad, *rows("a"), bad])
    assert (told.prompts, told.bad_rows) == (1, 2)
    assert told.calls == estimate(recipe(), CONSTITUTION, rows("a")).calls


def test_no_rows_cost_nothing():
    told = estimate(recipe(), CONSTITUTION, [])
    assert (told.prompts, told.policy_prompt_tokens, told.policy_completion_tokens, told.judge_prompt_tokens) == (0, 0, 0, 0)
    assert set(told.calls.values()) == {0}


def test_exemplars_rounds_and_longer_prompts_cost_more():
    def tokens(text="a" * 400, **generation):
        return estimate(recipe(**generation), CONSTITUTION, rows(text)).policy_prompt_tokens

    assert tokens(exemplars=0) < tokens(exemplars=1) < tokens()
    assert tokens(rounds=1) < tokens(rounds=2)
    assert tokens("a" * 40) < tokens()


def test_a_prompt_is_counted_as_often_as_it_is_sent():
    short, long = (estimate(recipe(rounds=2, candidates=3), CONSTITUTION, rows("a" * size)) for size in (400, 800))
    assert long.policy_prompt_tokens - short.policy_prompt_tokens == 100 * (3 + 2 + 2)
    assert long.judge_prompt_tokens - short.judge_prompt_tokens == 100 * long.calls["judge"] == 100 * 8
    assert long.policy_completion_tokens == short.policy_completion_tokens


GENERATED = [({"method": "reasoning", "max_tokens": 50}, 100), ({"method": "text"}, 24), ({}, 0)]


@pytest.mark.parametrize(("judge", "each"), GENERATED)
def test_what_the_judge_generates_is_told(judge, each):
    asked = Recipe.model_validate({"judge": {**judge, "principles": 1}})
    assert estimate(asked, CONSTITUTION, rows("Hi")).judge_completion_tokens == each, "in two orders"

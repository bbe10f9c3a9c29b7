"""The likelihood judge: the arithmetic of its ratios, how few calls it makes, and a real model's own numbers."""

from __future__ import annotations

import asyncio
import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai.config import JudgeConfig, ModelConfig
from cai.engines import Loglikelihood, LoglikelihoodRequest, ScriptedEngine
from cai.engines.transformers import TransformersEngine
from cai.errors import VerdictError
from cai.judging.likelihood import LikelihoodJudge
from cai.types import Message
from tests.judges import ASKED, DIALOGUE, assert_golden, assert_turns, compare, principle, recorded, sigmoid
from tests.records import HOSTILE
from tests.tiny_model import make_tiny_model

HELD, VIOLATED = "someone would choose", "someone would reject"


def judge(function, length="mean"):
    engine, asked = recorded(function)
    return LikelihoodJudge(engine, JudgeConfig(method="likelihood", length=length)), asked


def planted(ratios):
    """The log-likelihood where a principle is held exceeds the other by the continuation's ratio."""

    def respond(request):
        assert (HELD in request.messages[-1].content) != (VIOLATED in request.messages[-1].content)
        number = 2 if "by 2" in request.messages[-1].content else 1
        return -20.0 + (number * ratios[request.continuation] if HELD in request.messages[-1].content else 0.0)

    return respond


finite = st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=60)
@given(st.tuples(finite, finite), st.sampled_from(["mean", "sum"]))
def test_a_swapped_verdict_is_the_verdict_on_the_swapped_pair(ratios, length):
    function = planted({"one": ratios[0], "other two": ratios[1]})
    principles = [principle(1, 0.7), principle(2, 1.9)]
    assert_turns(lambda: judge(function, length)[0], "one", "other two", principles)


@pytest.mark.parametrize(("length", "difference"), [("sum", 3.0 - 2.0), ("mean", 3.0 / 4 - 2.0 / 1)])
def test_planted_ratios_are_recovered(length, difference):
    """Of four tokens and of one; the sum prefers what the mean does not."""
    one, _ = judge(planted({"four words are here": 3.0, "one": 2.0}), length)
    found = compare(one, "four words are here", "one")
    assert found.probability == pytest.approx(sigmoid(difference), abs=1e-11)
    (only,) = found.principles
    assert only.readings == ((3.0, 2.0) if length == "sum" else (0.75, 2.0),)
    assert (only.judge, only.flipped) == ("likelihood", False)


def test_principles_are_averaged_by_weight():
    one, _ = judge(planted({"a": 1.0, "b": 0.0}))
    found = compare(one, "a", "b", [principle(1, 3.0), principle(2, 1.0)])
    assert found.probability == pytest.approx((3 * sigmoid(1) + sigmoid(2)) / 4, abs=1e-11)


def test_each_completion_is_asked_once_under_each_principle_however_many_pairs_it_is_in():
    texts = [f"completion {number}" for number in range(6)]
    one, asked = judge(planted(dict.fromkeys(texts, 1.0)))
    principles = [principle(1), principle(2)]

    async def all_pairs():
        named = list(enumerate(texts))
        pairs = [((f"candidate-{i}", a), (f"candidate-{j}", b)) for (i, a), (j, b) in combinations(named, 2)]
        return await asyncio.gather(*(one.compare(ASKED, pair, principles, "samples", 0) for pair in pairs))

    assert len(asyncio.run(all_pairs())) == 15
    assert len(set(asked)) == len(asked) == 6 * 2 * 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_no_verdict(bad):
    class Bad(ScriptedEngine):
        async def loglikelihood(self, request):
            return Loglikelihood(bad if HELD in request.messages[-1].content else -1.0, 3, 0)

    with pytest.raises(VerdictError, match="q1"):
        compare(LikelihoodJudge(Bad(None), JudgeConfig(method="likelihood")))


@pytest.mark.parametrize("name", ["held", "violated"])
def test_the_dialogue_as_the_judge_reads_it(name):
    one, asked = judge(lambda request: -1.0)
    compare(one, prompt=DIALOGUE)
    words = HELD if name == "held" else VIOLATED
    (wanted,) = {request.messages for request in asked if words in request.messages[-1].content}
    assert wanted[:-1] == DIALOGUE[:-1]
    assert_golden(wanted, f"judge_likelihood_{name}.txt")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_scored_as_they_are(text):
    one, asked = judge(lambda request: -1.0)
    compare(one, text, "other", prompt=(Message("user", text),))
    assert {request.continuation for request in asked} == {text, "other"}
    for request in asked:
        (turn,) = request.messages
        assert turn.content.startswith(f"{text}\n\n(Give the answer that someone would ")
        assert turn.content.endswith("who is asked: Which is better by 1?)")


async def test_on_a_real_model_a_ratio_is_that_of_two_plain_passes(tmp_path):
    folder = make_tiny_model(tmp_path)
    engine = TransformersEngine(ModelConfig(model=str(folder), dtype="float32"))
    asked = []

    class Watched(ScriptedEngine):
        async def loglikelihood(self, request):
            asked.append(request)
            return await engine.loglikelihood(request)

    one = LikelihoodJudge(Watched(None), JudgeConfig(method="likelihood", length="sum"))
    pair = (("candidate-0", "The answer is A."), ("candidate-1", "B or A? The answer is B."))
    found = await one.compare(ASKED, pair, [principle(1)], "samples", 0)
    await engine.close()

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def plain(request: LoglikelihoodRequest) -> float:
        start = f"<|im_start|>user\n{request.messages[0].content}<|im_end|>\n<|im_start|>assistant\n"
        before = len(tokenizer(start, add_special_tokens=False)["input_ids"])
        ids = tokenizer(start + request.continuation, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
        return float(sum(logprobs[index - 1, ids[index]] for index in range(before, len(ids))))

    ratios = {}
    for request in asked:
        sign = 1 if HELD in request.messages[0].content else -1
        ratios[request.continuation] = ratios.get(request.continuation, 0.0) + sign * plain(request)
    expected = tuple(ratios[text] for _, text in pair)
    assert found.principles[0].readings[0] == pytest.approx(expected, abs=5e-3)

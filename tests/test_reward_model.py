"""The engine of reward models on a tiny random classifier, alone and in batches; and the judge that asks it."""

from __future__ import annotations

import asyncio
import json
import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from cai.config import ModelConfig
from cai.engines import GenerateRequest, Reward, RewardRequest, ScriptedEngine, build_engine
from cai.engines.reward_model import RewardModelEngine
from cai.errors import CapabilityError, ConfigError, ContextLengthError, EngineError, VerdictError
from cai.judging.reward_model import RewardModelJudge
from cai.pipeline import label, plan_labels, read_records
from cai.types import Message
from tests.judges import ASKED, DIALOGUE, assert_turns, compare, principle, recorded, sigmoid
from tests.records import HOSTILE
from tests.runs import SCRIPTED, manifest, quarantine, recipe, written_rows
from tests.tiny_model import make_tiny_model, tiny_config

ANSWERS = ["A.", "The answer is B.", "Which completion is better? " * 6, "B or A", "no " * 40, "A, since it is better."]


def make_reward_model(folder, labels=1, context=2048, pad=True):
    """A tiny random classifier behind the tiny model's tokenizer."""
    make_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = tiny_config(tokenizer, context, num_labels=labels, pad_token_id=tokenizer.pad_token_id if pad else None)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_reward_model(tmp_path_factory.mktemp("reward"))


def engine(folder, **options):
    return RewardModelEngine(ModelConfig(model=str(folder), **{"dtype": "float32", "device": "cpu"} | options))


def request(text, prompt=ASKED):
    return RewardRequest((*prompt, Message("assistant", text)))


def turns(text):
    return [{"role": turn.role, "content": turn.content} for turn in request(text).messages]


async def rewards(one, texts=ANSWERS):
    found = await asyncio.gather(*(one.reward(request(text)) for text in texts))
    return [answer.reward for answer in found]


async def test_rewards_are_those_of_transformers(tiny):
    one = engine(tiny)
    model = AutoModelForSequenceClassification.from_pretrained(tiny, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for text in ANSWERS:
        ids = tokenizer.apply_chat_template(turns(text), return_tensors="pt", return_dict=True)
        with torch.no_grad():
            expected = float(model(**ids).logits[0, 0])
        answer = await one.reward(request(text))
        assert answer.reward == pytest.approx(expected, abs=1e-5)
        assert answer.computed_tokens == ids["input_ids"].shape[1]
    await one.close()


@pytest.mark.parametrize("pad", [True, False], ids=["with a padding token", "without"])
async def test_a_batch_is_as_each_alone(tmp_path, pad):
    folder = make_reward_model(tmp_path, pad=pad)
    together, alone = engine(folder), engine(folder, batch_size=1)
    batches = []
    forward = together._forward
    together._forward = lambda batch: batches.append(len(batch)) or forward(batch)
    found = await rewards(together)
    assert found == pytest.approx([(await alone.reward(request(text))).reward for text in ANSWERS], abs=1e-5)
    assert len(set(found)) == len(ANSWERS)
    assert batches == [len(ANSWERS)]
    await together.close()
    await alone.close()


async def test_exact_mode_computes_each_alone_and_does_not_depend_on_neighbours(tiny):
    one = engine(tiny, exact=True, dtype="auto")
    batches = []
    forward = one._forward
    one._forward = lambda batch: batches.append(len(batch)) or forward(batch)
    crowd = await rewards(one)
    assert batches == [1] * len(ANSWERS)
    assert [await one.reward(request(text)) for text in ANSWERS] == [
        Reward(reward, len(one._model.encode(turns(text))[0])) for reward, text in zip(crowd, ANSWERS, strict=True)
    ]
    await one.close()


@pytest.mark.parametrize(("options", "widest"), [({"batch_size": 2}, 2), ({"batch_tokens": 1}, 1)])
async def test_batches_keep_to_both_limits(tiny, options, widest):
    one, batches = engine(tiny, **options), []
    forward = one._forward
    one._forward = lambda batch: batches.append(len(batch)) or forward(batch)
    await rewards(one)
    assert max(batches) == widest
    assert sum(batches) == len(ANSWERS)
    await one.close()


async def test_texts_cannot_speak_the_templates_tokens(tiny):
    one = engine(tiny)
    for text in HOSTILE:
        found = await one.reward(request(text, (Message("user", text),)))
        assert math.isfinite(found.reward)
    honest, ended = await rewards(one, ["< |im_end|>", "<|im_end|>"])
    assert honest == pytest.approx(ended, abs=1e-5)
    await one.close()


async def test_a_dialogue_beyond_the_context_fails_alone(tmp_path):
    one = engine(make_reward_model(tmp_path, context=64))
    good, bad = await asyncio.gather(one.reward(request("A")), one.reward(request("long " * 100)), return_exceptions=True)
    assert isinstance(good, Reward)
    assert isinstance(bad, ContextLengthError)
    assert "the context of" in str(bad)
    await one.close()


@pytest.mark.parametrize("labels", [2, 3])
async def test_a_classifier_of_several_labels_is_refused(tmp_path, labels):
    with pytest.raises(ConfigError, match=f"has {labels} outputs; expected 1, as a reward model has"):
        await engine(make_reward_model(tmp_path, labels=labels)).reward(request("A"))


async def test_a_model_without_a_chat_template_is_refused(tmp_path):
    (make_reward_model(tmp_path) / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="no chat template"):
        await engine(tmp_path).reward(request("A"))


async def test_weights_that_do_not_load_stop_the_run(tmp_path):
    (make_reward_model(tmp_path) / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(EngineError, match="could not be loaded"):
        await engine(tmp_path).reward(request("A"))


def test_what_is_no_model_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        engine(tmp_path / "nowhere")


async def test_it_offers_rewards_and_nothing_else(tiny):
    one = build_engine(ModelConfig(model=str(tiny), device="cpu"), reward=True)
    assert isinstance(one, RewardModelEngine)
    assert one.capabilities == {"reward"}
    assert one.revision is None
    with pytest.raises(CapabilityError, match="does not offer generate; it offers reward"):
        await one.generate(GenerateRequest(ASKED, 3, 0, 1, 0))


def test_the_fingerprint_follows_weights_dtype_and_exactness(tiny, tmp_path):
    prints = [engine(tiny).fingerprint, engine(tiny, exact=True).fingerprint, engine(tiny, dtype="bfloat16").fingerprint]
    folder = make_reward_model(tmp_path / "other")
    torch.manual_seed(9)
    config = LlamaConfig.from_pretrained(folder)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    prints.append(engine(folder).fingerprint)
    assert len(set(prints)) == 4


def test_the_fingerprint_is_that_of_the_model_wherever_it_lies(tmp_path):
    folder = make_reward_model(tmp_path / "one" / "model")
    shutil.copytree(folder, tmp_path / "two" / "model")
    assert engine(folder).fingerprint == engine(tmp_path / "two" / "model").fingerprint


async def test_closing_cancels_what_waits(tiny):
    one = engine(tiny)
    await one.reward(request("A"))
    waiting = asyncio.ensure_future(one.reward(request("B")))
    await asyncio.sleep(0)
    await one.close()
    (found,) = await asyncio.wait_for(asyncio.gather(waiting, return_exceptions=True), 10)
    assert isinstance(found, asyncio.CancelledError | Reward)


# --- the judge


finite = st.floats(-1e6, 1e6)


@settings(deadline=None, max_examples=60)
@given(finite, finite)
def test_a_swapped_verdict_is_the_verdict_on_the_swapped_pair(one, other):
    given_rewards = {"one": one, "other": other}
    assert_turns(lambda: RewardModelJudge(ScriptedEngine(lambda request: given_rewards[request.messages[-1].content])))


def test_the_difference_of_rewards_is_the_logit_and_there_is_one_row_whatever_the_principles_are():
    own, asked = recorded(lambda request: {"long text": 2.5, "text": 1.0}[request.messages[-1].content])
    found = compare(RewardModelJudge(own), principles=[principle(1), principle(2, 7.0)], prompt=DIALOGUE)
    assert found.probability == pytest.approx(sigmoid(1.5), abs=1e-11)
    (only,) = found.principles
    assert (only.principle_id, only.weight, only.readings, only.judge) == ("reward", 1.0, ((2.5, 1.0),), "reward-model")
    assert [request.messages[:-1] for request in asked] == [DIALOGUE] * 2


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_what_is_no_number_is_no_verdict(bad):
    with pytest.raises(VerdictError, match=r"reward.*finite"):
        compare(RewardModelJudge(ScriptedEngine(lambda request: bad)))


def pairs_of(folder, *chosen):
    given = [{"id": f"{n}", "prompt": f"Question {n}?", "chosen": text, "rejected": "no"} for n, text in enumerate(chosen)]
    return {"source": written_rows(folder, *given), "limit": None}


def test_a_run_asks_the_reward_model_once_a_completion_and_sets_aside_what_is_too_long(tmp_path):
    folder = make_reward_model(tmp_path / "reward", context=96)
    judge = {"model": str(folder), "method": "reward-model"}
    given = pairs_of(tmp_path, "A.", "long " * 200, "The answer is B.")
    one = recipe(judge=judge, prompts=given, policy={"model": "smollm2-135m", "dtype": "float32", "device": "cpu"})
    assert label(one, tmp_path / "run")["prompts"]["quarantined"] == {"too long for the context": 1}
    assert [row["prompt_id"] for row in quarantine(tmp_path / "run")] == ["1"]
    for record in read_records(tmp_path / "run"):
        ((reading,),) = (one.readings for one in record.verdicts[0].principles)
        assert record.verdicts[0].probability == pytest.approx(sigmoid(reading[0] - reading[1]), abs=1e-9)
    told = manifest(tmp_path / "run")
    assert told["judge"].startswith("reward-model:")
    assert told["usage"]["judge"]["calls"] in (4, 5)
    assert told["usage"]["judge"]["prompt_tokens"] > 0
    json.dumps(told)


def test_a_scripted_function_may_be_the_reward_model(tmp_path):
    (tmp_path / "model.py").write_text("def respond(request):\n    return float(len(request.messages[-1].content))\n")
    judge = {"model": f"scripted:{tmp_path}/model.py:respond", "method": "reward-model"}
    label(recipe(judge=judge, prompts=pairs_of(tmp_path, "yes", "a")), tmp_path / "run")
    found = [record.verdicts[0].probability for record in read_records(tmp_path / "run")]
    assert found == pytest.approx([sigmoid(1), sigmoid(-1)], abs=1e-9)


def test_a_reward_model_must_be_named(tmp_path):
    one = recipe(
        judge={"method": "reward-model"}, policy={"model": f"scripted:{SCRIPTED}:respond"}, prompts=pairs_of(tmp_path, "a")
    )
    with pytest.raises(ConfigError, match="name it by --judge-model"):
        plan_labels(one)

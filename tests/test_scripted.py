"""The scripted engine: what a function may return, what is refused, and how it is loaded from a file."""

from __future__ import annotations

import asyncio
import math

import pytest

from cai.config import ModelConfig
from cai.engines import (
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    Reward,
    RewardRequest,
    ScriptedEngine,
    build_engine,
)
from cai.engines.scripted import load_scripted
from cai.errors import CapabilityError, ConfigError, RequestError
from cai.types import Completion, Message

ASKED = (Message("system", "Be brief."), Message("user", "How are  you?"))
GENERATE = GenerateRequest(ASKED, max_tokens=5, temperature=1.0, top_p=1.0, seed=9)


async def test_a_text_becomes_a_completion_with_its_words_counted():
    engine = ScriptedEngine(lambda request: "very well, thanks")
    assert await engine.generate(GENERATE) == Completion("very well, thanks", "stop", 5, 3, 9)
    assert (await ScriptedEngine(lambda request: "").generate(GENERATE)).completion_tokens == 0


async def test_a_text_of_a_kind_of_its_own_becomes_a_plain_one():
    class Text(str): ...

    answer = await ScriptedEngine(lambda request: Text("well")).generate(GENERATE)
    assert type(answer.text) is str


async def test_a_completion_is_passed_on_as_it_is():
    given = Completion("cut", "length", 1, 2, None)
    assert await ScriptedEngine(lambda request: given).generate(GENERATE) is given


async def test_the_function_may_be_async_and_many_calls_may_wait_at_once():
    waiting = 0

    async def respond(request):
        nonlocal waiting
        waiting += 1
        while waiting < 3:
            await asyncio.sleep(0)
        return f"{request.seed}"

    engine = ScriptedEngine(respond)
    requests = [GenerateRequest(ASKED, 1, 1.0, 1.0, seed) for seed in range(3)]
    async with asyncio.timeout(5):
        assert [one.text for one in await asyncio.gather(*map(engine.generate, requests))] == ["0", "1", "2"]


async def test_choices_are_asked_prompt_by_prompt():
    asked = []

    def respond(request):
        asked.append(request)
        return (-len(asked), -0.5)

    found = await ScriptedEngine(respond).choice_logprobs([ASKED, ASKED[:1]], ["A", "B"])
    assert [one.logprobs for one in found] == [(-1.0, -0.5), (-2.0, -0.5)]
    assert [(one.messages, one.choices) for one in asked] == [(ASKED, ("A", "B")), (ASKED[:1], ("A", "B"))]


async def test_log_likelihood_counts_the_words_of_the_continuation():
    found = await ScriptedEngine(lambda request: -3).loglikelihood(LoglikelihoodRequest(ASKED, "one two"))
    assert found == Loglikelihood(-3.0, 2, 0)


async def test_a_reward_is_the_functions_number():
    asked = []
    engine = ScriptedEngine(lambda request: asked.append(request) or 3)
    assert await engine.reward(RewardRequest(ASKED)) == Reward(3.0, 0)
    assert asked == [RewardRequest(ASKED)]


@pytest.mark.parametrize("answer", [None, "x", math.nan, [1.0]])
async def test_a_reward_request_wants_a_number(answer):
    with pytest.raises(RequestError, match="to a RewardRequest; expected a number"):
        await ScriptedEngine(lambda request: answer).reward(RewardRequest(ASKED))


class Poet(Engine):
    """An engine that can do one thing only."""

    capabilities = frozenset({"generate"})
    fingerprint = "poet@1"
    revision = None

    async def generate(self, request: GenerateRequest) -> Completion:
        return Completion("roses", "stop", 1, 1)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("choice_logprobs", ([ASKED], "AB")), ("loglikelihood", (LoglikelihoodRequest(ASKED, "x"),)), ("reward", (ASKED,))],
)
async def test_what_an_engine_does_not_define_it_says_it_does_not_offer(call, arguments):
    assert (await Poet().generate(GENERATE)).text == "roses"
    await Poet().close()
    with pytest.raises(CapabilityError, match=f"poet@1 does not offer {call}; it offers generate"):
        await getattr(Poet(), call)(*arguments)


@pytest.mark.parametrize("answer", [None, 3, ["a"], b"text"])
async def test_a_generate_request_wants_a_text(answer):
    with pytest.raises(RequestError, match="expected a str"):
        await ScriptedEngine(lambda request: answer).generate(GENERATE)


@pytest.mark.parametrize("answer", [None, -0.5, [-0.5], [-0.5] * 3, "AB", "12", [None, None], ["x", "y"]])
async def test_a_choice_request_wants_a_number_for_each_choice(answer):
    with pytest.raises(RequestError, match="expected 2 numbers"):
        await ScriptedEngine(lambda request: answer).choice_logprobs([ASKED], ["A", "B"])


@pytest.mark.parametrize("answer", [None, "x", math.nan, [1.0]])
async def test_a_loglikelihood_request_wants_a_number(answer):
    with pytest.raises(RequestError, match="expected a number"):
        await ScriptedEngine(lambda request: answer).loglikelihood(LoglikelihoodRequest(ASKED, "x"))


async def test_what_the_function_raises_comes_through():
    def respond(request):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await ScriptedEngine(respond).generate(GENERATE)


SCRIPT = """
import functools
WORD = "hello"
def respond(request):
    return WORD
def answer(request):
    return "other"
number = 3
"""


async def test_a_file_is_loaded_and_its_content_is_the_fingerprint(tmp_path):
    file = tmp_path / "my script.py"
    file.write_text(SCRIPT)
    engine = build_engine(ModelConfig(model=f"scripted:{file}:respond"))
    assert (await engine.generate(GENERATE)).text == "hello"
    again, other = load_scripted(f"{file}:respond"), load_scripted(f"{file}:answer")
    assert engine.fingerprint == again.fingerprint != other.fingerprint
    assert str(tmp_path) not in engine.fingerprint
    file.write_text(SCRIPT.replace("hello", "goodbye"))
    assert load_scripted(f"{file}:respond").fingerprint != engine.fingerprint


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("script.py", "expected scripted:FILE.py:FUNCTION"),
        ("script:respond", "expected scripted:FILE.py:FUNCTION"),
        ("", "expected scripted:FILE.py:FUNCTION"),
        ("absent.py:respond", "there is no file absent.py"),
        ("script.py:respnd", "no function 'respnd' (did you mean 'respond'?)"),
        ("script.py:number", "no function 'number'"),
        ("script.py:", "no function ''"),
        ("broken.py:respond", "broken.py failed to run: ZeroDivisionError"),
        ("syntax.py:respond", "syntax.py failed to run: SyntaxError"),
        ("leaves.py:respond", "leaves.py failed to run: SystemExit: 3"),
    ],
)
def test_a_target_that_cannot_be_says_why(tmp_path, monkeypatch, target, message):
    monkeypatch.chdir(tmp_path)
    for name, text in {"script": SCRIPT, "broken": "1 / 0", "syntax": "def", "leaves": "raise SystemExit(3)"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_scripted(target)
    assert str(caught.value).startswith(f"scripted:{target}: ")
    assert message in str(caught.value)

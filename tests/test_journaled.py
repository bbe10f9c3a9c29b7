"""The journal around an engine: no finished call is made twice, and what could not be read back is never kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cai.engines import (
    ChoiceLogprobs,
    ChoiceRequest,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    PartlyAnswered,
    Reward,
    RewardRequest,
    ScriptedEngine,
)
from cai.errors import BudgetError, EngineError, Interrupted, RequestError, StoreError, VerdictError
from cai.generation import Budget, JournaledEngine, Tally
from cai.servers import BudgetConfig
from cai.store import Database, RoleUsage
from cai.types import Completion, Message
from tests.records import HOSTILE

ASK = GenerateRequest((Message("user", "q"),), 16, 1.0, 1.0, 7)
QUESTIONS = [(Message("user", f"question {number}"),) for number in range(4)]
SURE = LoglikelihoodRequest((Message("user", "q"),), "an answer")


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "journal.sqlite")
    yield database
    database.close()


class Asked:
    """A scripted function that remembers what it was asked."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer, self.requests = answer, []

    def __call__(self, request: Any) -> Any:
        self.requests.append(request)
        return self.answer(request)


def journaled(database: Database, answer: Any, name: str = "scripted") -> tuple[JournaledEngine, Asked, Tally]:
    asked, tally = Asked(answer if callable(answer) else lambda _: answer), Tally()
    return JournaledEngine(ScriptedEngine(asked, name), database, "policy", tally), asked, tally


# --- paid once


async def test_a_finished_completion_comes_from_the_journal(database):
    first, asked, tally = journaled(database, "an answer")
    completion = await first.generate(ASK)
    assert completion == Completion("an answer", "stop", 1, 2, 7)
    again, never, later = journaled(database, "another answer")
    assert await again.generate(ASK) == completion
    assert (len(asked.requests), never.requests) == (1, [])
    assert (tally.calls_made, tally.calls_replayed, tally.prompt_tokens, tally.completion_tokens) == (1, 0, 1, 2)
    assert (later.calls_made, later.calls_replayed, later.prompt_tokens) == (0, 1, 0)
    assert database.usage() == {"policy": RoleUsage(1, 1, 2)}


@pytest.mark.parametrize(
    "change",
    [
        {"messages": (Message("user", "q "),)},
        {"messages": (Message("system", "q"),)},
        {"messages": (Message("user", "q"), Message("user", ""))},
        {"max_tokens": 17},
        {"temperature": 0.9},
        {"top_p": 0.9},
        {"seed": 8},
        {"stop": ("\n",)},
    ],
)
async def test_whatever_changes_in_a_request_makes_another_call(database, change):
    engine, asked, _ = journaled(database, "a")
    await engine.generate(ASK)
    await engine.generate(msgspec.structs.replace(ASK, **change))
    assert len(asked.requests) == 2


async def test_another_engine_makes_another_call(database):
    for name in ("model@1", "model@2"):
        engine, asked, _ = journaled(database, "a", name)
        await engine.generate(ASK)
        assert len(asked.requests) == 1
    assert engine.fingerprint == "model@2"
    assert "choice_logprobs" in engine.capabilities


async def test_kinds_of_requests_do_not_meet(database):
    engine, asked, _ = journaled(database, lambda request: [-1.0] if isinstance(request, ChoiceRequest) else -1.0)
    await engine.choice_logprobs([SURE.messages], ["an answer"])
    await engine.loglikelihood(SURE)
    assert [type(request) for request in asked.requests] == [ChoiceRequest, LoglikelihoodRequest]


async def test_a_principle_more_pays_only_for_itself_and_the_order_stays(database):
    def answer(request: ChoiceRequest) -> list[float]:
        number = int(request.messages[0].content.split()[1])
        return [-float(number), -0.1]

    engine, asked, tally = journaled(database, answer)
    await engine.choice_logprobs([QUESTIONS[2], QUESTIONS[0]], ("A", "B"))
    answers = await engine.choice_logprobs(QUESTIONS, ("A", "B"))
    assert [answer.logprobs for answer in answers] == [(0.0, -0.1), (-1.0, -0.1), (-2.0, -0.1), (-3.0, -0.1)]
    assert [request.messages for request in asked.requests] == [QUESTIONS[index] for index in (2, 0, 1, 3)]
    assert (tally.calls_made, tally.calls_replayed) == (4, 2)
    await engine.choice_logprobs(QUESTIONS, ("B", "A"))
    assert tally.calls_made == 8, "other choices are another question"


async def test_a_log_likelihood_is_kept(database):
    engine, asked, _ = journaled(database, -12.5)
    assert await engine.loglikelihood(SURE) == await engine.loglikelihood(SURE) == Loglikelihood(-12.5, 2, 0)
    assert len(asked.requests) == 1


async def test_a_reward_is_kept(database):
    engine, asked, tally = journaled(database, 2.5)
    rated = RewardRequest((*SURE.messages, Message("assistant", "an answer")))
    assert await engine.reward(rated) == await engine.reward(rated) == Reward(2.5, 0)
    assert asked.requests == [rated]
    assert (tally.calls_made, tally.calls_replayed) == (1, 1)


class Computing:
    """An engine that says what it computed."""

    fingerprint, capabilities = "computing", frozenset({"loglikelihood", "reward"})

    async def loglikelihood(self, request: Any) -> Loglikelihood:
        return Loglikelihood(-3.5, 2, 40)

    async def reward(self, request: Any) -> Reward:
        return Reward(-0.5, 60)


async def test_the_tokens_that_were_computed_are_counted_once(database):
    tally = Tally()
    engine = JournaledEngine(Computing(), database, "judge", tally)  # type: ignore[arg-type]
    for _ in range(2):
        assert await engine.loglikelihood(SURE) == Loglikelihood(-3.5, 2, 40)
        assert await engine.reward(RewardRequest(SURE.messages)) == Reward(-0.5, 60)
    assert (tally.prompt_tokens, tally.calls_made, tally.calls_replayed) == (100, 2, 2)
    assert database.usage() == {"judge": RoleUsage(2, 100, 0)}


@pytest.mark.parametrize("number", [0.1 + 0.2, 1e-320, 1.7976931348623157e308, -0.0, 3])
async def test_numbers_come_back_to_the_last_digit(database, number):
    engine, _, _ = journaled(database, lambda _: [number, -1.0])
    [first] = await engine.choice_logprobs([QUESTIONS[0]], ("A", "B"))
    [again] = await engine.choice_logprobs([QUESTIONS[0]], ("A", "B"))
    assert repr(first.logprobs) == repr(again.logprobs)


@pytest.mark.parametrize("text", ["", *HOSTILE])
async def test_texts_come_back_to_the_letter(database, text):
    engine, asked, _ = journaled(database, text)
    assert (await engine.generate(ASK)).text == (await engine.generate(ASK)).text == text
    assert len(asked.requests) == 1


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a \ud83d b", "a \ufffd b"),
        ("\udcff\udcfe", "\ufffd\ufffd"),
        ("a pair \ud83d\ude00", "a pair 😀"),
        ("\ufeff\ud800", "\ufeff\ufffd"),
    ],
)
async def test_lone_surrogates_become_the_replacement_character(database, given, kept):
    engine, _, _ = journaled(database, given)
    assert (await engine.generate(ASK)).text == (await engine.generate(ASK)).text == kept


# --- what is refused


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Completion(5, "stop", 1, 1), "expected a completion with a text"),
        (Completion(b"bytes", "stop", 1, 1), "expected a completion with a text"),
        (Completion("a", "done", 1, 1), "not a completion: Invalid enum value 'done'"),
        (Completion("a", "stop", "1", 1), "not a completion: Expected `int`, got `str`"),
        (Completion("a", "stop", None, 1), "not a completion"),
        (Completion("a", "stop", -1, 1), "not negative"),
        (Completion("a", "stop", 1, 1 << 63), "lie below 2**63"),
        (Completion("a", "stop", 1, 1, 1 << 63), "lie below 2**63"),
        (Completion("a", "stop", 1, 1, 0.5), "not a completion"),
    ],
)
async def test_what_could_not_be_read_back_is_refused_and_not_kept(database, answer, problem):
    engine, _, tally = journaled(database, answer)
    with pytest.raises(RequestError) as caught:
        await engine.generate(ASK)
    assert problem in str(caught.value)
    assert (database.count_calls(), tally.calls_made, tally.in_flight) == (0, 0, 0)


class Broken:
    """An engine whose choices are not what they should be."""

    fingerprint, choice_form, capabilities = "broken", "", frozenset({"choice_logprobs"})

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    async def choice_logprobs(self, prompts: Any, choices: Any) -> Any:
        return self.answers

    async def loglikelihood(self, request: Any) -> Any:
        return self.answers

    async def reward(self, request: Any) -> Any:
        return self.answers


def broken(database: Database, answers: Any) -> JournaledEngine:
    engine: Engine = Broken(answers)  # type: ignore[assignment]
    return JournaledEngine(engine, database, "judge", Tally())


@pytest.mark.parametrize("bad", [(float("nan"), -1.0), (-1.0, float("-inf")), (-1.0,), (-1.0, "-1"), (-1.0, None), ()])
async def test_a_bad_number_is_a_verdict_error_and_its_good_neighbours_are_kept(database, bad):
    answers = [ChoiceLogprobs(logprobs, 5) for logprobs in ((-1.0, -2.0), bad, (-3.0, -4.0))]
    with pytest.raises(VerdictError, match="expected 2 finite numbers, got"):
        await broken(database, answers).choice_logprobs(QUESTIONS[:3], ("A", "B"))
    assert database.usage() == {"judge": RoleUsage(2, 10, 0)}
    asked = broken(database, [ChoiceLogprobs((-5.0, -6.0), 5)])
    answered = await asked.choice_logprobs(QUESTIONS[:3], ("A", "B"))
    assert [answer.logprobs for answer in answered] == [(-1.0, -2.0), (-5.0, -6.0), (-3.0, -4.0)]


class Partly(Broken):
    """An engine that answers some prompts of a call, and fails at others."""

    async def choice_logprobs(self, prompts: Any, choices: Any) -> Any:
        raise PartlyAnswered(self.answers)


@pytest.mark.parametrize(
    ("failed", "told"),
    [
        ([RequestError("refused"), RequestError("again")], RequestError),
        ([RequestError("refused"), EngineError("the key is refused")], EngineError),
        ([ChoiceLogprobs((float("nan"), -1.0), 50), RequestError("refused")], VerdictError),
        ([asyncio.CancelledError(), RequestError("refused")], asyncio.CancelledError),
    ],
)
async def test_what_was_answered_beside_a_failure_is_kept_and_counts_in_the_budget(database, failed, told):
    prompts = [(Message("user", letter * 100),) for letter in "abcd"]
    outcomes = [ChoiceLogprobs((-1.0, -2.0), 50), ChoiceLogprobs((-3.0, -4.0), 50), *failed]
    tally = Tally()
    budget = Budget(BudgetConfig(tokens=320), {}, {}, tally)
    engine = JournaledEngine(Partly(outcomes), database, "judge", tally, budget)
    with pytest.raises(told):
        await engine.choice_logprobs(prompts, ("A", "B"))
    assert database.usage() == {"judge": RoleUsage(2, 100, 0)}
    assert (tally.calls_made, tally.prompt_tokens, tally.in_flight) == (2, 100, 0)
    with pytest.raises(BudgetError, match="of 320 tokens are spent"):  # 0.55 a byte: only those that were answered count
        await engine.choice_logprobs([(Message("user", "z" * 420),)], ("A", "B"))
    answered = JournaledEngine(Broken([]), database, "judge", Tally())
    assert [one.logprobs[0] for one in await answered.choice_logprobs(prompts[:2], ("A", "B"))] == [-1.0, -3.0]


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
async def test_a_log_likelihood_that_is_no_number_is_refused(database, bad):
    with pytest.raises(VerdictError):
        await broken(database, Loglikelihood(bad, 1, 0)).loglikelihood(SURE)
    assert database.count_calls() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "1"])
async def test_a_reward_that_is_no_number_is_refused(database, bad):
    with pytest.raises(VerdictError, match="expected 1 finite numbers"):
        await broken(database, Reward(bad, 1)).reward(RewardRequest(SURE.messages))
    assert database.count_calls() == 0


async def test_an_engine_that_answers_too_few_is_not_believed(database):
    with pytest.raises(ValueError, match="shorter"):
        await broken(database, [ChoiceLogprobs((-1.0, -2.0), 5)]).choice_logprobs(QUESTIONS, ("A", "B"))
    assert database.count_calls() == 0


async def test_what_the_function_raises_is_not_kept_and_asked_again(database):
    failures = iter([ValueError("once")])

    def answer(_: Any) -> str:
        for failure in failures:
            raise failure
        return "a"

    engine, asked, tally = journaled(database, answer)
    with pytest.raises(ValueError, match="once"):
        await engine.generate(ASK)
    assert tally.in_flight == 0
    assert (await engine.generate(ASK)).text == "a"
    assert len(asked.requests) == 2


# --- stopping


async def test_when_stopping_the_journal_still_answers_and_no_call_is_begun(database):
    engine, asked, tally = journaled(database, lambda request: [-1.0, -2.0] if isinstance(request, ChoiceRequest) else "a")
    await engine.generate(ASK)
    await engine.choice_logprobs(QUESTIONS[:2], ("A", "B"))
    tally.stopping = True
    assert (await engine.generate(ASK)).text == "a"
    await engine.choice_logprobs(QUESTIONS[:2], ("A", "B"))
    with pytest.raises(Interrupted):
        await engine.generate(msgspec.structs.replace(ASK, seed=8))
    with pytest.raises(Interrupted):
        await engine.choice_logprobs(QUESTIONS, ("A", "B"))
    assert len(asked.requests) == 3


async def test_a_call_in_flight_finishes_and_is_kept(database):
    gate = asyncio.Event()

    async def answer(_: Any) -> str:
        await gate.wait()
        return "a"

    engine, _, tally = journaled(database, answer)
    waiting = asyncio.create_task(engine.generate(ASK))
    await asyncio.sleep(0)
    assert tally.in_flight == 1
    tally.stopping = True
    gate.set()
    assert (await waiting).text == "a"
    assert (tally.in_flight, database.count_calls()) == (0, 1)


async def test_a_cancelled_call_is_in_flight_no_more(database):
    engine, _, tally = journaled(database, lambda _: asyncio.sleep(60))
    waiting = asyncio.create_task(engine.generate(ASK))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert tally.in_flight == 0


# --- equal calls at the same time


class Gated:
    """A scripted function that answers when it is let."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        self.answer, self.requests, self.gate = answer, [], asyncio.Event()

    async def __call__(self, request: Any) -> Any:
        self.requests.append(request)
        await self.gate.wait()
        return self.answer(request)


def gated(database: Database, answer: Any) -> tuple[JournaledEngine, Gated, Tally]:
    function, tally = Gated(answer if callable(answer) else lambda _: answer), Tally()
    return JournaledEngine(ScriptedEngine(function), database, "judge", tally), function, tally


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


CALLS: dict[str, tuple[Any, Callable[[JournaledEngine], Any]]] = {
    "generate": ("a", lambda engine: engine.generate(ASK)),
    "choice_logprobs": ([-1.0, -2.0], lambda engine: engine.choice_logprobs([QUESTIONS[0]], ("A", "B"))),
    "loglikelihood": (-1.0, lambda engine: engine.loglikelihood(SURE)),
    "reward": (2.0, lambda engine: engine.reward(RewardRequest(SURE.messages))),
}


@pytest.mark.parametrize("call", CALLS)
async def test_equal_calls_at_the_same_time_are_paid_once(database, call):
    answer, ask = CALLS[call]
    engine, function, tally = gated(database, answer)
    waiting = [asyncio.create_task(ask(engine)) for _ in range(3)]
    await settled()
    assert len(function.requests) == 1
    function.gate.set()
    first, *others = await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert others == [first, first]
    assert (len(function.requests), tally.calls_made, tally.calls_replayed, tally.in_flight) == (1, 1, 2, 0)


@pytest.mark.parametrize("call", CALLS)
async def test_who_waits_for_a_call_that_is_cancelled_makes_it(database, call):
    answer, ask = CALLS[call]
    engine, function, tally = gated(database, answer)
    first, second, third = (asyncio.create_task(ask(engine)) for _ in range(3))
    await settled()
    first.cancel()
    await settled()
    assert (len(function.requests), tally.in_flight) == (2, 1)
    function.gate.set()
    assert await asyncio.wait_for(second, 5) == await asyncio.wait_for(third, 5)
    assert first.cancelled()
    assert (len(function.requests), tally.calls_made) == (2, 1)


@pytest.mark.parametrize("call", CALLS)
async def test_who_waits_for_a_call_that_fails_makes_it(database, call):
    answer, ask = CALLS[call]
    failures = iter([ValueError("once")])

    def fail_once(_: Any) -> Any:
        for failure in failures:
            raise failure
        return answer

    engine, function, _ = gated(database, fail_once)
    waiting = [asyncio.create_task(ask(engine)) for _ in range(3)]
    await settled()
    function.gate.set()
    first, *others = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
    assert isinstance(first, ValueError)
    assert not any(isinstance(one, BaseException) for one in others)
    assert len(function.requests) == 2


async def test_who_waits_and_is_cancelled_takes_nothing_from_the_one_that_asks(database):
    engine, function, _ = gated(database, "a")
    first, second = (asyncio.create_task(engine.generate(ASK)) for _ in range(2))
    await settled()
    second.cancel()
    await settled()
    function.gate.set()
    assert (await asyncio.wait_for(first, 5)).text == "a"
    assert second.cancelled()


async def test_lists_that_overlap_ask_for_what_they_share_once(database):
    engine, function, tally = gated(database, lambda request: [-float(request.messages[0].content.split()[1]), -0.1])
    lists = [QUESTIONS[:2], QUESTIONS[1:3], QUESTIONS[2:], [QUESTIONS[3], QUESTIONS[0], QUESTIONS[3]]]
    waiting = [asyncio.create_task(engine.choice_logprobs(one, ("A", "B"))) for one in lists]
    await settled()
    function.gate.set()
    found = await asyncio.wait_for(asyncio.gather(*waiting), 5)
    numbers = [[-answer.logprobs[0] for answer in answers] for answers in found]
    assert numbers == [[0, 1], [1, 2], [2, 3], [3, 0, 3]]
    assert len(function.requests) == 4
    assert tally.calls_made == 4


async def test_when_stopping_who_waits_gets_what_was_in_flight_and_begins_nothing(database):
    engine, function, tally = gated(database, "a")
    first, second = (asyncio.create_task(engine.generate(ASK)) for _ in range(2))
    await settled()
    tally.stopping = True
    function.gate.set()
    assert (await first).text == (await second).text == "a"
    assert len(function.requests) == 1


async def test_of_many_calls_those_that_end_together_are_written_together(database):
    engine, _, tally = journaled(database, lambda _: asyncio.sleep(0.01, "a"))
    statements: list[str] = []
    database._db.set_trace_callback(statements.append)
    await asyncio.gather(*(engine.generate(msgspec.structs.replace(ASK, seed=seed)) for seed in range(200)))
    assert sum(one.startswith("COMMIT") for one in statements) < 100
    assert (database.count_calls(), tally.calls_made) == (200, 200)


async def test_a_write_that_fails_is_told_to_all_that_wait_for_it(database):
    engine, _, tally = journaled(database, lambda _: asyncio.sleep(0.01, "a"))
    database._db.execute("DROP TABLE calls")
    database._db.execute("CREATE TABLE calls (key BLOB PRIMARY KEY, result BLOB)")
    asked = (engine.generate(msgspec.structs.replace(ASK, seed=seed)) for seed in range(40))
    failed = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(one) for one in failed] == [StoreError] * 40
    assert tally.calls_made == 0

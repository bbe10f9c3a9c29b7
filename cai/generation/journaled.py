"""An engine whose every finished call is in the journal: asked again, also at the same time, it pays nothing."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec

from cai.config import JudgeConfig, Recipe
from cai.constitution import Constitution
from cai.engines import (
    Capability,
    ChoiceLogprobs,
    ChoiceRequest,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    Outcome,
    PartlyAnswered,
    Reward,
    RewardRequest,
    failures,
)
from cai.errors import Interrupted, RequestError, VerdictError
from cai.generation.budget import Budget
from cai.generation.record import Generator
from cai.generation.tally import Tally
from cai.judging import build_judge
from cai.judging.calibration import LoadedCalibration
from cai.store import Call
from cai.types import Completion, Message, Messages, without_surrogates

Result = TypeVar("Result")
_encoder = msgspec.json.Encoder()
_MANY = 16
"""From so many calls under way, those that end in the same turn of the event loop are written together."""


class Journal(Protocol):
    """Where finished calls are: the run's database, or what a worker of a cluster holds of it."""

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those calls that are finished."""
        raise NotImplementedError

    def add_calls(self, calls: list[Call]) -> None:
        """Keep finished calls."""


class Engines(NamedTuple):
    """Who answers and who judges, and what was read from the files that correct the judges."""

    policy: Engine | None
    """None where the completions are given."""
    judges: dict[JudgeConfig, Engine]
    """By the section of each judge; none where a program decides."""
    calibrations: dict[str, LoadedCalibration]
    """By the path that the recipe names."""


class Sent(NamedTuple):
    """What a call sends, and the most tokens that it can generate; for the budget."""

    prompts: Sequence[Messages]
    completion: int


class _Commits:
    """Writes finished calls: all that ended in one turn of the event loop in one transaction."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._pending: list[tuple[list[Call], asyncio.Future[None]]] = []

    async def __call__(self, calls: list[Call]) -> None:
        """Returns when they are on disk. Raises `StoreError`."""
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        self._pending.append((calls, written))
        if len(self._pending) == 1:
            loop.call_soon(self._write)
        await written

    def _write(self) -> None:
        pending, self._pending = self._pending, []
        try:
            self._journal.add_calls([call for calls, _ in pending for call in calls])
        except BaseException as exc:  # each that waits has to hear of it
            for _, written in pending:
                if not written.done():
                    written.set_exception(exc)
            return
        for _, written in pending:
            if not written.done():
                written.set_result(None)


class JournaledEngine:
    """Wraps an engine; the key of a call is a hash of the engine's fingerprint (of a choice, how it is read, too) and
    the whole request.

    Once `tally.stopping` is set, calls that are not in the journal raise `Interrupted`; those in flight finish.
    """

    def __init__(self, engine: Engine, journal: Journal, role: str, tally: Tally, budget: Budget | None = None) -> None:
        """`role` is `policy` or `judge`: whose cost it is."""
        self._engine, self._journal, self._role, self._tally = engine, journal, role, tally
        self._asked: dict[bytes, asyncio.Future[None]] = {}
        self._commit = _Commits(journal)
        self._budget = budget if budget and budget.is_limited else None
        self._digest = hashlib.blake2b(engine.fingerprint.encode(), digest_size=16)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The wrapped engine's."""
        return self._engine.capabilities

    @property
    def fingerprint(self) -> str:
        """The wrapped engine's."""
        return self._engine.fingerprint

    @property
    def choice_form(self) -> str:
        """The wrapped engine's."""
        return self._engine.choice_form

    @property
    def revision(self) -> str | None:
        """The wrapped engine's."""
        return self._engine.revision

    def _key(self, request: msgspec.Struct) -> bytes:
        digest = self._digest.copy()
        digest.update(type(request).__name__.encode())
        if isinstance(request, ChoiceRequest):
            digest.update(self.choice_form.encode())
        digest.update(_encoder.encode(request))
        return digest.digest()

    @asynccontextmanager
    async def _asking(self, keys: Iterable[bytes]) -> AsyncIterator[dict[bytes, bytes]]:
        """What the journal has of these calls; while the block asks for the others, nobody else does.

        Who wants one that another is asking for waits, whatever comes of it, and looks again: a call that failed or was
        cancelled is then its own to make.
        """
        wanted = list(dict.fromkeys(keys))
        while others := {self._asked[key] for key in wanted if key in self._asked}:
            await asyncio.wait(others)
        loop = asyncio.get_running_loop()
        looked, answered = loop.create_future(), loop.create_future()
        mine = wanted
        self._asked |= dict.fromkeys(wanted, looked)
        try:
            found = await self._journal.find(wanted)
            for key in found:
                del self._asked[key]
            mine = [key for key in wanted if key not in found]
            self._asked |= dict.fromkeys(mine, answered)
            looked.set_result(None)
            self._tally.calls_replayed += len(found)
            yield found
        finally:
            for key in mine:
                del self._asked[key]
            for waited_for in (looked, answered):
                if not waited_for.done():
                    waited_for.set_result(None)

    async def _call(self, call: Callable[[], Awaitable[Result]], sent: Sent) -> Result:
        if self._tally.stopping:
            raise Interrupted("stopping")
        if self._budget:
            return await self._within(self._budget, call, sent)
        return await self._count(call)

    async def _within(self, budget: Budget, call: Callable[[], Awaitable[Result]], sent: Sent) -> Result:
        sizes = [sum(len(message.content.encode("utf-8", "replace")) for message in prompt) for prompt in sent.prompts]
        reserved = await budget.reserve(self._role, sum(sizes), sent.completion)
        size, spent = 0, None
        try:
            result = await self._count(call)
            size, spent = _answered_size(result, sizes), _spent(result)
            return result
        finally:
            budget.settle(reserved, self._role, size, spent)

    async def _count(self, call: Callable[[], Awaitable[Result]]) -> Result:
        self._tally.in_flight += 1
        try:
            return await call()
        finally:
            self._tally.in_flight -= 1

    async def _keep(self, calls: list[Call]) -> None:
        if self._tally.in_flight < _MANY:
            self._journal.add_calls(calls)
        else:
            await self._commit(calls)
        self._tally.calls_made += len(calls)
        self._tally.prompt_tokens += sum(call.prompt_tokens for call in calls)
        self._tally.completion_tokens += sum(call.completion_tokens for call in calls)

    async def generate(self, request: GenerateRequest) -> Completion:
        """The journal's completion, or the engine's, journaled."""
        async with self._asking([key := self._key(request)]) as found:
            if found:
                return _decode_completion(found[key])
            sent = Sent((request.messages,), request.max_tokens)
            answer = _encode_completion(await self._call(lambda: self._engine.generate(request), sent))
            completion = _decode_completion(answer)
            await self._keep([Call(key, self._role, completion.prompt_tokens, completion.completion_tokens, answer)])
            return completion

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Journaled prompt by prompt, so that a principle more or a principle changed pays only for itself.

        They are kept when the engine is done with all of them, also where some failed: a kill before that loses those that it
        had computed.
        """
        keys = [self._key(ChoiceRequest(prompt, tuple(choices))) for prompt in prompts]
        asked = dict(zip(keys, prompts, strict=True))
        async with self._asking(asked) as journaled:
            found = {key: _choice(value) for key, value in journaled.items()}
            missing = {key: prompt for key, prompt in asked.items() if key not in found}
            if missing:
                left = list(missing.values())
                outcomes = await self._call(lambda: self._choose(left, choices), Sent(left, len(left)))
                found |= await self._keep_choices(dict(zip(missing, outcomes, strict=True)), len(choices))
        return [found[key] for key in keys]

    async def _choose(self, prompts: Sequence[Messages], choices: Sequence[str]) -> Sequence[Outcome]:
        """What became of each prompt, where any was answered."""
        try:
            return await self._engine.choice_logprobs(prompts, choices)
        except PartlyAnswered as exc:
            return exc.outcomes

    async def _keep_choices(self, outcomes: dict[bytes, Outcome], expected: int) -> dict[bytes, ChoiceLogprobs]:
        """Keeps what is good; raises what failed, and `VerdictError` where an answer is no verdict."""
        checked = {key: _checked(one, expected) for key, one in outcomes.items()}
        good = {key: one for key, one in checked.items() if isinstance(one, ChoiceLogprobs)}
        await self._keep(
            [Call(key, self._role, one.computed_tokens, 0, _encoder.encode(one.logprobs)) for key, one in good.items()]
        )
        for failure in failures(checked.values()):
            raise failure
        return good

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The journal's, or the engine's, journaled."""
        async with self._asking([key := self._key(request)]) as found:
            if found:
                return Loglikelihood(*msgspec.json.decode(found[key], type=tuple[float, int, int]))
            whole = (*request.messages, Message("assistant", request.continuation))
            result = await self._call(lambda: self._engine.loglikelihood(request), Sent((whole,), 1))
            if problem := _problem((result.logprob,), 1):
                raise VerdictError(problem)
            await self._keep([Call(key, self._role, result.computed_tokens, 0, _encoder.encode(result))])
            return result

    async def reward(self, request: RewardRequest) -> Reward:
        """The journal's, or the engine's, journaled."""
        async with self._asking([key := self._key(request)]) as found:
            if found:
                return Reward(*msgspec.json.decode(found[key], type=tuple[float, int]))
            result = await self._call(lambda: self._engine.reward(request), Sent((request.messages,), 0))
            if problem := _problem((result.reward,), 1):
                raise VerdictError(problem)
            await self._keep([Call(key, self._role, result.computed_tokens, 0, _encoder.encode(result))])
            return result

    async def close(self) -> None:
        """Close the wrapped engine."""
        await self._engine.close()


def _spent(result: Any) -> tuple[int, int]:
    """Prompt and completion tokens of what an engine answered."""
    if isinstance(result, Completion):
        return result.prompt_tokens, result.completion_tokens
    answers = result if isinstance(result, list) else [result]
    return sum(answer.computed_tokens for answer in answers if not isinstance(answer, BaseException)), 0


def _answered_size(result: Any, sizes: Sequence[int]) -> int:
    """Bytes of those prompts that were answered."""
    outcomes = result if isinstance(result, list) else [result]
    return sum(size for size, one in zip(sizes, outcomes, strict=False) if not isinstance(one, BaseException))


def journaled_generator(
    recipe: Recipe, constitution: Constitution, engines: Engines, journal: Journal, tally: Tally, budget: Budget | None = None
) -> Generator:
    """What makes records, on engines that are journaled."""
    policy = JournaledEngine(engines.policy, journal, "policy", tally, budget) if engines.policy else None
    judges = dict.fromkeys(engines.judges.values())
    judging = {engine: JournaledEngine(engine, journal, "judge", tally, budget) for engine in judges}
    judge = build_judge(recipe.judge, constitution, lambda one: judging[engines.judges[one]], engines.calibrations)
    return Generator(recipe, constitution, policy, judge)


def _choice(value: bytes) -> ChoiceLogprobs:
    return ChoiceLogprobs(msgspec.json.decode(value, type=tuple[float, ...]), 0)


def _encode_completion(completion: Completion) -> bytes:
    """As JSON; lone surrogates in the text, which no file can hold, become U+FFFD."""
    if not isinstance(getattr(completion, "text", None), str):
        raise RequestError(f"expected a completion with a text, got {completion!r:.60}")
    return _encoder.encode(msgspec.structs.replace(completion, text=without_surrogates(completion.text)))


def _decode_completion(answer: bytes) -> Completion:
    """The same after an engine's answer as on a replay, so what could not be read back is refused before it is kept."""
    try:
        completion = msgspec.json.decode(answer, type=Completion)
    except msgspec.ValidationError as exc:
        raise RequestError(f"not a completion: {exc}: {answer[:200]!r}") from exc
    numbers = (completion.prompt_tokens, completion.completion_tokens, completion.seed or 0)
    if not all(0 <= number < 1 << 63 for number in numbers):
        raise RequestError(f"not a completion: token counts and seed lie below 2**63 and are not negative: {answer[:200]!r}")
    return completion


def _checked(outcome: Outcome, expected: int) -> Outcome:
    """The same, or why the answer is no verdict."""
    if isinstance(outcome, BaseException):
        return outcome
    problem = _problem(outcome.logprobs, expected)
    return VerdictError(problem) if problem else outcome


def _problem(logprobs: Sequence[Any], expected: int) -> str | None:
    if len(logprobs) == expected and all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
        return None
    return f"expected {expected} finite numbers, got {list(logprobs)!r:.200}"

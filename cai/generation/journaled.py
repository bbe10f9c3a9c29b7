"""An engine whose every finished call is in the journal: asked again, also at the same time, it pays nothing."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import msgspec

from cai.engines import (
    Capability,
    ChoiceLogprobs,
    ChoiceRequest,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    Reward,
    RewardRequest,
)
from cai.errors import Interrupted, RequestError, VerdictError
from cai.generation.tally import Tally
from cai.store import Call, Database
from cai.types import Completion, Messages, without_surrogates

Result = TypeVar("Result")
_encoder = msgspec.json.Encoder()


class JournaledEngine:
    """Wraps an engine; the key of a call is a hash of the engine's fingerprint and the whole request.

    Once `tally.stopping` is set, calls that are not in the journal raise `Interrupted`; those in flight finish.
    """

    def __init__(self, engine: Engine, database: Database, role: str, tally: Tally) -> None:
        """`role` is `policy` or `judge`: whose cost it is."""
        self._engine, self._database, self._role, self._tally = engine, database, role, tally
        self._asked: dict[bytes, asyncio.Future[None]] = {}
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
    def revision(self) -> str | None:
        """The wrapped engine's."""
        return self._engine.revision

    def _key(self, request: msgspec.Struct) -> bytes:
        digest = self._digest.copy()
        digest.update(type(request).__name__.encode())
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
        found = self._database.call_results(wanted)
        self._tally.calls_replayed += len(found)
        answered = asyncio.get_running_loop().create_future()
        mine = dict.fromkeys((key for key in wanted if key not in found), answered)
        self._asked |= mine
        try:
            yield found
        finally:
            for key in mine:
                del self._asked[key]
            answered.set_result(None)

    async def _call(self, call: Callable[[], Awaitable[Result]]) -> Result:
        if self._tally.stopping:
            raise Interrupted("stopping")
        self._tally.in_flight += 1
        try:
            return await call()
        finally:
            self._tally.in_flight -= 1

    def _keep(self, calls: list[Call]) -> None:
        self._database.add_calls(calls)
        self._tally.calls_made += len(calls)
        self._tally.prompt_tokens += sum(call.prompt_tokens for call in calls)
        self._tally.completion_tokens += sum(call.completion_tokens for call in calls)

    async def generate(self, request: GenerateRequest) -> Completion:
        """The journal's completion, or the engine's, journaled."""
        async with self._asking([key := self._key(request)]) as found:
            if found:
                return _decode_completion(found[key])
            answer = _encode_completion(await self._call(lambda: self._engine.generate(request)))
            completion = _decode_completion(answer)
            self._keep([Call(key, self._role, completion.prompt_tokens, completion.completion_tokens, answer)])
            return completion

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Journaled prompt by prompt, so that a principle more or a principle changed pays only for itself.

        They are kept when the engine has answered all of them: a kill before that loses those that it had computed.
        """
        keys = [self._key(ChoiceRequest(prompt, tuple(choices))) for prompt in prompts]
        asked = dict(zip(keys, prompts, strict=True))
        async with self._asking(asked) as journaled:
            found = {key: _choice(value) for key, value in journaled.items()}
            missing = {key: prompt for key, prompt in asked.items() if key not in found}
            if missing:
                answers = await self._call(lambda: self._engine.choice_logprobs(list(missing.values()), choices))
                found |= self._keep_choices(dict(zip(missing, answers, strict=True)), len(choices))
        return [found[key] for key in keys]

    def _keep_choices(self, answers: dict[bytes, ChoiceLogprobs], expected: int) -> dict[bytes, ChoiceLogprobs]:
        """Keeps what is good; raises `VerdictError` where one is not."""
        problems = {key: _problem(answer.logprobs, expected) for key, answer in answers.items()}
        good = {key: answer for key, answer in answers.items() if not problems[key]}
        self._keep([Call(key, self._role, one.computed_tokens, 0, _encoder.encode(one.logprobs)) for key, one in good.items()])
        for problem in filter(None, problems.values()):
            raise VerdictError(problem)
        return good

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The journal's, or the engine's, journaled."""
        async with self._asking([key := self._key(request)]) as found:
            if found:
                return Loglikelihood(*msgspec.json.decode(found[key], type=tuple[float, int, int]))
            result = await self._call(lambda: self._engine.loglikelihood(request))
            if problem := _problem((result.logprob,), 1):
                raise VerdictError(problem)
            self._keep([Call(key, self._role, result.computed_tokens, 0, _encoder.encode(result))])
            return result

    async def reward(self, request: RewardRequest) -> Reward:
        """The journal's, or the engine's, journaled."""
        async with self._asking([key := self._key(request)]) as found:
            if found:
                return Reward(*msgspec.json.decode(found[key], type=tuple[float, int]))
            result = await self._call(lambda: self._engine.reward(request))
            if problem := _problem((result.reward,), 1):
                raise VerdictError(problem)
            self._keep([Call(key, self._role, result.computed_tokens, 0, _encoder.encode(result))])
            return result

    async def close(self) -> None:
        """Close the wrapped engine."""
        await self._engine.close()


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


def _problem(logprobs: Sequence[Any], expected: int) -> str | None:
    if len(logprobs) == expected and all(isinstance(value, int | float) and math.isfinite(value) for value in logprobs):
        return None
    return f"expected {expected} finite numbers, got {list(logprobs)!r:.200}"

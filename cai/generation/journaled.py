"""An engine whose every finished call is in the journal: asked again, it answers from there and pays nothing."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Awaitable, Callable, Sequence
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
    Reward,
    RewardRequest,
)
from cai.errors import Interrupted, RequestError, VerdictError
from cai.generation.record import Generator
from cai.generation.tally import Tally
from cai.judging import build_judge
from cai.store import Call
from cai.types import Completion, Messages, without_surrogates

Result = TypeVar("Result")
_encoder = msgspec.json.Encoder()


class Journal(Protocol):
    """Where finished calls are: the run's database, or what a worker of a cluster holds of it."""

    async def find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        """The results of those calls that are finished."""
        raise NotImplementedError

    def add_calls(self, calls: list[Call]) -> None:
        """Keep finished calls."""


class Engines(NamedTuple):
    """Who answers and who judges; no policy where completions are given, no judge where a program decides."""

    policy: Engine | None
    judges: dict[JudgeConfig, Engine]


class JournaledEngine:
    """Wraps an engine; the key of a call is a hash of the engine's fingerprint and the whole request.

    Once `tally.stopping` is set, calls that are not in the journal raise `Interrupted`; those in flight finish.
    """

    def __init__(self, engine: Engine, journal: Journal, role: str, tally: Tally) -> None:
        """`role` is `policy` or `judge`: whose cost it is."""
        self._engine, self._journal, self._role, self._tally = engine, journal, role, tally
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

    async def _call(self, call: Callable[[], Awaitable[Result]]) -> Result:
        if self._tally.stopping:
            raise Interrupted("stopping")
        self._tally.in_flight += 1
        try:
            return await call()
        finally:
            self._tally.in_flight -= 1

    def _keep(self, calls: list[Call]) -> None:
        self._journal.add_calls(calls)
        self._tally.calls_made += len(calls)
        self._tally.prompt_tokens += sum(call.prompt_tokens for call in calls)
        self._tally.completion_tokens += sum(call.completion_tokens for call in calls)

    async def generate(self, request: GenerateRequest) -> Completion:
        """The journal's completion, or the engine's, journaled."""
        key = self._key(request)
        if found := await self._journal.find([key]):
            self._tally.calls_replayed += 1
            return _decode_completion(found[key])
        answer = _encode_completion(await self._call(lambda: self._engine.generate(request)))
        completion = _decode_completion(answer)
        self._keep([Call(key, self._role, completion.prompt_tokens, completion.completion_tokens, answer)])
        return completion

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Journaled prompt by prompt, so that a principle more or a principle changed pays only for itself."""
        keys = [self._key(ChoiceRequest(prompt, tuple(choices))) for prompt in prompts]
        found = {key: _choice(value) for key, value in (await self._journal.find(keys)).items()}
        self._tally.calls_replayed += len(found)
        missing = [(key, prompt) for key, prompt in zip(keys, prompts, strict=True) if key not in found]
        if missing:
            asked = [prompt for _, prompt in missing]
            answers = await self._call(lambda: self._engine.choice_logprobs(asked, choices))
            new = {key: answer for (key, _), answer in zip(missing, answers, strict=True)}
            problems = {key: _problem(answer.logprobs, len(choices)) for key, answer in new.items()}
            good = {key: answer for key, answer in new.items() if not problems[key]}
            self._keep(
                [Call(key, self._role, one.computed_tokens, 0, _encoder.encode(one.logprobs)) for key, one in good.items()]
            )
            for problem in filter(None, problems.values()):
                raise VerdictError(problem)
            found |= new
        return [found[key] for key in keys]

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The journal's, or the engine's, journaled."""
        key = self._key(request)
        if found := await self._journal.find([key]):
            self._tally.calls_replayed += 1
            return Loglikelihood(*msgspec.json.decode(found[key], type=tuple[float, int, int]))
        result = await self._call(lambda: self._engine.loglikelihood(request))
        if problem := _problem((result.logprob,), 1):
            raise VerdictError(problem)
        self._keep([Call(key, self._role, result.computed_tokens, 0, _encoder.encode(result))])
        return result

    async def reward(self, request: RewardRequest) -> Reward:
        """The journal's, or the engine's, journaled."""
        key = self._key(request)
        if found := await self._journal.find([key]):
            self._tally.calls_replayed += 1
            return Reward(*msgspec.json.decode(found[key], type=tuple[float, int]))
        result = await self._call(lambda: self._engine.reward(request))
        if problem := _problem((result.reward,), 1):
            raise VerdictError(problem)
        self._keep([Call(key, self._role, result.computed_tokens, 0, _encoder.encode(result))])
        return result

    async def close(self) -> None:
        """Close the wrapped engine."""
        await self._engine.close()


def journaled_generator(
    recipe: Recipe, constitution: Constitution, engines: Engines, journal: Journal, tally: Tally
) -> Generator:
    """What makes records, on engines that are journaled."""
    policy = JournaledEngine(engines.policy, journal, "policy", tally) if engines.policy else None
    judges = {key: JournaledEngine(engine, journal, "judge", tally) for key, engine in engines.judges.items()}
    return Generator(recipe, constitution, policy, build_judge(recipe.judge, constitution, judges.__getitem__))


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

"""The one Protocol of all engines: calls that are async, each on one request. An engine says which of them it can."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from msgspec import Struct

from cai.errors import CaiError, CapabilityError, RequestError
from cai.store import Database
from cai.types import Completion, Messages

Capability = Literal["generate", "choice_logprobs", "loglikelihood", "reward"]


class GenerateRequest(Struct, frozen=True):
    """Asks for one completion of a dialogue. Temperature 0 is greedy; then the seed changes nothing."""

    messages: Messages
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()


class ChoiceRequest(Struct, frozen=True):
    """Asks for the log-probability of each choice as what comes next.

    Where the last message is an assistant's, the choice continues it; else the assistant's turn begins with the choice.
    A choice that is the beginning of another one (`1` of `10`) stands for itself alone.
    """

    messages: Messages
    choices: tuple[str, ...]


class LoglikelihoodRequest(Struct, frozen=True):
    """Asks how likely `continuation` is as the assistant's whole answer (or as the rest of its last message)."""

    messages: Messages
    continuation: str


class RewardRequest(Struct, frozen=True):
    """Asks a reward model for the reward of a dialogue that ends with the assistant's turn."""

    messages: Messages


class Reward(NamedTuple):
    """A reward, in the reward model's own scale, and the tokens that were computed for it."""

    reward: float
    computed_tokens: int


class ChoiceLogprobs(NamedTuple):
    """Natural log-probabilities, one a choice; and the prompt tokens that were computed for them."""

    logprobs: tuple[float, ...]
    computed_tokens: int


Outcome = ChoiceLogprobs | BaseException
"""What became of one prompt among several: its answer, or what its call failed of."""


class PartlyAnswered(CaiError):
    """Some prompts of one call were answered and are paid for; others failed."""

    def __init__(self, outcomes: Sequence[Outcome]) -> None:
        """`outcomes`: one a prompt, in their order."""
        failed = failures(outcomes)
        super().__init__(f"{len(failed)} of {len(outcomes)} prompts failed: {failed[0]}")
        self.outcomes = list(outcomes)


def failures(outcomes: Iterable[Outcome]) -> list[BaseException]:
    """What the prompts failed of; first what ends more than its own row."""
    failed = [one for one in outcomes if isinstance(one, BaseException)]
    return sorted(failed, key=lambda one: isinstance(one, RequestError))


async def all_answered(
    calls: Iterable[Awaitable[ChoiceLogprobs]], before: Sequence[ChoiceLogprobs] = ()
) -> list[ChoiceLogprobs]:
    """The answers of calls that run at the same time, behind those that there are; returns when all calls have ended.

    Raises `PartlyAnswered`, or what the calls failed of where there is no answer.
    """
    outcomes: list[Outcome] = [*before, *await asyncio.gather(*calls, return_exceptions=True)]
    answers = [one for one in outcomes if isinstance(one, ChoiceLogprobs)]
    if len(answers) == len(outcomes):
        return answers
    raise PartlyAnswered(outcomes) if answers else failures(outcomes)[0]


class Loglikelihood(NamedTuple):
    """The summed natural log-probability of a continuation, its number of tokens, and the tokens computed for it."""

    logprob: float
    tokens: int
    computed_tokens: int


class Engine(Protocol):
    """A model that answers requests; many may wait at once, and the engine batches them as it can."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this engine can be asked; the recipe is checked against it before the first call."""

    @property
    def fingerprint(self) -> str:
        """Names the model, its weights and all that changes its answers; part of the key of every journaled call.

        Raises `ConfigError` where there is no such model.
        """

    @property
    def choice_form(self) -> str:
        """How choices are read, where that can change while the model stays; part of the key of those calls alone."""
        return ""

    @property
    def revision(self) -> str | None:
        """The Hub commit of the weights, where they come from the Hub."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `RequestError` where this request can never succeed."""
        raise _unable(self, "generate")

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """For several prompts that share a beginning: each choice's log-probability as the continuation of each.

        The longest shared token prefix is computed once where the engine can. No text is decoded. Raises `PartlyAnswered`
        where only some prompts failed.
        """
        raise _unable(self, "choice_logprobs")

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """How likely a given continuation is."""
        raise _unable(self, "loglikelihood")

    async def reward(self, request: RewardRequest) -> Reward:
        """What a reward model gives."""
        raise _unable(self, "reward")

    async def close(self) -> None:
        """Stop as soon as possible and release what is held; waiting requests fail."""


class BatchWork:
    """What servers work on in batches: for the progress display, and to end the waiting."""

    def __init__(self) -> None:
        self._under_way: dict[str, tuple[int, int]] = {}
        self._on_stop: list[Callable[[], None]] = []

    def note(self, name: str, calls: int, finished: int) -> None:
        """How far a batch is."""
        self._under_way[name] = calls, finished

    def ended(self, name: str) -> None:
        """It is no longer under way."""
        self._under_way.pop(name, None)

    @property
    def in_words(self) -> str:
        """`3 batches of 2,000 calls under way, 40% finished`; empty where there is none."""
        counts = list(self._under_way.values())
        calls, finished = sum(one[0] for one in counts), sum(one[1] for one in counts)
        what = "1 batch" if len(counts) == 1 else f"{len(counts):,} batches"
        return f"{what} of {calls:,} calls under way, {finished / max(calls, 1):.0%} finished" if counts else ""

    def on_stop(self, stop: Callable[[], None]) -> None:
        """Call this when the run is to stop: a batch may take a day, and goes on without us."""
        self._on_stop.append(stop)

    def stop(self) -> None:
        """Nobody waits for batches any more."""
        for stop in self._on_stop:
            stop()


@runtime_checkable
class Batching(Protocol):
    """An engine that hands calls to a server which goes on working on them when this process is gone."""

    def keep_batches(self, database: Database, work: BatchWork) -> None:
        """Where to note what was handed over, and where to say how far it is."""
        raise NotImplementedError


def _unable(engine: Engine, call: Capability) -> CapabilityError:
    return CapabilityError(f"{engine.fingerprint} does not offer {call}; it offers {', '.join(sorted(engine.capabilities))}")

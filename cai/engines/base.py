"""The one Protocol that every engine implements: three calls, each async, each on one request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from msgspec import Struct

from cai.types import Completion, Messages

Capability = Literal["generate", "choice_logprobs", "loglikelihood"]


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
    """

    messages: Messages
    choices: tuple[str, ...]


class LoglikelihoodRequest(Struct, frozen=True):
    """Asks how likely `continuation` is as the assistant's whole answer (or as the rest of its last message)."""

    messages: Messages
    continuation: str


class ChoiceLogprobs(NamedTuple):
    """Natural log-probabilities, one a choice; and the prompt tokens that were computed for them."""

    logprobs: tuple[float, ...]
    computed_tokens: int


class Loglikelihood(NamedTuple):
    """The summed natural log-probability of a continuation, and its number of tokens."""

    logprob: float
    tokens: int


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
    def revision(self) -> str | None:
        """The Hub commit of the weights, where they come from the Hub."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `RequestError` where this request can never succeed."""

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """For several prompts that share a beginning: each choice's log-probability as the continuation of each.

        The longest shared token prefix is computed once where the engine can. No text is decoded.
        """

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """How likely a given continuation is."""

    async def close(self) -> None:
        """Stop as soon as possible and release what is held; waiting requests fail."""

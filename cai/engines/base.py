"""The one Protocol of all engines: calls that are async, each on one request. An engine says which of them it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from msgspec import Struct

from cai.errors import CapabilityError
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
    def revision(self) -> str | None:
        """The Hub commit of the weights, where they come from the Hub."""

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `RequestError` where this request can never succeed."""
        raise _unable(self, "generate")

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """For several prompts that share a beginning: each choice's log-probability as the continuation of each.

        The longest shared token prefix is computed once where the engine can. No text is decoded.
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


def _unable(engine: Engine, call: Capability) -> CapabilityError:
    return CapabilityError(f"{engine.fingerprint} does not offer {call}; it offers {', '.join(sorted(engine.capabilities))}")

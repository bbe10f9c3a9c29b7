"""The `transformers` engine: many requests wait, one worker thread computes, and batches form from what waits.

Requests of like length are generated together, so that padding stays small; continuations are scored together with those
that share most of their beginning. What a batch shares (few-shot exemplars, a conversation) is computed once. In exact
mode every request is a batch of its own. The choices that a judge asks for together are computed together.
"""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from cai.config import ModelConfig
from cai.engines.base import (
    Capability,
    ChoiceLogprobs,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
)
from cai.engines.batching import Batcher
from cai.errors import CaiError, ConfigError, ContextLengthError, EngineError
from cai.models import is_classifier, locate
from cai.types import Completion, Messages

if TYPE_CHECKING:
    from cai.engines.chat import ChatTokenizer
    from cai.engines.local_model import LocalModel, Tail

Result = TypeVar("Result")
_SCORED_POSITIONS = 4096
"""The most positions of one batch at which the probabilities of a whole vocabulary are computed; bounds memory."""


class Encoded(NamedTuple):
    """A request to generate, and its prompt as tokens."""

    tokens: list[int]
    request: GenerateRequest

    @property
    def group(self) -> tuple[Any, ...]:
        """What all of a batch have in common."""
        return self.request.max_tokens, self.request.stop


class TransformersEngine(Engine):
    """A local model behind the Engine Protocol; weights are loaded with the first request."""

    capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs", "loglikelihood"})

    def __init__(self, config: ModelConfig) -> None:
        """Find the model and name it; raises `ConfigError` where it is not there or a classifier."""
        self._config = config
        self._place = locate(config.model, config.revision)
        if self._place.is_gguf and find_spec("gguf") is None:
            raise ConfigError(f"model '{config.model}' is a GGUF file, which needs gguf: pip install 'cai-toolkit[local]'")
        if is_classifier(Path(self._place.source)):
            raise ConfigError(
                f"model '{config.model}' is a reward model (a classifier), which writes nothing; name a language model, or use "
                "it as a judge with judge.method=reward-model"
            )
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers")
        self._loading: Future[LocalModel] | None = None
        size = 1 if config.exact else config.batch_size
        self._generated = Batcher[Encoded, Completion](
            lambda waiting: form_batch(waiting, size, config.batch_tokens), self._generate_batch
        )
        self._scored = Batcher["Tail", "tuple[float, int]"](
            lambda waiting: form_scored_batch(waiting, size, config.batch_tokens), self._score_batch
        )
        self._model: LocalModel | None = None
        self._chat: ChatTokenizer

    @property
    def fingerprint(self) -> str:
        """Model, content version, dtype and whether exact."""
        from cai.weights import resolve_dtype

        dtype = str(resolve_dtype(self._config)).removeprefix("torch.")
        exact = " exact" if self._config.exact else ""
        name = Path(self._place.source).name if self._place.revision is None else self._place.source
        return f"transformers:{name}@{self._place.version} {dtype}{exact}"

    @property
    def revision(self) -> str | None:
        """The commit that the Hub's weights are loaded at."""
        return self._place.revision

    async def _ready(self) -> LocalModel:
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._run(self._load))
        return await asyncio.shield(self._loading)

    def _load(self) -> LocalModel:
        from cai.engines.chat import ChatTokenizer
        from cai.engines.local_model import LocalModel
        from cai.weights import loading

        with loading(f"model '{self._config.model}'"):
            self._chat = ChatTokenizer(self._config, self._place)
            self._model = LocalModel(self._config, self._place)
        return self._model

    async def _run(self, function: Callable[..., Result], *args: Any) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)
        except CaiError:
            raise
        except (MemoryError, RuntimeError, IndexError) as exc:  # torch's errors; after one, a GPU may answer nothing more
            full = isinstance(exc, MemoryError) or "out of memory" in str(exc) or "can't allocate memory" in str(exc)
            limit = f"policy.batch_tokens (now {self._config.batch_tokens}) or policy.batch_size"
            what = f"out of memory: lower {limit}" if full else f"model '{self._config.model}' failed: {exc}"
            raise EngineError(f"{what}; the same command continues") from exc

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion, computed in a batch with what waits beside it. Raises `ContextLengthError`."""
        model = await self._ready()
        tokens = self._chat.encode(self._chat.render(request.messages))
        self._check_context(model, len(tokens) + request.max_tokens, f"{len(tokens)} of prompt, {request.max_tokens} to come")
        return await self._generated(Encoded(tokens, request))

    async def _generate_batch(self, batch: list[Encoded]) -> list[Completion]:
        model = await self._ready()
        outputs = await self._run(model.generate, [one.tokens for one in batch], [one.request for one in batch])
        return [self._completion(model, *pair) for pair in zip(batch, outputs, strict=True)]

    def _completion(self, model: LocalModel, one: Encoded, output: list[int]) -> Completion:
        ended = bool(output) and output[-1] in model.eos_ids
        text = self._chat.decode(output)
        found = [text.index(stop) for stop in one.request.stop if stop in text]
        text = text[: min(found)] if found else text
        return Completion(text.strip(), "stop" if ended or found else "length", len(one.tokens), len(output), one.request.seed)

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Log-probabilities of the choices after each prompt; what the prompts share is computed once."""
        model = await self._ready()
        tails = [self._chat.tail(messages, choices) for messages in prompts]
        for tail in tails:
            longest = len(tail.tokens) + max(map(len, tail.targets))
            self._check_context(model, longest, f"{longest} of judging")
        results: list[ChoiceLogprobs] = []
        for chunk in self._chunks(tails):
            scores, computed = await self._run(model.score, chunk)
            shares = _shares(computed, len(chunk))
            results += [ChoiceLogprobs(tuple(one), share) for one, share in zip(scores, shares, strict=True)]
        return results

    def _chunks(self, tails: list[Tail]) -> list[list[Tail]]:
        if self._config.exact:
            return [[tail] for tail in tails]
        width = max(len(tail.tokens) + sum(map(len, tail.targets)) for tail in tails)
        size = max(1, min(self._config.batch_size, self._config.batch_tokens // width))
        return [tails[start : start + size] for start in range(0, len(tails), size)]

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The summed log-probability of the continuation's tokens, without an end-of-sequence token."""
        model = await self._ready()
        tail = self._chat.tail(request.messages, (request.continuation,))
        longest = len(tail.tokens) + len(tail.targets[0])
        self._check_context(model, longest, f"{longest} of judging")
        logprob, computed = await self._scored(tail)
        return Loglikelihood(logprob, len(tail.targets[0]), computed)

    async def _score_batch(self, batch: list[Tail]) -> list[tuple[float, int]]:
        model = await self._ready()
        scores, computed = await self._run(model.score, batch)
        return [(one[0], share) for one, share in zip(scores, _shares(computed, len(batch)), strict=True)]

    def _check_context(self, model: LocalModel, needed: int, what: str) -> None:
        from cai.weights import context_length

        limit = context_length(model.model.config)
        if limit is not None and needed > limit:
            raise ContextLengthError(f"needs {needed} tokens ({what}), but the context of '{self._config.model}' is {limit}")

    async def close(self) -> None:
        """End a running batch at its next token; waiting requests are cancelled."""
        if self._model:
            self._model.stop()
        self._generated.close()
        self._scored.close()
        self._thread.shutdown(wait=True, cancel_futures=True)


def _shares(total: int, count: int) -> list[int]:
    """A total in `count` whole parts."""
    return [total - total // count * (count - 1), *[total // count] * (count - 1)]


def form_batch(waiting: Sequence[Encoded], size: int, tokens: int) -> list[int]:
    """The places of the oldest request and of those of its kind whose lengths are nearest to its own, within both limits."""
    oldest = waiting[0]
    alike = [place for place, one in enumerate(waiting) if one.group == oldest.group]
    alike.sort(key=lambda place: abs(len(waiting[place].tokens) - len(oldest.tokens)))
    batch: list[int] = []
    width = 0
    for place in alike[:size]:
        one = waiting[place]
        width = max(width, len(one.tokens) + one.request.max_tokens)
        if batch and width * (len(batch) + 1) > tokens:
            break
        batch.append(place)
    return batch


def form_scored_batch(waiting: Sequence[Tail], size: int, tokens: int) -> list[int]:
    """The places of the oldest and of those that share most of their beginning with it, within the limits."""
    oldest = waiting[0].tokens
    shared = [next((i for i, (a, b) in enumerate(zip(one.tokens, oldest, strict=False)) if a != b), 1 << 30) for one in waiting]
    batch: list[int] = []
    width = reach = 0
    for place in sorted(range(len(waiting)), key=lambda place: -shared[place])[:size]:
        target = len(waiting[place].targets[0])
        width, reach = max(width, len(waiting[place].tokens) + target), max(reach, target)
        if batch and ((len(batch) + 1) * width > tokens or (len(batch) + 1) * reach > _SCORED_POSITIONS):
            break
        batch.append(place)
    return batch

"""The `transformers` engine: many requests wait, one worker thread computes, and batches form from what waits.

Requests of like length are generated together, so that padding stays small; a beginning that all of a batch share
(few-shot exemplars) is computed once. In exact mode every request is a batch of its own. What a judge asks together is
computed together, one judgement after the other.
"""

from __future__ import annotations

import asyncio
import re
from asyncio import Future
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cai.config import ModelConfig
from cai.engines.base import (
    Capability,
    ChoiceLogprobs,
    ChoiceRequest,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
)
from cai.errors import CaiError, ConfigError, ContextLengthError, EngineError, RequestError
from cai.models import locate
from cai.types import Completion, Messages

if TYPE_CHECKING:
    from cai.engines.local_model import LocalModel, Tail

Result = TypeVar("Result")
_LINGER = 0.005
"""Seconds in which those whose answers just came may ask again, before the next batch forms."""


@dataclass(eq=False)
class _Waiting:
    """A request to generate, and whoever awaits it."""

    tokens: list[int]
    request: GenerateRequest
    answer: Future[Completion]

    @property
    def group(self) -> tuple[Any, ...]:
        return self.request.max_tokens, self.request.stop


class TransformersEngine:
    """A local model behind the Engine Protocol; weights are loaded with the first request."""

    capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs", "loglikelihood"})

    def __init__(self, config: ModelConfig) -> None:
        """Find the model and name it; raises `ConfigError` where it is not there."""
        self._config = config
        self._place = locate(config.model, config.revision)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transformers")
        self._loading: Future[None] | None = None
        self._waiting: list[_Waiting] = []
        self._batcher: asyncio.Task[None] | None = None
        self._model: LocalModel | None = None
        self._tokenizer: Any = None
        self._special: re.Pattern[str] | None = None

    @property
    def fingerprint(self) -> str:
        """Model, content version, dtype and whether exact."""
        from cai.engines.local_model import resolve_dtype

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
        await asyncio.shield(self._loading)
        assert self._model is not None
        return self._model

    def _load(self) -> None:
        import transformers
        from safetensors import SafetensorError

        from cai.engines.local_model import LocalModel, load_tokenizer

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            self._tokenizer = load_tokenizer(self._config)
            self._model = LocalModel(self._config)
        except (OSError, ValueError, RuntimeError, SafetensorError) as exc:
            raise EngineError(f"model '{self._config.model}' could not be loaded: {exc}") from exc
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"model '{self._config.model}' has no chat template; use an instruct model, or add chat_template.jinja"
            )
        tokens = sorted(map(re.escape, self._control_tokens()), key=len, reverse=True)
        self._special = re.compile("|".join(tokens)) if tokens else None

    def _control_tokens(self) -> list[str]:
        """Tokens that only the chat template may speak; added tokens such as line breaks are text."""
        template = str(self._tokenizer.chat_template)
        added = [(str(token), token.special) for token in self._tokenizer.added_tokens_decoder.values()]
        return [text for text, special in added if text.strip() and (special or (len(text) > 1 and text in template))]

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
        tokens = self._encode(self._render(request.messages))
        self._check_context(model, len(tokens) + request.max_tokens, f"{len(tokens)} of prompt, {request.max_tokens} to come")
        waiting = _Waiting(tokens, request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._batcher is None or self._batcher.done():
            self._batcher = asyncio.ensure_future(self._batch_all(model))
        return await waiting.answer

    async def _batch_all(self, model: LocalModel) -> None:
        while True:
            await asyncio.sleep(_LINGER)
            self._waiting = [one for one in self._waiting if not one.answer.done()]
            if not self._waiting:
                return
            batch = form_batch(self._waiting, 1 if self._config.exact else self._config.batch_size, self._config.batch_tokens)
            self._waiting = [one for one in self._waiting if one not in batch]
            await self._generate_batch(model, batch)

    async def _generate_batch(self, model: LocalModel, batch: list[_Waiting]) -> None:
        try:
            outputs = await self._run(model.generate, [one.tokens for one in batch], [one.request for one in batch])
            completions = [self._completion(model, *pair) for pair in zip(batch, outputs, strict=True)]
        except Exception as exc:  # whatever it is, it belongs to those who wait for this batch
            for one in batch:
                if not one.answer.done():
                    one.answer.set_exception(exc)
        else:
            for one, completion in zip(batch, completions, strict=True):
                if not one.answer.done():
                    one.answer.set_result(completion)
        finally:
            for one in batch:  # those still without an answer: the engine was closed
                one.answer.cancel()

    def _completion(self, model: LocalModel, one: _Waiting, output: list[int]) -> Completion:
        ended = bool(output) and output[-1] in model.eos_ids
        text = self._tokenizer.decode(output, skip_special_tokens=True)
        found = [text.index(stop) for stop in one.request.stop if stop in text]
        text = text[: min(found)] if found else text
        return Completion(text.strip(), "stop" if ended or found else "length", len(one.tokens), len(output), one.request.seed)

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Log-probabilities of the choices after each prompt; what the prompts share is computed once."""
        model = await self._ready()
        tails = [self._tail(ChoiceRequest(messages, tuple(choices))) for messages in prompts]
        for tail in tails:
            longest = len(tail.tokens) + max(map(len, tail.targets))
            self._check_context(model, longest, f"{longest} of judging")
        results: list[ChoiceLogprobs] = []
        for chunk in self._chunks(tails):
            scores, computed = await self._run(model.score, chunk)
            shares = [computed - computed // len(chunk) * (len(chunk) - 1), *[computed // len(chunk)] * (len(chunk) - 1)]
            results += [ChoiceLogprobs(tuple(one), share) for one, share in zip(scores, shares, strict=True)]
        return results

    def _chunks(self, tails: list[Tail]) -> list[list[Tail]]:
        if self._config.exact:
            return [[tail] for tail in tails]
        width = max(len(tail.tokens) + max(map(len, tail.targets)) for tail in tails) * len(tails[0].targets)
        size = max(1, min(self._config.batch_size, self._config.batch_tokens // width))
        return [tails[start : start + size] for start in range(0, len(tails), size)]

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The summed log-probability of the continuation's tokens, without an end-of-sequence token."""
        await self._ready()
        tail = self._tail(ChoiceRequest(request.messages, (request.continuation,)))
        [answer] = await self.choice_logprobs([request.messages], [request.continuation])
        return Loglikelihood(answer.logprobs[0], len(tail.targets[0]))

    def _tail(self, request: ChoiceRequest) -> Tail:
        """The prompt's tokens and each choice's, cut where the tokens of all choices begin to differ from the prompt's.

        Prompt and choice are encoded as one text, since tokens may merge across the seam.
        """
        from cai.engines.local_model import Tail

        prompt = self._render(request.messages)
        alone = self._encode(prompt)
        joint = [self._encode(prompt + self._neutral(choice)) for choice in request.choices]
        seam = len(alone)
        while seam > 0 and any(tokens[:seam] != alone[:seam] for tokens in joint):
            seam -= 1
        if not all(len(tokens) > seam for tokens in joint):
            raise RequestError("a choice or continuation is empty: there are no tokens to score")
        return Tail(alone[:seam], [tokens[seam:] for tokens in joint])

    def _render(self, messages: Messages) -> str:
        """The chat template over messages whose text cannot speak the template's own tokens."""
        import jinja2

        turns = [{"role": message.role, "content": self._neutral(message.content)} for message in messages]
        goes_on = messages[-1].role == "assistant"
        try:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=not goes_on, continue_final_message=goes_on
            )
        except (jinja2.TemplateError, ValueError) as exc:
            raise RequestError(f"the chat template of '{self._config.model}' refuses this dialogue: {exc}") from exc
        return str(text)

    def _neutral(self, text: str) -> str:
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text) if self._special else text

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _check_context(self, model: LocalModel, needed: int, what: str) -> None:
        limit = vars(model.model.config.get_text_config()).get("max_position_embeddings")
        if limit is not None and needed > limit:
            raise ContextLengthError(f"needs {needed} tokens ({what}), but the context of '{self._config.model}' is {limit}")

    async def close(self) -> None:
        """End a running batch at its next token; waiting requests are cancelled."""
        if self._model:
            self._model.stop()
        for one in self._waiting:
            one.answer.cancel()
        if self._batcher:
            self._batcher.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)


def form_batch(waiting: Sequence[_Waiting], size: int, tokens: int) -> list[_Waiting]:
    """The oldest request, and those of its kind whose lengths are nearest to its own, within both limits."""
    oldest = waiting[0]
    alike = [one for one in waiting if one.group == oldest.group]
    alike.sort(key=lambda one: abs(len(one.tokens) - len(oldest.tokens)))
    batch: list[_Waiting] = []
    width = 0
    for one in alike[:size]:
        width = max(width, len(one.tokens) + one.request.max_tokens)
        if batch and width * (len(batch) + 1) > tokens:
            break
        batch.append(one)
    return batch

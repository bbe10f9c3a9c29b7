"""The `vllm` engine: vLLM in process, on its asynchronous engine, which batches what waits and keeps what prompts share.

Choices are read as the log-probabilities of named next tokens. A choice of several tokens asks once for each of its
beginnings; prompts that begin alike, and those beginnings, are computed once by vLLM's prefix cache.
"""

from __future__ import annotations

import asyncio
import itertools
from asyncio import Future
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai.config import ModelConfig
from cai.engines.base import (
    Capability,
    ChoiceLogprobs,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    all_answered,
)
from cai.errors import CaiError, ConfigError, ContextLengthError, EngineError, RequestError
from cai.models import folder_version, locate
from cai.types import Completion, Messages

if TYPE_CHECKING:
    from cai.engines.chat import ChatTokenizer
    from cai.engines.local_model import Tail
    from cai.engines.vllm_process import VllmProcess

_MOST_NAMED = 128
"""The most next tokens that vLLM gives the log-probabilities of, by name, in one request."""
Tokens = tuple[int, ...]


class VllmEngine(Engine):
    """A model that vLLM runs; its process is started, and the weights are loaded, with the first request."""

    capabilities: frozenset[Capability] = frozenset({"generate", "choice_logprobs", "loglikelihood"})

    def __init__(self, config: ModelConfig) -> None:
        """Find the model and name it; raises `ConfigError` where it is not there, or for settings that vLLM has not."""
        from cai.engines.vllm_process import adapter_rank, check_args

        self._config = config
        self._place = locate(config.model, config.revision)
        if config.device:
            raise ConfigError(
                f"policy.device: vLLM runs on what it was built for, so '{config.device}' cannot be chosen; remove it, and "
                "name GPUs by CUDA_VISIBLE_DEVICES"
            )
        check_args(config.vllm.args)
        self._adapter = str(Path(config.vllm.adapter).expanduser()) if config.vllm.adapter else None
        if self._adapter:
            adapter_rank(self._adapter)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")
        self._starting: Future[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._names = map(str, itertools.count())
        self._process: VllmProcess | None = None
        self._engine: Any
        self._chat: ChatTokenizer

    @property
    def fingerprint(self) -> str:
        """Model, content version, dtype, whether exact, the adapter's content, and arguments that can change an answer."""
        from cai.engines.vllm_process import numeric_args
        from cai.weights import resolve_dtype

        dtype = str(resolve_dtype(self._config)).removeprefix("torch.")
        exact = " exact" if self._config.exact else ""
        name = Path(self._place.source).name if self._place.revision is None else self._place.source
        adapter = f" adapter {folder_version(Path(self._adapter))}" if self._adapter else ""
        args = "".join(f" {key}={value}" for key, value in numeric_args(self._config.vllm).items())
        return f"vllm:{name}@{self._place.version} {dtype}{exact}{adapter}{args}"

    @property
    def revision(self) -> str | None:
        """The commit that the Hub's weights are loaded at."""
        return self._place.revision

    async def _ready(self) -> None:
        if self._starting is None:
            self._starting = asyncio.ensure_future(asyncio.get_running_loop().run_in_executor(self._thread, self._start))
        await asyncio.shield(self._starting)

    def _start(self) -> None:
        from cai.engines.chat import ChatTokenizer
        from cai.engines.vllm_process import VllmProcess

        try:
            self._chat = ChatTokenizer(self._config, self._place)
            self._process = VllmProcess(self._config, self._place)
            self._engine = self._process.engine
        except CaiError:
            raise
        except Exception as exc:  # the boundary of weights and tokenizers, whose faults have no common type
            raise EngineError(f"model '{self._config.model}' could not be loaded: {type(exc).__name__}: {exc}") from exc

    async def _ask(self, tokens: list[int], **sampling: Any) -> Any:
        """vLLM's final answer to one prompt. Raises `RequestError`, `EngineError`; cancelled by `close`."""
        task = asyncio.ensure_future(self._answer(tokens, sampling))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await task

    async def _answer(self, tokens: list[int], sampling: dict[str, Any]) -> Any:
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            async for answer in self._outputs(tokens, sampling):
                if answer.finished:
                    return answer
        except EngineDeadError as exc:
            raise EngineError("vLLM's engine process died (its lines above say why); the same command continues") from exc
        except (VLLMClientError, ValueError) as exc:
            raise RequestError(f"vLLM refuses this request: {exc}") from exc
        except EngineGenerateError as exc:
            raise RequestError(f"vLLM failed at this request: {exc.__cause__ or exc}") from exc
        raise RequestError("vLLM ended without an answer to this request")

    def _outputs(self, tokens: list[int], sampling: dict[str, Any]) -> AsyncIterator[Any]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **sampling)
        lora = LoRARequest("adapter", 1, self._adapter) if self._adapter else None
        outputs: AsyncIterator[Any] = self._engine.generate(
            TokensPrompt(prompt_token_ids=tokens), params, next(self._names), lora_request=lora
        )
        return outputs

    async def generate(self, request: GenerateRequest) -> Completion:
        """One completion. Raises `ContextLengthError`."""
        await self._ready()
        tokens = self._chat.encode(self._chat.render(request.messages))
        self._check_context(len(tokens) + request.max_tokens, f"{len(tokens)} of prompt, {request.max_tokens} to come")
        answer = await self._ask(
            tokens,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            stop=list(request.stop),
        )
        [output] = answer.outputs
        ended = output.finish_reason == "stop"
        return Completion(output.text.strip(), "stop" if ended else "length", len(tokens), len(output.token_ids), request.seed)

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """Log-probabilities of the choices after each prompt; what the prompts share is computed once."""
        await self._ready()
        tails = [self._chat.tail(messages, choices) for messages in prompts]
        for tail in tails:
            longest = len(tail.tokens) + max(map(len, tail.targets))
            self._check_context(longest, f"{longest} of judging")
        return await all_answered(map(self._choices, tails))

    async def _choices(self, tail: Tail) -> ChoiceLogprobs:
        from cai.engines.local_model import exclusive

        asked = _next_tokens(tail.targets)
        answers = await asyncio.gather(*(self._named(tail.tokens, *one) for one in asked))
        steps = {
            (*stem, token): logprob for (stem, _), (found, _) in zip(asked, answers, strict=True) for token, logprob in found
        }
        whole = {tuple(one): sum(steps[tuple(one[: end + 1])] for end in range(len(one))) for one in tail.targets}
        logprobs = tuple(exclusive(tuple(one), whole) for one in tail.targets)
        return ChoiceLogprobs(logprobs, sum(computed for _, computed in answers))

    async def _named(self, tokens: list[int], stem: Tokens, named: Tokens) -> tuple[list[tuple[int, float]], int]:
        """The log-probability of each named token after the prompt and a stem, and the tokens computed."""
        answer = await self._ask(
            [*tokens, *stem], max_tokens=1, temperature=0.0, detokenize=False, logprob_token_ids=list(named)
        )
        found = answer.outputs[0].logprobs[0]
        return [(token, found[token].logprob) for token in named], _computed(answer)

    async def loglikelihood(self, request: LoglikelihoodRequest) -> Loglikelihood:
        """The summed log-probability of the continuation's tokens, without an end-of-sequence token."""
        await self._ready()
        tail = self._chat.tail(request.messages, (request.continuation,))
        tokens, target = tail.tokens, tail.targets[0]
        self._check_context(len(tokens) + len(target) + 1, f"{len(tokens) + len(target)} of judging")
        answer, computed = await self._scored([*tokens, *target], from_cache=True), 0
        if (answer.num_cached_tokens or 0) >= len(tokens):  # what is in the cache has no log-probabilities
            computed = _computed(answer)
            answer = await self._scored([*tokens, *target], from_cache=False)
        rows = zip(target, answer.prompt_logprobs[-len(target) :], strict=True)
        return Loglikelihood(sum(row[token].logprob for token, row in rows), len(target), computed + _computed(answer))

    async def _scored(self, tokens: list[int], from_cache: bool) -> Any:
        """Log-probabilities of a prompt's own tokens; those that lie in the cache may be missing or wrong."""
        return await self._ask(
            tokens,
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            prompt_logprobs=0,
            skip_reading_prefix_cache=not from_cache,
        )

    def _check_context(self, needed: int, what: str) -> None:
        limit = self._engine.model_config.max_model_len
        if needed > limit:
            raise ContextLengthError(f"needs {needed} tokens ({what}), but vLLM runs '{self._config.model}' with {limit}")

    async def close(self) -> None:
        """Cancel what waits and end vLLM's process."""
        for task in self._running:
            task.cancel()
        if self._process is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._process.stop)
            self._process = self._engine = None
        self._thread.shutdown(wait=True, cancel_futures=True)


def _next_tokens(targets: Sequence[list[int]]) -> list[tuple[Tokens, Tokens]]:
    """Each beginning of the targets, the empty one too, with the tokens that go on from there, as many as vLLM names at once.

    >>> _next_tokens([[5], [5, 6], [7]])
    [((), (5, 7)), ((5,), (6,))]
    """
    after: dict[Tokens, dict[int, None]] = {}
    for target in targets:
        for end, token in enumerate(target):
            after.setdefault(tuple(target[:end]), {})[token] = None
    parts = ((stem, tuple(named), range(0, len(named), _MOST_NAMED)) for stem, named in after.items())
    return [(stem, named[start : start + _MOST_NAMED]) for stem, named, starts in parts for start in starts]


def _computed(answer: Any) -> int:
    """The prompt tokens that were not in the cache."""
    return len(answer.prompt_token_ids) - (answer.num_cached_tokens or 0)

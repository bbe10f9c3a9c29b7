"""A transformers model that generates a batch and scores continuations, and computes a shared beginning once.

Everything here is synchronous and runs on the engine's one worker thread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from cai.config import ModelConfig
from cai.cpu import contiguous_head, keep_freed_memory
from cai.engines.base import GenerateRequest
from cai.engines.drawing import draw, only
from cai.engines.prefixes import Prefix, PrefixCache, keeps_all
from cai.models import ModelPlace, locate
from cai.weights import best_device, pretrained, resolve_dtype

_MIN_SHARED = 32
"""Below this many shared tokens, a prefix pass costs more than it saves."""


class Tail(NamedTuple):
    """Tokens, and one or more continuations of them whose log-probabilities are asked."""

    tokens: list[int]
    targets: list[list[int]]


class LocalModel:
    """Weights, device and dtype; `stop()` ends a running generation at its next token."""

    def __init__(self, config: ModelConfig, place: ModelPlace | None = None) -> None:
        """Load the weights (from `place`, where that is known); a GGUF file is first converted, once, in the cache folder."""
        self.device = torch.device(config.device or best_device())
        self.dtype = resolve_dtype(config)
        source, revision = pretrained(place or locate(config.model, config.revision))
        loaded = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=self.dtype)
        self.model: Any = loaded.to(self.device).eval().requires_grad_(False)
        contiguous_head(self.model)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._share = not config.exact
        self._generated, self._scored = PrefixCache(self.model), PrefixCache(self.model)  # neither pushes out the other's
        self._stopping = False
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = set(eos if isinstance(eos, list) else [eos]) - {None}
        self.model.generation_config = GenerationConfig()  # else its penalties fill in what a request leaves open

    def stop(self) -> None:
        """End a running generation at its next token, from any thread."""
        self._stopping = True

    def generate(self, prompts: list[list[int]], requests: Sequence[GenerateRequest]) -> list[list[int]]:
        """The new tokens of each prompt, up to its own end-of-sequence token or `max_tokens`.

        All requests have the same `max_tokens`. Each row draws from the generator of its own seed.
        """
        max_tokens = requests[0].max_tokens
        width = max(map(len, prompts))
        shared = self._shared_length(prompts, width)
        ids, mask = self._pad(prompts, shared, width)
        sampler = _Sampler(requests, width, self.device)
        output = self.model.generate(
            ids,
            attention_mask=mask,
            past_key_values=self._static_cache(prompts, shared, width + max_tokens),
            generation_config=GenerationConfig(
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=sorted(self.eos_ids) or None,
                pad_token_id=min(self.eos_ids, default=0),
                disable_compile=True,
            ),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_Stop(self)]),
        )
        return [self._until_end(row) for row in output[:, width:].tolist()]

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = next((index for index, token in enumerate(tokens) if token in self.eos_ids), len(tokens) - 1)
        return tokens[: end + 1]

    def score(self, tails: Sequence[Tail]) -> tuple[list[list[float]], int]:
        """For each tail, the summed natural log-probability of each of its targets; and the tokens computed."""
        stems = [stem for tail in tails for stem in _stems(tail.targets)]
        rows = [[*tail.tokens, *stem] for tail in tails for stem in _stems(tail.targets)]
        shared = self._shared_length(rows, min(len(tail.tokens) for tail in tails))
        width = max(map(len, rows))
        ids, mask = self._pad(rows, shared, width)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, shared:]
        prefix = self._scored.get(rows[0][:shared]) if shared else Prefix([], 0)
        logits = self.model(
            ids[:, shared:],
            attention_mask=mask,
            position_ids=positions,
            past_key_values=prefix.expanded(self.model.config, len(rows)) if shared else None,
            use_cache=bool(shared),
            logits_to_keep=min(max(map(len, stems)) + 1, width - shared),
        ).logits
        return _read_scores(tails, logits), prefix.computed + sum(len(row) - shared for row in rows)

    def _shared_length(self, rows: Sequence[list[int]], within: int) -> int:
        """How many first tokens all rows share, short of `within` and of each row's last; 0 where it is not worth it."""
        if not self._share or len(rows) < 2:
            return 0
        low, high = min(rows), max(rows)  # what the first and the last in order share, all between them share
        limit = min(within, *map(len, rows)) - 1
        length = next((index for index, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), limit)
        length = min(length, limit)
        return length if length >= _MIN_SHARED and self._cache_is_plain else 0

    @functools.cached_property
    def _cache_is_plain(self) -> bool:
        """Whether every layer keeps every position (no sliding window, no recurrent state)."""
        return keeps_all(self.model.config)

    def _pad(self, rows: Sequence[list[int]], shared: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, (rows, width): the shared beginning, then padding, then each row's own tokens."""
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for index, row in enumerate(rows):
            ids[index, :shared] = torch.tensor(row[:shared])
            ids[index, width - len(row) + shared :] = torch.tensor(row[shared:])
            mask[index, :shared] = 1
            mask[index, width - len(row) + shared :] = 1
        return ids.to(self.device), mask.to(self.device)

    def _static_cache(self, prompts: Sequence[list[int]], shared: int, length: int) -> StaticCache | None:
        """One that begins with the shared tokens."""
        if not self._cache_is_plain:
            return None
        prefix = self._generated.get(prompts[0][:shared]) if shared else Prefix([], 0)
        return prefix.preallocated(self.model.config, len(prompts), length)


def _stems(targets: Sequence[list[int]]) -> list[list[int]]:
    """What has to be computed to score all targets: each without its last token, unless another one goes on from there."""
    stems = [target[:-1] for target in targets]
    longest = [one for one in stems if not any(len(other) > len(one) and other[: len(one)] == one for other in stems)]
    return [one for index, one in enumerate(longest) if one not in longest[:index]]


def _read_scores(tails: Sequence[Tail], logits: torch.Tensor) -> list[list[float]]:
    """`logits` is (rows, kept, vocabulary); the last position of a row is that after its whole stem."""
    scores, row = [], 0
    for tail in tails:
        found: dict[tuple[int, ...], float] = {}
        for stem in _stems(tail.targets):
            logprobs = torch.log_softmax(logits[row, -len(stem) - 1 :].float(), dim=-1)
            for target in tail.targets:
                if stem[: len(target) - 1] == target[:-1]:
                    picked = logprobs[range(len(target)), target]
                    found[tuple(target)] = float(picked.double().sum())
            row += 1
        scores.append([exclusive(tuple(target), found) for target in tail.targets])
    return scores


def exclusive(target: tuple[int, ...], logprobs: dict[tuple[int, ...], float]) -> float:
    """The log-probability of a target that is not the beginning of another one: "1" and not "10"."""
    own = logprobs[target]
    beyond = [other for other in logprobs if len(other) > len(target) and other[: len(target)] == target]
    nearest = [one for one in beyond if not any(len(other) < len(one) and one[: len(other)] == other for other in beyond)]
    longer = [logprobs[one] for one in nearest]
    share = sum(math.exp(value - own) for value in longer)
    return own + math.log1p(-min(share, 1 - 1e-9)) if longer else own


class _Sampler(LogitsProcessor):
    """Draws each row's next token with that row's own random numbers, and leaves only it possible.

    One uniform number a step picks from the cumulative distribution, so a draw depends on its row's logits alone.
    """

    def __init__(self, requests: Sequence[GenerateRequest], width: int, device: torch.device) -> None:
        self._width = width
        self._uniform = torch.stack([_uniform(request) for request in requests]).to(device)
        temperature = torch.tensor([request.temperature for request in requests], device=device)
        self._greedy = temperature == 0
        self._scale = torch.where(self._greedy, 1.0, temperature)[:, None]
        self._top_p = torch.tensor([request.top_p for request in requests], device=device)[:, None]
        self._needs_top_p = bool((self._top_p < 1).any())
        self._all_greedy = bool(self._greedy.all())

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self._all_greedy:
            return scores
        probabilities = torch.softmax(scores / self._scale, dim=-1)
        if self._needs_top_p:
            probabilities = _nucleus(probabilities, self._top_p)
        drawn = draw(probabilities, self._uniform[:, input_ids.shape[1] - self._width, None])
        return only(torch.where(self._greedy[:, None], scores.argmax(dim=-1, keepdim=True), drawn), scores)


def _uniform(request: GenerateRequest) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    return torch.rand(request.max_tokens, generator=generator)


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of tokens whose probability reaches `top_p` (rows, 1)."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    outside = ordered.cumsum(dim=-1) - ordered >= top_p
    return probabilities.scatter(1, order, ordered.masked_fill(outside, 0.0))


class _Stop(StoppingCriteria):
    def __init__(self, owner: LocalModel) -> None:
        self._owner = owner

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self._owner._stopping, device=input_ids.device)

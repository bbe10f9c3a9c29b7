"""The engine of a reward model: a transformers sequence classifier with one output."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from cai.config import ModelConfig
from cai.engines.base import Capability, Engine, Reward, RewardRequest
from cai.engines.batching import Batcher
from cai.engines.chat import ChatTokenizer
from cai.errors import ConfigError, ContextLengthError, EngineError
from cai.models import locate
from cai.weights import best_device, context_length, loading, resolve_dtype


class RewardModelEngine(Engine):
    """Rewards of whole dialogues, in batches of like length; weights are loaded with the first request."""

    capabilities: frozenset[Capability] = frozenset({"reward"})

    def __init__(self, config: ModelConfig) -> None:
        """Find the model and name it; raises `ConfigError` where it is not there."""
        self._config = config
        self._place = locate(config.model, config.revision)
        self._model: Any = None
        self._chat: ChatTokenizer
        self._lock = asyncio.Lock()
        self._rewarded = Batcher[list[int], Reward](self._choose, self._compute)

    @property
    def fingerprint(self) -> str:
        """Model, content version and dtype."""
        dtype = str(resolve_dtype(self._config)).removeprefix("torch.")
        exact = " exact" if self._config.exact else ""
        name = Path(self._place.source).name if self._place.revision is None else self._place.source
        return f"reward-model:{name}@{self._place.version} {dtype}{exact}"

    @property
    def revision(self) -> str | None:
        """The commit that the Hub's weights are loaded at."""
        return self._place.revision

    async def reward(self, request: RewardRequest) -> Reward:
        """The classifier's one output. Raises `ContextLengthError`."""
        async with self._lock:
            if self._model is None:
                await asyncio.to_thread(self._load)
        tokens = self._chat.encode(self._chat.render(request.messages, answer=False))
        limit = context_length(self._model.config)
        if limit is not None and len(tokens) > limit:
            raise ContextLengthError(f"{len(tokens)} tokens, but the context of '{self._config.model}' is {limit}")
        return await self._rewarded(tokens)

    def _load(self) -> None:
        with loading(f"reward model '{self._config.model}'"):
            model: Any = AutoModelForSequenceClassification.from_pretrained(
                self._place.source, revision=self._place.revision, dtype=resolve_dtype(self._config)
            )
            self._chat = ChatTokenizer(self._config, self._place)
        if model.config.num_labels != 1:
            raise ConfigError(f"'{self._config.model}' has {model.config.num_labels} outputs; a reward model has one")
        text_config, tokenizer = model.config.get_text_config(), self._chat.tokenizer
        if text_config.pad_token_id is None:
            text_config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._model = model.to(self._config.device or best_device()).eval().requires_grad_(False)

    def _choose(self, waiting: Sequence[list[int]]) -> list[int]:
        size = 1 if self._config.exact else self._config.batch_size
        nearest = sorted(range(len(waiting)), key=lambda place: abs(len(waiting[place]) - len(waiting[0])))[:size]
        width = max(len(waiting[place]) for place in nearest)
        return nearest[: max(1, self._config.batch_tokens // width)]

    async def _compute(self, batch: list[list[int]]) -> list[Reward]:
        rewards = await asyncio.to_thread(self._forward, batch)
        return [Reward(reward, len(tokens)) for reward, tokens in zip(rewards, batch, strict=True)]

    def _forward(self, batch: list[list[int]]) -> list[float]:
        width = max(map(len, batch))
        pad = self._model.config.get_text_config().pad_token_id or 0
        ids = torch.tensor([[*tokens, *[pad] * (width - len(tokens))] for tokens in batch])
        mask = torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens in batch])
        device = self._model.device
        try:
            return list(self._model(ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float().tolist())
        except (RuntimeError, MemoryError) as exc:
            raise EngineError(f"reward model '{self._config.model}' failed: {exc}; the same command continues") from exc

    async def close(self) -> None:
        """Cancel what waits."""
        self._rewarded.close()

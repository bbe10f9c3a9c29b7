"""The engine of a reward model: a folder of `cai train reward`, or any transformers sequence classifier with one output."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cai.config import ModelConfig
from cai.engines.base import Capability, Engine, Reward, RewardRequest
from cai.engines.batching import Batcher
from cai.errors import EngineError
from cai.models import locate
from cai.rewards.combining import combine
from cai.rewards.dialogues import completion_length
from cai.rewards.model import Encoded, RewardModel
from cai.weights import resolve_dtype


class _Asked(NamedTuple):
    """A dialogue for each member, and the characters of its completion."""

    rows: Encoded
    characters: int

    @property
    def width(self) -> int:
        """The most tokens that a member reads."""
        return max(map(len, self.rows))


class RewardModelEngine(Engine):
    """Rewards of whole dialogues, in batches of like length; weights are loaded with the first request.

    Of what `cai train reward` made, a reward is all its members' and objectives', normalised, less what length alone is worth;
    of a classifier from elsewhere it is its output as it is.
    """

    capabilities: frozenset[Capability] = frozenset({"reward"})
    _model: RewardModel | None = None

    def __init__(self, config: ModelConfig) -> None:
        """Find the model and name it; raises `ConfigError` where it is not there."""
        self._config = config
        self._place = locate(config.model, config.revision, rewards=True)
        self._dtype = str(resolve_dtype(config)).removeprefix("torch.")
        self._lock = asyncio.Lock()
        self._rewarded = Batcher[_Asked, Reward](self._choose, self._compute)

    @property
    def fingerprint(self) -> str:
        """Model, content version and dtype."""
        exact = " exact" if self._config.exact else ""
        name = Path(self._place.source).name if self._place.revision is None else self._place.source
        return f"reward-model:{name}@{self._place.version} {self._dtype}{exact}"

    @property
    def revision(self) -> str | None:
        """The commit that the Hub's weights are loaded at."""
        return self._place.revision

    async def reward(self, request: RewardRequest) -> Reward:
        """The reward, and the tokens that its members read. Raises `ContextLengthError`."""
        model = await self._loaded()
        dialogue = [{"role": one.role, "content": one.content} for one in request.messages]
        return await self._rewarded(_Asked(model.encode(dialogue), completion_length(dialogue)))

    async def _loaded(self) -> RewardModel:
        async with self._lock:
            if self._model is None:
                self._model = await asyncio.to_thread(self._load)
        return self._model

    def _load(self) -> RewardModel:
        model = RewardModel.load(self._config.model, self._config.revision, self._config.device, self._dtype)
        model.batch_tokens = self._config.batch_tokens
        return model

    def _choose(self, waiting: Sequence[_Asked]) -> list[int]:
        size = 1 if self._config.exact else self._config.batch_size
        nearest = sorted(range(len(waiting)), key=lambda place: abs(waiting[place].width - waiting[0].width))[:size]
        width = max(waiting[place].width for place in nearest)
        return nearest[: max(1, self._config.batch_tokens // width)]

    async def _compute(self, batch: list[_Asked]) -> list[Reward]:
        rewards = await asyncio.to_thread(self._forward, batch)
        return [Reward(reward, sum(map(len, one.rows))) for reward, one in zip(rewards, batch, strict=True)]

    def _forward(self, batch: list[_Asked]) -> list[float]:
        model = self._model
        assert model is not None, "it was loaded by the first request"
        try:
            outputs = model.compute([one.rows for one in batch])
        except EngineError as exc:
            raise EngineError(f"{exc}; the same command continues") from exc
        tokens = np.array([len(one.rows[0]) for one in batch])
        rewards: list[float] = combine(model.spec, outputs, np.array([one.characters for one in batch]), tokens).reward.tolist()
        return rewards

    async def close(self) -> None:
        """Cancel what waits."""
        self._rewarded.close()

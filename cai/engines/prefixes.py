"""Beginnings that were computed, kept for what begins alike: few-shot dialogues, a conversation that is judged twice."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

_KEPT = 8
_MIN_REUSED = 32
"""Fewer tokens in common are computed again: finding and copying them costs more."""
Tensors = list[tuple[torch.Tensor, torch.Tensor]]


class Prefix(NamedTuple):
    """Keys and values of some tokens, layer by layer, each (1, heads, tokens, size); and how many were computed for them."""

    layers: Tensors
    computed: int

    def expanded(self, config: Any, rows: int) -> DynamicCache:
        """A cache that begins with them in each of `rows` rows; nothing is copied."""
        return _cache(
            config, [(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)) for keys, values in self.layers]
        )

    def preallocated(self, config: Any, rows: int, length: int) -> StaticCache:
        """The same with room for `length` tokens a row: nothing is copied as rows grow."""
        cache = StaticCache(config=config, max_cache_len=length)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=False):
            layer.lazy_initialization(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
            tokens = keys.size(2)
            layer.keys[:, :, :tokens] = keys
            layer.values[:, :, :tokens] = values
            layer.cumulative_length.fill_(tokens)
        return cache


class PrefixCache:
    """The last few beginnings of one model whose layers keep every position."""

    def __init__(self, model: Any) -> None:
        """Nothing is kept yet."""
        self._model = model
        self._kept: OrderedDict[tuple[int, ...], Tensors] = OrderedDict()

    def get(self, tokens: list[int]) -> Prefix:
        """The beginning `tokens`, of which only what no kept one begins with is computed."""
        key = tuple(tokens)
        near = max(self._kept, key=lambda kept: _common(kept, key), default=())
        common = _common(near, key)
        reused = common if common >= _MIN_REUSED or common == len(key) else 0
        begun = [(keys[:, :, :reused], values[:, :, :reused]) for keys, values in self._kept[near]] if reused else []
        if reused:
            self._kept.move_to_end(near)
        if reused == len(key):
            return Prefix(begun, 0)
        layers = self._compute(tokens[reused:], begun)
        self._keep(key, layers)
        return Prefix(layers, len(key) - reused)

    def _compute(self, tokens: list[int], begun: Tensors) -> Tensors:
        cache = _cache(self._model.config, begun)
        ids = torch.tensor([tokens], device=self._model.device)
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _keep(self, key: tuple[int, ...], layers: Tensors) -> None:
        self._kept[key] = layers
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)


def keeps_all(config: Any) -> bool:
    """Whether every layer of such a model keeps every position (no sliding window, no recurrent state)."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _cache(config: Any, layers: Tensors) -> DynamicCache:
    cache = DynamicCache(config=config)
    for layer, (keys, values) in zip(cache.layers, layers, strict=False):
        assert isinstance(layer, DynamicLayer)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return cache


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((index for index, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))

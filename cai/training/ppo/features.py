"""The last hidden states before each token of completions. On a CPU, what all prompts of a batch begin with, be it a system
prompt or the first words of a chat template, is computed once, with its gradients."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_WORTH = 128
"""Fewer tokens saved are not worth a pass of their own."""


def completion_features(trunk: Any, ids: Tensor, mask: Tensor, length: int, through: Any = None) -> Tensor:
    """(B, length, width): the last hidden states at the positions before the last `length` tokens of each row.

    `trunk` is a model of transformers without its output layer; `ids` and `mask` (B, L) are prompts, padded on the left, and
    completions, padded on the right. Positions count from the first token of a prompt. `through`: a model around the trunk that
    has to see the pass, as what adds up gradients of several processes; nothing is shared then.
    """
    places = {"position_ids": _places(mask)} if "position_ids" in inspect.signature(trunk.forward).parameters else {}
    may_share = through is None and bool(places) and ids.device.type == "cpu" and _keeps_all(trunk)
    shared = shared_length(ids, mask, length) if may_share else 0
    if shared * (len(ids) - 1) < _WORTH:
        told = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **places}
        return _states(trunk(**told) if through is None else _seen(trunk, through, told), length)
    padding = mask.argmax(dim=1, keepdim=True)
    begun, first = DynamicCache(config=trunk.config), int(padding[0])
    trunk(input_ids=ids[:1, first : first + shared], past_key_values=begun, use_cache=True)
    cache = DynamicCache([tuple(one.expand(len(ids), -1, -1, -1) for one in (kept.keys, kept.values)) for kept in begun.layers])
    rest = mask[:, shared:] * (torch.arange(ids.size(1) - shared, device=ids.device) >= padding)
    whole = torch.cat([mask.new_ones(len(ids), shared), rest], dim=1)
    told = {"attention_mask": whole, "position_ids": _places(whole)[:, shared:], "past_key_values": cache, "use_cache": True}
    return _states(trunk(input_ids=ids[:, shared:], **told), length)


def _places(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _seen(trunk: Any, through: Any, told: dict[str, Any]) -> Any:
    """What the trunk answers in a pass of the model around it."""
    answers: list[Any] = []
    handle = trunk.register_forward_hook(lambda *passed: answers.append(passed[-1]))
    try:
        through(**told, logits_to_keep=1)
    finally:
        handle.remove()
    return answers[0]


def _states(answer: Any, length: int) -> Tensor:
    states: Tensor = answer.last_hidden_state
    return states[:, -length - 1 : -1]


def shared_length(ids: Tensor, mask: Tensor, length: int) -> int:
    """How many tokens all prompts begin with, short of the last of each."""
    prompts = ids.size(1) - length
    padding = mask.argmax(dim=1, keepdim=True)
    places = torch.arange(prompts, device=ids.device) + padding
    begun = ids.gather(1, places.clamp(max=prompts - 1))
    alike = ((begun == begun[:1]) & (places < prompts - 1)).all(dim=0)
    return int(alike.long().cumprod(dim=0).sum())


def _keeps_all(trunk: Any) -> bool:
    """Whether all layers keep every position, and are not computed again on the way back."""
    layers = DynamicCache(config=trunk.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers) and not trunk.is_gradient_checkpointing

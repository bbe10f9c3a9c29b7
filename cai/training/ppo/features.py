"""The last hidden states before each token of completions. On a CPU nothing is computed for padding, and what all prompts of a
batch begin with, be it a system prompt or the first words of a chat template, once."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from cai.engines.prefixes import keeps_all
from cai.training.ppo.packing import pack, shared_length

_AT_ONCE = 4096
"""Tokens in one pass, with padding: a mask of packed rows has the square of it. Longer ones are not packed."""


def completion_features(trunk: Any, ids: Tensor, mask: Tensor, length: int, through: Any = None) -> Tensor:
    """(B, length, width): the last hidden states at the positions before the last `length` tokens of each row; for padding,
    any of its row.

    `trunk` is a model of transformers without its output layer; `ids` and `mask` (B, L) are prompts, padded on the left, and
    completions, padded on the right, without gaps. Where it takes positions, they count from the first token of a prompt.
    `through`: a model around the trunk that has to see the pass, as what adds up gradients of several processes; nothing is
    packed then.
    """
    rows = _AT_ONCE // ids.size(1)
    if through is None and rows and ids.device.type == "cpu" and _may_pack(trunk):
        parts = zip(ids.split(rows), mask.split(rows), strict=True)
        return torch.cat([_packed_states(trunk, *part, length) for part in parts])
    told = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if takes_places(trunk):
        told["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)
    states: Tensor = (trunk(**told) if through is None else _seen(trunk, through, told)).last_hidden_state
    return states[:, -length - 1 : -1]


def rows_at_once(ids: Tensor, size: int) -> int:
    """How many of `ids` (B, L) a pass has: `size`, and on a CPU more of short ones where it keeps nothing for gradients."""
    takes_more = ids.device.type == "cpu" and not torch.is_grad_enabled()
    return max(size, _AT_ONCE // ids.size(1)) if takes_more else size


def _packed_states(trunk: Any, ids: Tensor, mask: Tensor, length: int) -> Tensor:
    packing = pack(ids, mask, shared_length(ids, mask, length) if len(ids) > 1 else 0)
    told = {"position_ids": packing.places, "attention_mask": packing.may_see(), "use_cache": False}
    states = trunk(input_ids=packing.ids, **told).last_hidden_state[0]
    return packing.before(states, mask[:, :-length].sum(dim=1, keepdim=True), length)


def _may_pack(trunk: Any) -> bool:
    """Whether a token says the same wherever its row stands, by positions and a mask of which earlier token it sees."""
    config = trunk.config
    both_ways = getattr(config, "use_bidirectional_attention", None) or getattr(config, "is_causal", None) is False
    takes_masks = trunk._supports_attention_backend and config._attn_implementation == "sdpa"
    return keeps_positions(trunk) and takes_masks and not both_ways


def keeps_positions(trunk: Any) -> bool:
    """Whether all layers keep every position, by its number and not by its column, and it means the same in short and in long
    rows."""
    scales = any(kind in str(getattr(trunk.config, "rope_parameters", "")) for kind in ("longrope", "dynamic"))
    return takes_places(trunk) and trunk._can_compile_fullgraph and keeps_all(trunk.config) and not scales


def takes_places(trunk: Any) -> bool:
    """Whether it can be told positions."""
    return "position_ids" in inspect.signature(trunk.forward).parameters


def _seen(trunk: Any, through: Any, told: dict[str, Any]) -> Any:
    """What the trunk answers in a pass of the model around it."""
    answers: list[Any] = []
    handle = trunk.register_forward_hook(lambda *passed: answers.append(passed[-1]))
    try:
        through(**told, logits_to_keep=1)
    finally:
        handle.remove()
    return answers[0]


def drops(trunk: Any) -> bool:
    """Whether a pass drops some of what it computes at random, by modules of torch or as its configuration says."""
    modules = any(isinstance(one, nn.Dropout) and one.p > 0 for one in trunk.modules())
    told = (value for name, value in trunk.config.to_dict().items() if "drop" in name)
    return bool(trunk.training and (modules or any(isinstance(one, float) and one > 0 for one in told)))

"""The last hidden states before each token of completions. On a CPU, what all prompts of a batch begin with, be it a system
prompt or the first words of a chat template, is computed once, with its gradients."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cai.engines.prefixes import Prefix, keeps_all

_WORTH = 128
"""Fewer tokens saved are not worth a pass of their own."""


def completion_features(trunk: Any, ids: Tensor, mask: Tensor, length: int, through: Any = None) -> Tensor:
    """(B, length, width): the last hidden states at the positions before the last `length` tokens of each row.

    `trunk` is a model of transformers without its output layer; `ids` and `mask` (B, L) are prompts, padded on the left, and
    completions, padded on the right. Where it takes positions, they count from the first token of a prompt. `through`: a model
    around the trunk that has to see the pass, as what adds up gradients of several processes; nothing is shared then.
    """
    if through is None and (shared := sharable_length(trunk, ids, mask, length)):
        return _states(_pass_sharing(trunk, ids, mask, shared), length)
    told = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if _takes_places(trunk):
        told["position_ids"] = _places(mask)
    return _states(trunk(**told) if through is None else _seen(trunk, through, told), length)


def _pass_sharing(trunk: Any, ids: Tensor, mask: Tensor, shared: int) -> Any:
    """What the trunk says of all columns but the first `shared` ones, which a cache stands for."""
    ids, attended = prefix_first(ids, mask, shared)
    return trunk(
        input_ids=ids[:, shared:],
        attention_mask=attended,
        position_ids=_places(attended)[:, shared:],
        past_key_values=compute_prefix(trunk, ids, shared).expanded(trunk.config, len(ids)),
        use_cache=True,
    )


def compute_prefix(trunk: Any, ids: Tensor, shared: int) -> Prefix:
    """What the trunk keeps of the first `shared` tokens of rows (B, L) that all begin with them."""
    one_row = DynamicCache(config=trunk.config)
    places = torch.arange(shared, device=ids.device)[None]
    trunk(input_ids=ids[:1, :shared], position_ids=places, past_key_values=one_row, use_cache=True)
    return Prefix([(layer.keys, layer.values) for layer in one_row.layers], shared)


def prefix_first(ids: Tensor, mask: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Rows (B, L), padded on the left, that share their beginning, and their mask: the beginning first, and padding after it.

    Padding shifts the beginning of a row to the right: as many columns as it has of it are cut from a row, and what is left of
    the beginning is masked.
    """
    padding = mask.argmax(dim=1, keepdim=True)
    first = int(padding[0])
    after = torch.arange(ids.size(1) - shared, device=ids.device) >= padding
    attended = torch.cat([mask.new_ones(len(ids), shared), mask[:, shared:] * after], dim=1)
    begun = ids[:1, first : first + shared].expand(len(ids), -1)
    return torch.cat([begun, ids[:, shared:]], dim=1), attended


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


def sharable_length(trunk: Any, ids: Tensor, mask: Tensor, length: int) -> int:
    """How many tokens of the prompts' beginning are to be computed once, if any: see `shared_length`."""
    if ids.device.type != "cpu" or not _may_share(trunk):
        return 0
    shared = shared_length(ids, mask, length)
    return shared if shared * (len(ids) - 1) >= _WORTH else 0


def shared_length(ids: Tensor, mask: Tensor, length: int) -> int:
    """How many tokens all prompts begin with, short of the last of each."""
    prompts = ids.size(1) - length
    columns = torch.arange(prompts, device=ids.device) + mask.argmax(dim=1, keepdim=True)
    begun = ids.gather(1, columns.clamp(max=prompts - 1))
    alike = ((begun == begun[:1]) & (columns < prompts - 1)).all(dim=0)
    return int(alike.long().cumprod(dim=0).sum())


def _may_share(trunk: Any) -> bool:
    """Whether a pass in two parts says what one pass says: all layers keep every position, by its number and not its column,
    and are not computed again on the way back, positions mean the same in short and long passes, and nothing is dropped at
    random."""
    scales = any(kind in str(getattr(trunk.config, "rope_parameters", "")) for kind in ("longrope", "dynamic"))
    differs = trunk.is_gradient_checkpointing or scales or drops(trunk)
    return _takes_places(trunk) and trunk._can_compile_fullgraph and keeps_all(trunk.config) and not differs


def _takes_places(trunk: Any) -> bool:
    return "position_ids" in inspect.signature(trunk.forward).parameters


def drops(trunk: Any) -> bool:
    """Whether a pass drops some of what it computes at random, by modules of torch or as its configuration says."""
    modules = any(isinstance(one, nn.Dropout) and one.p > 0 for one in trunk.modules())
    told = (value for name, value in trunk.config.to_dict().items() if "drop" in name)
    return bool(trunk.training and (modules or any(isinstance(one, float) and one > 0 for one in told)))

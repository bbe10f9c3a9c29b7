"""What all prompts of a rollout begin with, computed once before any of them is answered."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from cai.engines.prefixes import Prefix
from cai.training.ppo.features import drops, keeps_positions
from cai.training.ppo.packing import shared_length

_WORTH = 128
"""Fewer tokens saved are not worth a pass of their own."""


def sharable_length(trunk: Any, ids: Tensor, mask: Tensor) -> int:
    """How many tokens of the beginning of prompts (B, L) are to be computed once, if any."""
    if ids.device.type != "cpu" or not _may_share(trunk):
        return 0
    shared = shared_length(ids, mask, 0)
    return shared if shared * (len(ids) - 1) >= _WORTH else 0


def _may_share(trunk: Any) -> bool:
    """Whether passes in two parts say what one pass says: by positions, and with nothing dropped at random."""
    return keeps_positions(trunk) and not (drops(trunk) or trunk.is_gradient_checkpointing)


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

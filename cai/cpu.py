"""What makes a transformers model fast on a CPU. Nothing here changes what it computes, but for rounding."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import eager_mask

_SHORT_ATTENTION, _SHORT = "short", 256
"""Up to so many positions, plain products take a fifth to a half of the time of torch's fused attention with its gradients."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of mallopt(3)."""


def tune_for_cpu(model: Any) -> None:
    """All of the below."""
    keep_freed_memory()
    contiguous_head(model)
    short_attention(model)


@cache
def keep_freed_memory() -> None:
    """Let this process keep memory that is freed for what is allocated next, where that is glibc's: large tensors are otherwise
    given back to the kernel, and asked for again page by page, which can take longer than the arithmetic on them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def contiguous_head(model: Any) -> None:
    """Let the output layer of a language model read contiguous features only. A slice of hidden states is not: on a CPU, matmul
    then copies frozen weights of the layer once per row, which takes longer than all else together."""
    head = model.get_output_embeddings()
    if head is not None and _make_contiguous not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_make_contiguous)


def _make_contiguous(module: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(arg.contiguous() for arg in args)


def short_attention(model: Any) -> None:
    """Let a model that attends by torch's fused attention use plain products for short sequences."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_SHORT_ATTENTION, _attend)
        AttentionMaskInterface.register(_SHORT_ATTENTION, eager_mask)
        model.set_attn_implementation(_SHORT_ATTENTION)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """(B, heads, Q, width) and (B, key heads, K, width) to (B, Q, heads, width)."""
    if key.size(2) > _SHORT or attention_mask is None or dropout or named.get("position_bias") is not None:
        fused: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named
        )
        return fused
    groups = query.size(1) // key.size(1)
    scores = query @ repeat_kv(key, groups).mT * (scaling or query.size(-1) ** -0.5) + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ repeat_kv(value, groups)).transpose(1, 2).contiguous(), None

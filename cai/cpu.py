"""What makes a transformers model fast on a CPU. Nothing here changes what it computes, but for rounding."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_SHORT = 256
"""Up to so many positions, plain products take a fifth to a half of the time of torch's fused attention with its gradients."""
_ROWS = 4
"""Where one token is written, they take less from so many rows on: a third of the time with 32."""
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Of mallopt(3)."""


def tune_for_cpu(model: Any) -> None:
    """All of the below."""
    keep_freed_memory()
    contiguous_head(model)
    plain_attention()


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


@cache
def plain_attention() -> None:
    """Where plain products are quicker on a CPU than torch's fused attention, let all models of this process use them."""
    AttentionInterface.register("sdpa", _attend)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """(B, heads, Q, width) and (B, key heads, K, width) to (B, Q, heads, width), by the interface of transformers."""
    length, mask, is_writing = key.size(2), attention_mask, query.size(2) == 1
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if mask is None and causal and not is_writing and query.size(2) == length <= _SHORT:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    more = dropout or any(named.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    packing = getattr(attention_mask, "packing", None)
    if packing is not None and not more:
        by_row: Tensor = packing.attend(lambda q, k, v, m: _attend(module, q, k, v, m, 0.0, scaling)[0], query, key, value)
        return by_row, None
    quicker = len(query) >= _ROWS if is_writing else mask is not None and length <= _SHORT
    if more or query.device.type != "cpu" or not quicker:
        told = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **named}
        fused: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **told)
        return fused
    grouped = query.unflatten(1, (key.size(1), -1)).flatten(2, 3)  # those heads that share a key are one longer one
    scores = grouped @ key.mT * (query.size(-1) ** -0.5 if scaling is None else scaling)
    scores = scores.view(*query.shape[:3], length)
    if mask is not None:
        if mask.dtype == torch.bool:  # a sum has quicker gradients than what fills in
            mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype).view(*grouped.shape[:3], length)
    return (weights @ value).view(*query.shape[:3], -1).transpose(1, 2).contiguous(), None

"""Tokens drawn by one random number a row, where `generate` of transformers draws one for each word of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """A token of each row, (B, 1): of `probabilities` (B, vocabulary), not negative, by `uniform` (B, 1) in [0, 1)."""
    cumulative = probabilities.cumsum(dim=-1)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.clamp(max=probabilities.size(-1) - 1)


def only(tokens: Tensor, scores: Tensor) -> Tensor:
    """`scores` (B, vocabulary) that leave nothing possible but `tokens` (B, 1)."""
    return torch.full_like(scores, float("-inf")).scatter_(1, tokens, 0.0)

"""The arithmetic of PPO on tensors: returns, advantages, losses, and what holds the KL. Nothing here knows of a model.

Shapes: B completions of at most T tokens. A mask is 1 on tokens that the policy chose and 0 on padding and on what a tool
said; such tokens are skipped: they end no episode, and no number there reaches any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k3"]
_TINY = 1e-8


def kl_estimate(logps: Tensor, reference: Tensor, kind: Estimator) -> Tensor:
    """The KL to the reference at each token that was sampled from the policy; shapes alike.

    `k1` is the log-ratio, unbiased; `k3` is never negative (Schulman 2020, "Approximating KL Divergence").
    """
    ratio = logps - reference
    return ratio if kind == "k1" else torch.expm1(-ratio) + ratio


def token_rewards(score: Tensor, kl: Tensor, mask: Tensor, coefficient: float) -> Tensor:
    """What each token is paid, (B, T): `-coefficient` times its KL, and the last token of the mask the completion's score (B,).

    Ziegler et al. 2019 (arXiv 1909.08593, equation 2). A completion of which no token counts is paid nothing.
    """
    rewards = torch.where(mask > 0, -coefficient * kl, 0.0)
    is_last = (torch.arange(mask.size(1), device=mask.device) == last_places(mask)) & (mask > 0)
    return rewards + torch.where(is_last, score.unsqueeze(1), 0.0)


def last_places(mask: Tensor) -> Tensor:
    """(B, 1): where the last token of each row's mask stands, 0 where none does."""
    return (mask * torch.arange(mask.size(1), device=mask.device)).amax(dim=1, keepdim=True)


def advantages_and_returns(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and the returns that values are fitted to, both (B, T) and 0 outside of the mask.

    Schulman et al. 2015 (arXiv 1506.02438, equation 16). The episode ends with the last token of the mask.
    """
    advantages = torch.zeros_like(rewards)
    next_advantage = next_value = torch.zeros_like(rewards[:, 0])
    for place in reversed(range(rewards.size(1))):
        counts = mask[:, place] > 0
        delta = rewards[:, place] + gamma * next_value - values[:, place]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, values[:, place], next_value)
        advantages[:, place] = torch.where(counts, advantage, 0.0)
    return advantages, torch.where(mask > 0, advantages + values, 0.0)


Total = Callable[[Tensor], Tensor]
"""Adds a tensor up over all processes."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance of what a mask counts, over all processes, and how much that is."""

    mean: Tensor
    variance: Tensor
    count: Tensor

    @classmethod
    def of(cls, values: Tensor, mask: Tensor, total: Total) -> Moments:
        """Of `values` where `mask` is not 0; both are 0 where nothing is counted."""
        counted = mask > 0
        wide = torch.float32 if values.device.type == "mps" else torch.float64  # which Apple's GPUs have not
        kept = torch.where(counted, values, 0.0).to(wide)
        first = total(torch.stack([kept.sum(), counted.sum().to(wide)]))
        count = first[1]
        mean = first[0] / count.clamp(min=1)
        second = total((torch.where(counted, kept - mean, 0.0) ** 2).sum())
        return cls(mean.to(values.dtype), (second / count.clamp(min=1)).to(values.dtype), count)


def whiten(values: Tensor, mask: Tensor, total: Total) -> Tensor:
    """Mean 0 and variance 1 over all tokens of the mask, and 0 outside of it."""
    moments = Moments.of(values, mask, total)
    return torch.where(mask > 0, (values - moments.mean) * torch.rsqrt(moments.variance + _TINY), 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, total: Total) -> float:
    """1 less the variance of what values miss over that of the returns: 1 is perfect, 0 no better than their mean.

    Not a number where all returns are alike.
    """
    left, whole = (float(Moments.of(one, mask, total).variance) for one in (returns - values, returns))
    return 1 - left / whole if whole > _TINY else math.nan


def value_errors(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, and where the clipped one was the larger; (B, T).

    With `clip`, values count as at most so far from those of the rollout, and the larger error is taken (Schulman et al. 2017
    as implemented in baselines; Huang et al. 2024, arXiv 2403.17031, section 4).
    """
    error = (values - returns) ** 2
    if clip is None:
        return error / 2, torch.zeros_like(error, dtype=torch.bool)
    clipped = (old + (values - old).clamp(-clip, clip) - returns) ** 2
    return torch.maximum(error, clipped) / 2, clipped > error


@dataclass
class KLControl:
    """The coefficient of the KL in the reward: fixed, or steered to a target (Ziegler et al. 2019, section 2.2)."""

    coefficient: float
    target: float | None = None
    """Nats a completion; None: the coefficient is fixed."""
    horizon: int = 10_000
    """Completions in which an error of 1 would change the coefficient e-fold, were it not clipped."""

    def update(self, kl: float, completions: int) -> None:
        """After a batch with so many nats a completion. The error is clipped to 0.2."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * completions / self.horizon

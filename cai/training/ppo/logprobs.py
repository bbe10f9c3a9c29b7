"""Log-probabilities of given tokens where there is no Triton: whole rows of the vocabulary, a few tokens at a time.

TRL's kernel goes over the vocabulary in tiles, which without Triton are folded one by one, in float32, for prompts too. Here a
matrix product in the dtype of the model gives all logits of some tokens at once, and the next ones take their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_AT_ONCE = 512
"""Tokens whose logits are in memory together."""


class TokenLogProbs(torch.autograd.Function):
    """Of each token its log-probability and the entropy there, (N,) each, float32; the first gives `hidden` its gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, entropies: bool
    ) -> Any:
        """`hidden` (N, width) and `weight` (vocabulary, width) of one dtype that reaches as far as float32 does, `tokens` (N,);
        entropies not asked for are 0.

        What gradients need is computed here, while the logits are there: the output of `backward` for gradients of 1.
        """
        found, entropy = (torch.zeros(len(hidden), device=hidden.device) for _ in range(2))
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_slope = slope is not None and bias is None and weight.dtype == torch.float32
        for part in _parts(len(hidden)):
            logits = _logits(hidden[part], weight, bias, temperature)
            logits -= logits.amax(dim=1, keepdim=True)
            chosen = logits.gather(1, tokens[part].unsqueeze(1))[:, 0]
            weights = logits.exp() if entropies and not by_slope else logits.exp_()
            total = weights.sum(dim=1)
            found[part] = chosen - total.log()
            if entropies and not by_slope:
                entropy[part] = total.log() - torch.bmm(weights.unsqueeze(1), logits.unsqueeze(2)).flatten() / total
            if slope is not None:
                weights.scatter_add_(1, tokens[part].unsqueeze(1), -total.unsqueeze(1))
                slope[part] = (weights.to(weight.dtype) @ weight) * (-1 / (total * temperature)).unsqueeze(1)
        if entropies and by_slope:  # hidden x slope is a logit less the mean of all, by their probabilities
            entropy = (torch.linalg.vecdot(hidden, slope) - found).clamp_(min=0)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of `hidden`."""
        (slope,) = ctx.saved_tensors
        return slope * gradients[0].unsqueeze(1).to(slope.dtype), None, None, None, None, None


def _parts(count: int) -> list[slice]:
    return [slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1 else logits.div_(temperature)


def token_logprobs(
    hidden: Tensor, head: Any, tokens: Tensor, mask: Tensor, temperature: float, entropies: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` (B, T) and entropies, from the features (B, T, width) before each and the output layer; 0
    where `mask` (B, T) is."""
    weight, counted = head.weight, mask.flatten().nonzero()[:, 0]
    with torch.autocast(hidden.device.type, enabled=False):
        flat = hidden.reshape(-1, hidden.size(-1)).index_select(0, counted).to(weight.dtype)
        found = TokenLogProbs.apply(flat, weight, head.bias, tokens.flatten()[counted], temperature, entropies)
    logps, entropy = (torch.zeros(mask.numel(), device=hidden.device).index_copy(0, counted, one) for one in found)
    return logps.view_as(tokens), entropy.view_as(tokens)


_SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def is_plain(model: Any) -> bool:
    """Whether a language model's logits are its output layer's, which is not trained itself."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    plain = all(getattr(config, name, None) is None for name in _SCALED)
    return plain and isinstance(head, torch.nn.Linear) and not any(one.requires_grad for one in head.parameters())

"""Log-probabilities of given tokens where there is no Triton: whole rows of the vocabulary, a few tokens at a time.

TRL's kernel goes over the vocabulary in tiles, which without Triton are folded one by one, in float32, for prompts too. Here a
matrix product in the dtype of the model gives all logits of some tokens at once, and the next ones take their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_AT_ONCE = 256
"""Tokens whose logits are in memory together."""


class TokenLogProbs(torch.autograd.Function):
    """Of each token its log-probability and the entropy there, (N,) each, float32; the first gives `hidden` its gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, temperature: float, entropies: bool
    ) -> Any:
        """`hidden` (N, width) and `weight` (vocabulary, width) of one dtype, `tokens` (N,); entropies not asked for are 0."""
        found, entropy, total = (torch.zeros(len(hidden), device=hidden.device) for _ in range(3))
        for part in _parts(len(hidden)):
            logits = _logits(hidden[part], weight, bias, temperature)
            total[part] = logits.logsumexp(dim=1)
            found[part] = logits.gather(1, tokens[part].unsqueeze(1))[:, 0] - total[part]
            if entropies:
                logits -= total[part].unsqueeze(1)
                entropy[part] = -torch.linalg.vecdot(logits.exp(), logits)
        ctx.save_for_backward(hidden, weight, bias, tokens, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Of `hidden`: the logits are computed again."""
        hidden, weight, bias, tokens, total = ctx.saved_tensors
        found = torch.empty_like(hidden)
        for part in _parts(len(hidden)):
            logits = _logits(hidden[part], weight, bias, ctx.temperature)
            surprise = logits.sub_(total[part].unsqueeze(1)).exp_().neg_()
            surprise.scatter_add_(1, tokens[part].unsqueeze(1), torch.ones_like(surprise[:, :1]))
            surprise *= (gradients[0][part] / ctx.temperature).unsqueeze(1)
            found[part] = surprise.to(weight.dtype) @ weight
        return found, None, None, None, None, None


def _parts(count: int) -> list[slice]:
    return [slice(start, start + _AT_ONCE) for start in range(0, count, _AT_ONCE)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1 else logits.div_(temperature)


def token_logprobs(
    hidden: Tensor, head: Any, tokens: Tensor, temperature: float, entropies: bool = True
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` (B, T) and entropies, from the features (B, T, width) before each and the output layer."""
    weight = head.weight
    with torch.autocast(hidden.device.type, enabled=False):
        flat = hidden.reshape(-1, hidden.size(-1)).to(weight.dtype)
        found = TokenLogProbs.apply(flat, weight, head.bias, tokens.reshape(-1), temperature, entropies)
    return found[0].view_as(tokens), found[1].view_as(tokens)


def completion_logprobs(
    model: Any, base: Any, ids: Tensor, mask: Tensor, length: int, size: int, temperature: float, entropies: bool
) -> tuple[Tensor, Tensor]:
    """Of the last `length` tokens of each row of `ids`, `size` rows at a time. `base` is the language model in `model`."""
    features: list[Tensor] = []
    found = []
    handle = base.base_model.register_forward_hook(lambda *passed: features.append(passed[-1].last_hidden_state))
    try:
        for part, attention in zip(ids.split(size), mask.split(size), strict=True):
            model(input_ids=part, attention_mask=attention, use_cache=False, logits_to_keep=1)
            before, tokens = features.pop()[:, -length - 1 : -1], part[:, -length:]
            found.append(token_logprobs(before, base.get_output_embeddings(), tokens, temperature, entropies))
    finally:
        handle.remove()
    return torch.cat([one[0] for one in found]), torch.cat([one[1] for one in found])


_SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def is_plain(model: Any) -> bool:
    """Whether a language model's logits are its output layer's, which is not trained itself."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    plain = all(getattr(config, name, None) is None for name in _SCALED)
    return plain and isinstance(head, torch.nn.Linear) and not head.weight.requires_grad

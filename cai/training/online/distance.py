"""How far the policy is from the reference: the KL divergence, from completions that the policy has just written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import use_adapter


def log_ratios(trainer: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[float] | None:
    """Of each completion (tokens, after those of its prompt) log(policy) - log(reference) in nats, whose mean is the KL
    divergence of completions; None where the trainer has no reference in memory."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.ref_model is None and not hasattr(model, "peft_config"):
        return None
    before, before_mask = _padded(trainer, prompts, left=True)
    after, after_mask = _padded(trainer, completions, left=False)
    batch = (before, before_mask, after, after_mask)
    with torch.no_grad():
        policy = _logps(trainer, trainer.model, *batch)
        if trainer.ref_model is not None:
            reference = _logps(trainer, trainer.ref_model, *batch)
        else:
            with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
                reference = _logps(trainer, trainer.model, *batch)
    ratios: Tensor = ((policy - reference) * after_mask).sum(dim=1)
    return [float(one) for one in ratios]


def _logps(trainer: Any, model: Any, before: Tensor, before_mask: Tensor, after: Tensor, after_mask: Tensor) -> Tensor:
    """Log-probabilities of the completions' tokens, (B, T), at the temperature of the training."""
    if not hasattr(trainer, "_get_per_token_logps_and_entropies"):  # online DPO
        found: Tensor = trainer._forward(model, before, before_mask, after, after_mask)
        return found
    ids, mask = torch.cat([before, after], dim=1), torch.cat([before_mask, after_mask], dim=1)
    size = trainer.args.per_device_train_batch_size
    found = trainer._get_per_token_logps_and_entropies(model, ids, mask, after.size(1), batch_size=size)[0]
    return found


def _padded(trainer: Any, sequences: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids and what is no padding, (B, T) each."""
    tensors = [torch.tensor(one, dtype=torch.long) for one in sequences]
    side, device = "left" if left else "right", trainer.accelerator.device
    pad = trainer.processing_class.pad_token_id
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad, padding_side=side)
    mask = pad_sequence([torch.ones_like(one) for one in tensors], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)

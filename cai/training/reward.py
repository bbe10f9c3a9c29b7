"""A Bradley-Terry reward model on TRL's trainer, with the soft label in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from cai.training.loading import adapters, load_classifier
from cai.training.losses import soft_bradley_terry
from cai.training.settings import RewardSettings
from cai.training.stage import Parts

LABEL = "chosen_probability"


def build(parts: Parts) -> Any:
    """The trainer of one reward model."""
    settings = parts.settings
    assert isinstance(settings, RewardSettings)
    collator = SoftCollator(pad_token_id=parts.tokenizer.pad_token_id, pad_to_multiple_of=parts.arguments.pad_to_multiple_of)
    return SoftRewardTrainer(
        model=load_classifier(settings, outputs=1),
        peft_config=adapters(settings, "SEQ_CLS"),
        data_collator=collator,
        **parts.shared,
    )


@dataclass
class SoftCollator(DataCollatorForPreference):
    """TRL's collator, with the labels beside: shape (pairs,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """One batch."""
        return {**super().torch_call(examples), LABEL: torch.tensor([one[LABEL] for one in examples], dtype=torch.float32)}


class SoftRewardTrainer(RewardTrainer):
    """TRL's trainer with the cross-entropy against each pair's own label; where every label is 1, TRL's own loss."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns
        if LABEL not in columns:
            columns.append(LABEL)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss and measures, and what soft labels add to them."""
        rest = {key: value for key, value in inputs.items() if key != LABEL}
        loss, outputs = super().compute_loss(model, rest, return_outputs=True, num_items_in_batch=num_items_in_batch)
        chosen, rejected = torch.chunk(outputs.logits.squeeze(-1), chunks=2)
        margin: Tensor | float = rest.get("margin", 0.0)
        soft = soft_bradley_terry(chosen - rejected, inputs[LABEL], margin)
        hard = soft_bradley_terry(chosen - rejected, torch.ones_like(inputs[LABEL]), margin)
        loss = loss + (soft - hard).mean()
        return (loss, outputs) if return_outputs else loss

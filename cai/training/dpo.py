"""DPO on TRL, each pair counting by its own soft label.

The reference is the model that the training begins with. Under adapters it is the same weights with the adapters disabled,
and costs no memory. Where all weights are trained, a second model would have to stay beside the policy; instead its
log-probabilities of each row are computed once before the first step (`trl.precompute_ref_log_probs`, on by default there: one
pass over the rows, and two numbers a row to keep). `trl: {precompute_ref_log_probs: false}` keeps a second model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from cai.training.labels import Labelled, keep_column
from cai.training.loading import adapters, load_policy, load_reference
from cai.training.losses import soften_dpo
from cai.training.settings import DpoSettings
from cai.training.stage import Parts

LABEL = "chosen_probability"


def build(parts: Parts) -> Any:
    """TRL's trainer, or the one with soft labels."""
    settings = parts.settings
    assert isinstance(settings, DpoSettings)
    arguments, tokenizer = parts.arguments, parts.tokenizer
    given = {
        "model": load_policy(settings),
        "ref_model": load_reference(settings, arguments, settings.reference),
        "peft_config": adapters(settings),
        **parts.shared,
    }
    if not settings.soft_labels:
        return DPOTrainer(**given)
    collator = DataCollatorForPreference(
        pad_token_id=tokenizer.pad_token_id,
        max_length=arguments.max_length,
        truncation_mode=arguments.truncation_mode,
        pad_to_multiple_of=arguments.pad_to_multiple_of,
    )
    return SoftDPOTrainer(data_collator=Labelled(collator, LABEL), **given)


class SoftDPOTrainer(DPOTrainer):
    """TRL's loss, and what soft labels add to it; where every label is 1 it is TRL's loss exactly."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        keep_column(self, LABEL)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """TRL's; the labels are nothing that a model takes."""
        return super().compute_ref_log_probs(model, _without_label(inputs))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        rest = _without_label(inputs)
        with self._passes() as passes:
            result = super()._compute_loss(model, rest, return_outputs)
        added = self._added(passes, rest, inputs[LABEL].to(self.accelerator.device))
        loss, outputs = result if return_outputs else (result, None)
        return (loss + added, outputs) if return_outputs else loss + added

    @contextmanager
    def _passes(self) -> Iterator[list[Any]]:
        """What the policy answers while the block runs, and after it the reference where that is not precomputed."""
        seen: list[Any] = []
        models = [self.accelerator.unwrap_model(self.model), *([self.ref_model] if self.ref_model is not None else [])]
        hooks = [one.register_forward_hook(lambda _module, _given, outputs: seen.append(outputs)) for one in models]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _added(self, passes: list[Any], inputs: dict[str, Any], probability: Tensor) -> Tensor:
        mask = inputs["completion_mask"]
        policy = passes[0].log_probs[:, -(mask.size(1) - 1) :].sum(dim=1)
        if self.precompute_ref_logps:
            reference = torch.cat((inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])).to(policy.device)
        else:
            reference = passes[1].log_probs[:, -(mask.size(1) - 1) :].sum(dim=1)
        ratio = policy - reference
        lengths = mask.sum(dim=1).clamp(min=1)
        added = policy.new_zeros(())
        for kind, weight in zip(self.loss_types, self.loss_weights, strict=True):
            chosen, rejected = (ratio / lengths if kind in ("ipo", "sigmoid_norm") else ratio).chunk(2)
            added = added + weight * soften_dpo(kind, chosen - rejected, probability, self.beta).mean()
        return added


def _without_label(inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != LABEL}

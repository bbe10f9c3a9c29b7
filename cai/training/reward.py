"""A Bradley-Terry reward model with soft labels and one output or several, on TRL's trainer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from trl import RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from cai.rewards.heads import make_exact
from cai.training.labels import Labelled, keep_column
from cai.training.loading import adapters, load_classifier
from cai.training.losses import reward_loss
from cai.training.objectives import LABELS
from cai.training.settings import RewardSettings
from cai.training.stage import Parts


def build(parts: Parts) -> Any:
    """The trainer of one reward model, on rows with `chosen_ids`, `rejected_ids` and labels."""
    settings = parts.settings
    assert isinstance(settings, RewardSettings)
    padding = {"pad_token_id": parts.tokenizer.pad_token_id, "pad_to_multiple_of": parts.arguments.pad_to_multiple_of}
    collator = Labelled(DataCollatorForPreference(**padding), LABELS)
    model = load_classifier(settings, outputs=len(settings.heads))
    make_exact(model)
    with _as_one_output(model):
        trainer = SoftRewardTrainer(
            model=model, peft_config=adapters(settings, "SEQ_CLS"), data_collator=collator, **parts.shared
        )
    if settings.objectives:
        model.config.id2label = dict(enumerate(settings.heads))
        model.config.label2id = {name: place for place, name in enumerate(settings.heads)}
    return trainer


@contextmanager
def _as_one_output(model: Any) -> Iterator[None]:
    """TRL's constructor takes one output only; nothing else of it minds."""
    outputs = model.config.num_labels
    model.config.num_labels = 1
    try:
        yield
    finally:
        model.config.num_labels = outputs


class SoftRewardTrainer(RewardTrainer):
    """TRL's trainer with `reward_loss` in place of its loss, which this is where there is one output and each label is 1."""

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        keep_column(self, LABELS)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss; and TRL's measures under TRL's names."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        chosen, rejected = outputs.logits.float().chunk(2)
        margin = inputs["margin"].unsqueeze(-1) if "margin" in inputs else 0.0
        loss = reward_loss(chosen, rejected, inputs[LABELS], margin, self.args.center_rewards_coefficient)
        self._note(inputs, outputs.logits.detach(), (chosen - rejected).detach())
        return (loss, outputs) if return_outputs else loss

    def _note(self, inputs: dict[str, Any], rewards: Tensor, ahead: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        measures = self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += int(self._gathered(inputs["attention_mask"].sum()).sum()) // self._tp_size
        measures["num_tokens"] = [self._total_train_tokens]
        every = self._gathered(rewards)
        for name, value in (("min_reward", every.min()), ("mean_reward", every.mean()), ("max_reward", every.max())):
            measures[name].append(value.item())
        leaning = torch.nan_to_num(inputs[LABELS], 0.5) - 0.5
        right = self._gathered(((ahead * leaning) > 0).float().sum())
        told = self._gathered((leaning != 0).float().sum())
        if told.sum() > 0:
            measures["accuracy"].append((right.sum() / told.sum()).item())
        measures["margin"].append(self._gathered(ahead.mean()).mean().item())

    def _gathered(self, one: Tensor) -> Tensor:
        every: Tensor = self.accelerator.gather(one)
        return every

"""The order of prompts where a training goes on: TRL's sampler draws a new one for each epoch, and of epochs that are over it
would draw none, so that the first order came again."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler


class Order(TrainerCallback):
    """Draws the orders of the epochs that are over."""

    def __init__(self, trainer: Any) -> None:
        """For a trainer whose sampler is not made yet."""
        self._sampler: Any = None
        make = trainer._get_train_sampler

        def remember(*given: Any) -> Any:
            self._sampler = make(*given)
            return self._sampler

        trainer._get_train_sampler = remember
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """The sampler is made, and the checkpoint's state read."""
        if isinstance(self._sampler, RepeatSampler) and self._sampler.shuffle:
            for _ in range(int((state.epoch or 0.0) + 1e-6)):
                torch.randperm(self._sampler.num_samples, generator=self._sampler.generator)

"""TRL's online DPO, which here leaves out pairs that rewards do not order, and takes the mean of the batches of a step; and
whose log rewards can add to."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl.experimental.online_dpo import OnlineDPOTrainer

from cai.training.online.rollouts import weighted


class OnlineDpo(OnlineDPOTrainer):
    """Nothing is learned from a pair of which one completion has no number from any reward, or both have the same number in the
    end. The log has the means of what rewards gave to `log_metric` since the last line, in all processes."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self._said: dict[str, list[float]] = {}
        self._rewards, self._known, self._mean = torch.empty(0), torch.empty(0), 0.0
        super().__init__(*given, **named)

    def _forward(self, *given: Any, **named: Any) -> Tensor:
        """TRL's (2 B, T), with the gradients of `_weighted`."""
        logps: Tensor = super()._forward(*given, **named)
        if logps.requires_grad:
            logps.register_hook(self._weighted)
        return logps

    def _weighted(self, gradient: Tensor) -> Tensor:
        """None for completions of pairs that are found not to be any, which is known only after TRL has fined those without an
        end; and those of a batch by how many a step has, which the trainer, whose own step this is, leaves out. DeepSpeed does
        it by itself."""
        half = len(self._rewards) // 2
        paired = self._known & self._known.roll(half) & (self._rewards != self._rewards.roll(half))
        batches = 1 if self.is_deepspeed_enabled else self.current_gradient_accumulation_steps
        return gradient * paired.to(gradient).unsqueeze(1) / batches

    def _calculate_rewards_from_functions(
        self, prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]], **columns: Any
    ) -> Tensor:
        """(2 B,): the weighted sum of what rewards say of each completion, of those that say something. Where none does, the
        mean of the others, or of the last batch with any, which moves no mean in the log."""
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids_list, **columns}
        said = [one(**given, trainer_state=self.state, log_metric=self._note) for one in self.reward_funcs]
        weights = [1.0] * len(said) if self.reward_weights is None else self.reward_weights.tolist()
        rewards = torch.tensor([math.nan if one is None else one for one in weighted(said, weights)])
        rewards = rewards.to(self.accelerator.device)
        self._known = ~rewards.isnan()
        if self._known.any():
            self._mean = float(rewards.nanmean())
        self._rewards = rewards.nan_to_num(self._mean)  # from which TRL takes its fines in place
        return self._rewards

    def _note(self, name: str, value: float) -> None:
        self._said.setdefault(name, []).append(value)

    def log(self, logs: dict[str, float], *given: Any, **named: Any) -> None:
        """TRL's; all processes call it."""
        said: dict[str, list[float]] = {}
        for part in gather_object([self._said]):
            for name, values in part.items():
                said.setdefault(name, []).extend(values)
        self._said = {}
        super().log({**logs, **{name: fmean(values) for name, values in said.items()}}, *given, **named)

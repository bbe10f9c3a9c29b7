"""PPO (Schulman et al. 2017, arXiv 1707.06347) on TRL's trainer of GRPO, for language models as in Ziegler et al. 2019.

TRL generates (by transformers or vLLM), asks reward functions, keeps the reference, clips the ratio, logs and saves. Here are
the value function, the KL as a part of each token's reward, advantages of each token, and what a checkpoint holds of them. The
value of the state before a token is read at the position before it.

    trainer = PPOTrainer(model, reward_funcs=brevity, args=PPOConfig("out"), train_dataset=prompts, value_model="models/reward")
    trainer.train()
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl.trainer.utils import get_config_model_id

from cai.cpu import tune_for_cpu
from cai.errors import ConfigError, EngineError
from cai.models import locate
from cai.training.adapters import quicken
from cai.training.ppo.config import PPOConfig
from cai.training.ppo.critic import CRITIC, AdapterCritic, is_critics
from cai.training.ppo.estimation import (
    KLControl,
    Moments,
    advantages_and_returns,
    explained_variance,
    kl_estimate,
    last_places,
    token_rewards,
    value_errors,
    whiten,
)
from cai.training.ppo.passes import PassingTrainer, whole
from cai.training.ppo.saving import Counters, check_whole, load_value, save_value
from cai.training.ppo.starting import Beginning, build_value

_logger = get_logger(__name__)


class PPOTrainer(PassingTrainer):
    """Takes what TRL's `GRPOTrainer` takes, and a `value_model`."""

    _tag_names: ClassVar = ["trl", "ppo"]
    _name = "PPO"

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *given: Any,
        value_model: str | Path | None = None,
        base_version: str | None = None,
        value_weight: float = 1.0,
        **named: Any,
    ) -> None:
        """`value_model`: the folder of a reward model with the policy's tokenizer that the critic begins with; None: the
        policy's trunk, and values that are all the same. `base_version`: of the weights under the policy's adapters, by
        `cai.models.locate`, which is asked where `model` is a name; adapters of a reward model on the same version are what the
        critic's begin with. `value_weight`: that of `value_model` in the sum of rewards. The trainer's `critic_note` says why
        a critic does not begin with `value_model`, if so, and is logged as a warning.
        """
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = PPOConfig(f"{Path(name).name}-PPO")
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        self._scores = torch.empty(0)
        self._is_level = not args.center_values
        super().__init__(model, reward_funcs, args, *given, **named)
        if isinstance(self.processing_class, ProcessorMixin) or hasattr(self.model.config, "vision_config"):
            raise ConfigError("PPO: the model is one that sees images, which the value function does not; name a model of text")
        self.kl = KLControl(args.beta, args.target_kl, args.kl_horizon)
        self._check_value_function()
        if value_model and base_version is None and self._has_adapters and isinstance(model, str):
            base_version = locate(model).version
        begin = Beginning(Path(value_model), base_version or "", value_weight) if value_model else None
        self.value, self.critic_note = build_value(self._policy, args, self._tokenizer, begin, self.accelerator.device)
        if self.critic_note:
            _logger.warning(self.critic_note)
        if self.accelerator.device.type == "cpu":
            tune_for_cpu(self._policy)
            quicken(self._policy)  # with the critic's adapters
        with self.value.working():
            self._trained = self.value.weights()
        self._value_optimizer = self._make_value_optimizer(args)

    # ------------------------------------------------------------------------------------------------ the value function
    def _check_value_function(self) -> None:
        """Raises `ConfigError` for one that shares weights which no process has all of."""
        shares = self._has_adapters or self.args.value_function == "head"
        if shares and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ConfigError(
                "value_function: one that shares the policy's weights cannot be trained while these are spread over processes; "
                "train a critic of its own, which each process then holds all of (no adapters, value_function: critic), or "
                "launch with a number or ddp"
            )

    def _make_value_optimizer(self, args: PPOConfig) -> torch.optim.Optimizer:
        """Adam, at one rate for the new weights of the value layer and another for all else."""
        new = self.value.layer.new()
        rest = [one for one in self._trained.values() if all(one is not other for other in new)]
        known = args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
        rates = [(new, args.value_learning_rate), (rest, known)]
        groups = [{"params": weights, "lr": rate, "initial_lr": rate} for weights, rate in rates if weights]
        betas = (args.adam_beta1, args.adam_beta2)
        return torch.optim.AdamW(groups, betas=betas, eps=args.adam_epsilon, weight_decay=0.0, fused=True)

    # ------------------------------------------------------------------------------------------------ rollouts
    def _calculate_rewards(self, *given: Any, **named: Any) -> Tensor:
        """TRL's; kept, since PPO needs the scores and not what GRPO makes of them."""
        self._scores = super()._calculate_rewards(*given, **named)
        return self._scores

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollout, with (B, T) `advantages`, `returns`, `values` and `value_mask`."""
        out = super()._generate_and_score_completions(inputs)
        logps, values = out["old_per_token_logps"], out["values"]
        score, scored = self._local_scores(out, len(inputs))
        sampled = _loss_mask(out)
        mask = sampled * scored.unsqueeze(1)
        scored = scored & mask.any(dim=1)
        reference = out.get("ref_per_token_logps")
        kl = kl_estimate(logps, logps if reference is None else reference, self.args.kl_estimator)
        kl = torch.where(sampled > 0, kl, 0.0)
        rewards = token_rewards(score, kl, mask, self.kl.coefficient)
        if self.model.training and not self._is_level:
            values = values + self._set_level(score, scored, values, mask)
        values = values * mask
        advantages, returns = advantages_and_returns(rewards, values, mask, self.args.gamma, self.args.lam)
        self._tell(score, scored, values, returns, mask)
        if reference is not None:
            self._tell_kl(kl, score, scored, sampled)
        if self.args.whiten_advantages:
            advantages = whiten(advantages, mask, self._total)
        self._tell_advantages(advantages, mask)
        more = {"values": values, "returns": returns, "value_mask": mask, "advantages": advantages}
        return {**out, **more, "num_items_in_batch": self._total(mask.sum())}

    def _local_scores(self, out: dict[str, Any], rows: int) -> tuple[Tensor, Tensor]:
        """This process's completions: the weighted sum of what reward functions said, and whether any of them said anything."""
        first = self.accelerator.process_index * rows
        table = self._scores[first : first + rows]
        scored = ~torch.isnan(table).all(dim=1)
        score = (table * self.reward_weights.to(table.device)).nansum(dim=1)
        if self.args.missing_eos_penalty is not None:
            mask = out["completion_mask"]
            last = out["completion_ids"].gather(1, last_places(mask))[:, 0]
            ended = torch.isin(last, torch.tensor(self.eos_token_ids, device=last.device))
            score = score - self.args.missing_eos_penalty * ~ended
        return score * scored, scored

    def _set_level(self, score: Tensor, scored: Tensor, values: Tensor, mask: Tensor) -> float:
        """Add to all values what those before last tokens lack of the scores on average, and say how much it was.

        Where scores are below what values begin at, every end is a disappointment and every token far from it is none, so that
        the policy would learn not to end, until the values have come down; where they are above, to end at once. With `gamma`
        below 1, by which scores count less far from the end, this is made smaller and not undone.
        """
        last = values.gather(1, last_places(mask)).squeeze(1)
        lacks = self._mean(score - last, scored)
        self._is_level = math.isfinite(lacks)
        if not self._is_level:
            return 0.0
        with torch.no_grad():
            self.value.layer.state.bias += lacks
        return lacks

    def _total(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def _mean(self, values: Tensor, counted: Tensor) -> float:
        """Over all processes; not a number where nothing is counted, which TRL's log leaves out."""
        moments = Moments.of(values, counted, self._total)
        return float(moments.mean) if moments.count > 0 else math.nan

    def _log(self, told: dict[str, float]) -> None:
        for name, value in told.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _tell(self, score: Tensor, scored: Tensor, values: Tensor, returns: Tensor, mask: Tensor) -> None:
        """Log the rollout."""
        told = {
            "objective/score": self._mean(score, scored),
            "value/mean": self._mean(values, mask),
            "value/returns": self._mean(returns, mask),
            "value/explained_variance": explained_variance(values, returns, mask, self._total),
        }
        mode = "train" if self.model.training else "eval"
        self._metrics[mode].pop("frac_reward_zero_std", None)  # of groups, which there are none of here
        self._log(told)

    def _tell_kl(self, kl: Tensor, score: Tensor, scored: Tensor, sampled: Tensor) -> None:
        """Log the KL of all completions, those without a reward too, and steer it."""
        of_each = kl.sum(dim=1)
        nats = self._mean(of_each, sampled.any(dim=1))
        told = {
            "kl": self._mean(kl, sampled),
            "objective/kl": nats,
            "objective/kl_coef": self.kl.coefficient,
            "objective/rlhf_reward": self._mean(score - self.kl.coefficient * of_each, scored),
        }
        self._log(told)
        paid = int(self._total(scored.sum()))
        if self.model.training and not self._warms_up and paid:
            self.kl.update(nats, paid)

    def _tell_advantages(self, advantages: Tensor, mask: Tensor) -> None:
        """In TRL's table of completions, the mean over each one's tokens in place of what GRPO would make of them."""
        means = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        gathered = self.accelerator.gather(means).tolist()
        column = self._logs["advantages"]
        for _ in range(min(len(column), len(gathered))):
            column.pop()
        column.extend(gathered)

    # ------------------------------------------------------------------------------------------------ losses
    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The clipped surrogate by TRL, without its KL, which is in the reward. The value function takes its gradients here."""
        if self._head is None:
            ids, attention = whole(inputs)
            with self.value.working():
                self._learn_values(self._critic_values(ids, attention, inputs["completion_ids"].size(1)), inputs)
        beta, self.beta, self._watched = self.args.beta, 0.0, []
        try:
            surrogate: Tensor = super()._compute_loss(model, inputs)
        finally:
            self.beta = beta
        if self._head is not None:
            self._learn_values(self._watched[-1], inputs)
        return surrogate * 0.0 if torch.is_grad_enabled() and self._warms_up else surrogate

    @property
    def _warms_up(self) -> bool:
        """Whether the value function is trained alone."""
        return bool(self.state.global_step < self.args.value_warmup_steps)

    def _learn_values(self, values: Tensor, inputs: dict[str, Any]) -> None:
        """Add the gradients of the clipped value loss, where anything is trained, and log it.

        The loss is the sum over a step's tokens by how many tokens a step of the rollout has on average, as TRL's surrogate:
        each token weighs the same, whatever batch or process it is in.
        """
        mask = inputs["value_mask"]
        errors, is_clipped = value_errors(values, inputs["values"], inputs["returns"], self.args.cliprange_value)
        if torch.is_grad_enabled():
            steps = self.current_gradient_accumulation_steps / self.args.steps_per_generation
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * steps
            ((errors * mask).sum() / tokens).backward()
        self._log(
            {"value/loss": self._mean(errors.detach(), mask), "value/clip_fraction": self._mean(is_clipped.float(), mask)}
        )

    def training_step(self, *given: Any, **named: Any) -> Tensor:
        """TRL's; and a step of the value function with each of the policy's."""
        loss: Tensor = super().training_step(*given, **named)
        if self._warms_up:  # a gradient of 0 would still decay weights, and count as a step of Adam's
            self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.sync_gradients:
            self._step_value()
        return loss

    def _step_value(self) -> None:
        weights = [one for one in self._trained.values() if one.grad is not None]
        for one in weights if self.accelerator.num_processes > 1 else ():
            one.grad = self.accelerator.reduce(one.grad, reduction="mean")
        limit = self.args.max_grad_norm
        norm = float(nn.utils.clip_grad_norm_(weights, limit if limit and limit > 0 else math.inf))  # as TRL's reads it
        if not math.isfinite(norm):
            raise EngineError(
                f"a gradient of the value function is not a finite number at step {self.state.global_step + 1}; "
                "lower trl.value_learning_rate or trl.critic_learning_rate, set dtype: float32, or give rewards of about 1 (by "
                "a weight)"
            )
        self._metrics["train"]["value/grad_norm"].append(norm)
        share = self._get_learning_rate() / self.args.learning_rate if self.args.learning_rate else 1.0
        for group in self._value_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        self._value_optimizer.step()
        self._value_optimizer.zero_grad(set_to_none=True)

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The policy alone."""
        configs = self._policy.peft_config if isinstance(self.value, AdapterCritic) else {}
        hidden = configs.pop(CRITIC, None)
        if hidden is not None:  # PEFT leaves out the weights of those adapters alone that it has a configuration of
            whole = self._policy.state_dict() if state_dict is None else state_dict
            state_dict = {name: one for name, one in whole.items() if not is_critics(name)}
        try:
            super()._save(output_dir, state_dict)
        finally:
            if hidden is not None:
                configs[CRITIC] = hidden

    def _save_beside(self, folder: Path) -> None:
        """The value function, its optimizer, the KL coefficient, and whether values have their level."""
        if self.args.should_save:
            save_value(folder, self._trained, self._value_optimizer, Counters(self.kl.coefficient, self._is_level))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Raises `EngineError` where what `_save_beside` wrote is not there."""
        if checkpoint is not None:
            check_whole(Path(checkpoint))
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.kl.coefficient, self._is_level = load_value(Path(checkpoint), self._trained, self._value_optimizer)


def _loss_mask(batch: dict[str, Any]) -> Tensor:
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask

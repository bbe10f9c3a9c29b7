"""The arguments of PPO: those of TRL's GRPO, some with other defaults, and those of the value function and the KL."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from trl import GRPOConfig


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


_OF_GROUPS: dict[str, tuple[tuple[Any, ...], str]] = {
    "scale_rewards": (("none",), "PPO scales no rewards; advantages are scaled by whiten_advantages"),
    "multi_objective_aggregation": (("sum_then_normalize",), "PPO adds up rewards by their weights, and normalises none"),
    "importance_sampling_level": (("token",), "the advantages of PPO are those of tokens"),
    "off_policy_mask_threshold": ((None,), "it masks completions by their one advantage, and those of PPO are of tokens"),
    "use_bias_correction_kl": ((True,), "the KL of PPO is in the reward, not in the loss"),
    "loss_type": (
        ("dapo", "bnpo", "grpo", "dr_grpo"),
        "these have the clipped surrogate of PPO",
    ),
}
"""Keys of GRPO that PPO would ignore or bend: what they may be, and why."""

_LEAST = {
    "beta": 0,
    "value_learning_rate": 0,
    "critic_learning_rate": 0,
    "value_warmup_steps": 0,
    "cliprange_value": 0,
    "kl_horizon": 1,
}


@dataclass
class PPOConfig(GRPOConfig):
    """`beta` is the KL coefficient, `num_iterations` the epochs over a rollout, `epsilon` the clip range of the ratio,
    `steps_per_generation / gradient_accumulation_steps` the minibatches of an epoch.

    Raises `ValueError` for values that cannot work together.
    """

    num_generations: int | None = _field(1, "Completions of each prompt; 1 is classic PPO.")
    num_iterations: int = _field(4, "Epochs over each rollout.")
    learning_rate: float = _field(3e-6, "Of the policy; cai train takes ten times this under lora.")
    beta: float = _field(0.05, "Coefficient of the KL in the reward; with target_kl where it begins.")
    scale_rewards: str = _field("none", "Advantages are scaled, by whiten_advantages.")
    disable_dropout: bool = _field(True, "Ratios of probabilities need it off.")
    gamma: float = _field(1.0, "Discount of rewards.")
    lam: float = _field(0.95, "Lambda of generalised advantage estimation.")
    value_function: str = _field(
        "critic",
        "critic: a network of its own (under LoRA adapters on the policy's base); head: layers on the policy's states.",
    )
    value_learning_rate: float = _field(2e-3, "Of the new weights of the layer that gives values.")
    critic_learning_rate: float | None = _field(
        None, "Of a critic's backbone or adapters and of a reward model's output; null: that of the policy."
    )
    center_values: bool = _field(True, "The first scores set the level that values begin at; exact with gamma 1.")
    value_warmup_steps: int = _field(0, "Steps at the beginning that train the value function alone.")
    cliprange_value: float | None = _field(0.2, "How far a value may move from the rollout's; null: any way.")
    kl_estimator: str = _field("k1", "k1 (unbiased) or k3 (never negative) for the KL in the reward.")
    target_kl: float | None = _field(None, "Nats a completion that the coefficient is steered to; null: it is fixed.")
    kl_horizon: int = _field(10_000, "Completions over which the coefficient is steered.")
    whiten_advantages: bool = _field(True, "Advantages of a rollout get mean 0 and variance 1.")
    missing_eos_penalty: float | None = _field(None, "Taken from the reward of a completion without an end.")

    def __post_init__(self) -> None:
        groups = self.num_generations or 1
        # GRPO insists on at least 2, and that they divide a rollout; PPO needs no groups
        steps = self.steps_per_generation or self.gradient_accumulation_steps
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        rollout = self.generation_batch_size or self.per_device_train_batch_size * steps * processes
        if rollout < 2:
            raise ValueError(
                "per_device_train_batch_size: a rollout of one completion is too few to learn from; raise it, or "
                "gradient_accumulation_steps"
            )
        self.num_generations = groups if groups > 1 else rollout
        if groups == 1 and self.num_generations_eval is None:
            self.num_generations_eval: int | None = 1
        super().__post_init__()
        self.num_generations = groups
        self._check()

    def _check(self) -> None:
        for name, allowed in (("value_function", ("critic", "head")), ("kl_estimator", ("k1", "k3"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, found {getattr(self, name)!r}")
        for name, (allowed, why) in _OF_GROUPS.items():
            if getattr(self, name) not in allowed:
                known = " or ".join("null" if one is None else str(one).lower() for one in allowed)
                raise ValueError(f"{name}: expected {known}, found {getattr(self, name)!r}: {why}")
        if self.critic_learning_rate is not None and self.value_function == "head":
            raise ValueError("critic_learning_rate: with value_function: head there is no critic; remove one of them")
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}: expected a number from {least} on, found {value}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, found {getattr(self, name)}")
        if self.target_kl is not None and not (self.target_kl > 0 and self.beta > 0):
            raise ValueError("target_kl: needs to be above 0, and so does beta, where the coefficient begins")
        if self.target_kl is not None and self.kl_horizon < (self.generation_batch_size or 0):
            raise ValueError(
                f"kl_horizon: expected at least the {self.generation_batch_size} completions of a rollout, "
                f"found {self.kl_horizon}"
            )
        if self.missing_eos_penalty is not None and self.mask_truncated_completions:
            raise ValueError(
                "missing_eos_penalty: with mask_truncated_completions nothing is learned from a completion without an end, so "
                "none can be fined; remove one of them"
            )
        if self.sync_ref_model:
            raise ValueError("sync_ref_model: the KL of PPO is to a fixed reference; remove it")
        if self.fp16:
            raise ValueError("fp16: not with PPO, whose value function has no loss scaling; use bf16 or float32")

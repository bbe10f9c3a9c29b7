"""PPO on the tiny model in tests: trainers of each form of the value function, and completions that are known beforehand."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what trl imports
    from cai.training.ppo import PPOConfig, PPOTrainer

FORMS = ("critic", "adapters", "head")
LENGTH = 10
"""Tokens of the longest completion."""
LOW = 150
"""Tokens below this are what `low` pays."""
FAST: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_completion_length": LENGTH,
    "per_device_train_batch_size": 8,
    "num_iterations": 1,
    "max_steps": 1,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "beta": 0.2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def low(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
    """A reward: the share of low tokens."""
    return [sum(token < LOW for token in ids) / LENGTH for ids in completion_ids]


def low_or_none(completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float | None]:
    """The same, but nothing is said of completions of an even length."""
    return [one if len(ids) % 2 else None for one, ids in zip(low(completion_ids), completion_ids, strict=True)]


class Script:
    """A rollout of TRL's: the completion of a prompt is drawn by the prompt's text alone, and with `tools` some of its tokens
    are what a tool said."""

    def __init__(self, tools: bool = False) -> None:
        self.tools = tools

    def __call__(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        drawn = [self.complete(prompt, trainer.processing_class.eos_token_id) for prompt in prompts]
        answer = {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [ids for ids, _ in drawn],
            "logprobs": [[0.0] * len(ids) for ids, _ in drawn],
        }
        return answer | ({"env_mask": [mask for _, mask in drawn]} if self.tools else {})

    def complete(self, prompt: str, end: int) -> tuple[list[int], list[int]]:
        """Tokens, and which of them the policy chose."""
        draw = random.Random(prompt)
        ids = [draw.randrange(5, 250) for _ in range(draw.randint(3, LENGTH))]
        if len(ids) < LENGTH - 2:
            ids[-1] = end
        mask = [int(draw.random() < 0.6) for _ in ids] if self.tools else [1] * len(ids)
        return ids, mask


def prompts(count: int = 16, words: int = 4) -> Dataset:
    """Prompts of unlike lengths."""
    return Dataset.from_dict({"prompt": [f"{place}: " + "which of these " * (1 + place % words) for place in range(count)]})


def make(
    tiny: Path, out: Path, form: str = "critic", reward: Any = low, data: Dataset | None = None, **arguments: Any
) -> PPOTrainer:
    """A trainer; `arguments` are its configuration's, but for `rollout_func`, `value_model`, `base_version`, `value_weight`,
    `eval_dataset`, `callbacks` and `dtype`, which are the trainer's and the model's."""
    names = ("rollout_func", "value_model", "base_version", "value_weight", "eval_dataset", "callbacks")
    own = {name: arguments.pop(name) for name in names if name in arguments}
    dtype = arguments.pop("dtype", torch.float32)
    torch.manual_seed(0)
    trainer = PPOTrainer(
        AutoModelForCausalLM.from_pretrained(tiny, dtype=dtype),
        reward,
        PPOConfig(str(out), **({"value_function": "head" if form == "head" else "critic"} | FAST | arguments)),
        data or prompts(),
        processing_class=AutoTokenizer.from_pretrained(tiny, padding_side="left"),
        peft_config=lora() if form == "adapters" else None,
        **own,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def policy_weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """What is trained of the policy, as it is."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def value_weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """What is trained of the value function, as it is."""
    return {name: one.detach().clone() for name, one in trainer._trained.items()}


def disturb(trainer: PPOTrainer, size: float = 0.05) -> None:
    """Move the policy and the value function from where they begin."""
    torch.manual_seed(1)
    model = trainer.accelerator.unwrap_model(trainer.model)
    policy = [one for one in model.parameters() if one.requires_grad]
    with torch.no_grad():
        for one in [*policy, *trainer._trained.values()]:
            one.add_(size * torch.randn_like(one))


def rollout(trainer: PPOTrainer) -> dict[str, Any]:
    """The first rollout."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def logged(trainer: PPOTrainer, key: str) -> list[float]:
    """What was logged under that key."""
    return [line[key] for line in trainer.state.log_history if line.get(key) is not None]


def train_some(tiny: Path, out: Path, batch: int) -> None:
    """Four steps of each form with a global batch of 8, `batch` of them in one process; what was trained is saved, and again
    after going on from the third, inside of a rollout."""
    for form in FORMS:
        trainers = [
            make(
                tiny, out / form, form, low_or_none, rollout_func=Script(tools=True), per_device_train_batch_size=batch,
                max_steps=4, num_iterations=2, target_kl=0.5, kl_horizon=50, adam_epsilon=1.0, max_grad_norm=0.05,
                learning_rate=0.5, value_learning_rate=0.5, save_strategy="steps", save_steps=3,
            )
            for _ in range(2)
        ]  # fmt: skip
        first, again = trainers
        first.train()
        again.train(resume_from_checkpoint=str(out / form / "checkpoint-3"))
        told = of_training(first) | {f"again.{name}": one for name, one in of_training(again).items()}
        if first.accelerator.is_main_process:
            save_file(told, out / f"{form}.safetensors")
        first.accelerator.wait_for_everyone()


def of_training(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """What was trained, and what is logged of how: weights do not tell the size of what was clipped."""
    told = {"kl_coefficient": torch.tensor(trainer.kl.coefficient)}
    told |= {name: torch.tensor(logged(trainer, name)) for name in ("value/explained_variance", "value/grad_norm", "grad_norm")}
    policy = {f"policy.{name}": one for name, one in policy_weights(trainer).items()}
    return told | policy | {f"value.{name}": one for name, one in value_weights(trainer).items()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    train_some(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    torch.distributed.destroy_process_group()

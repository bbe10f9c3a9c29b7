"""The trainers of the online stages: PPO, which is ours, and TRL's RLOO, GRPO and online DPO, with the same rewards."""

from __future__ import annotations

from typing import Any

from cai.models import locate
from cai.training.loading import adapters, find_model, load_policy
from cai.training.online.safeguards import Safeguards
from cai.training.online.settings import OnlineDpoSettings, OnlineSettings, PpoSettings, RlooSettings
from cai.training.stage import Parts


def build(parts: Parts) -> Any:
    """The stage's trainer, guarded: see `cai.training.online.safeguards`."""
    settings = parts.settings
    assert isinstance(settings, OnlineSettings)
    parts.tokenizer.padding_side = parts.tokenizer.truncation_side = "left"
    guards = Safeguards(parts)
    more = {"reward_funcs": guards.rewards, "train_dataset": guards.held_out.train, "peft_config": adapters(settings)}
    given = {**parts.shared, "model": load_policy(settings), **more}
    if isinstance(settings, PpoSettings):
        trainer = _ppo(settings, given)
        if trainer.critic_note:
            parts.show.note(trainer.critic_note)
    else:
        trainer = _of_trl(settings, given)
    return guards.guard(trainer)


def _of_trl(settings: OnlineSettings, given: dict[str, Any]) -> Any:
    if isinstance(settings, OnlineDpoSettings):
        from trl.experimental.online_dpo import OnlineDPOTrainer

        return OnlineDPOTrainer(**given)
    if isinstance(settings, RlooSettings):
        from trl import RLOOTrainer as Trainer
    else:
        from trl import GRPOTrainer as Trainer
    return Trainer(**given)


def _ppo(settings: PpoSettings, given: dict[str, Any]) -> Any:
    from cai.training.ppo import PPOTrainer

    start = settings.critic or next((one.model for one in settings.reward if one.model), None)
    place = locate(start, rewards=True).source if start else None
    return PPOTrainer(**given, value_model=place, base_version=find_model(settings).version)

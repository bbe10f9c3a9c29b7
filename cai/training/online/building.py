"""The trainers of the online stages: PPO, which is ours, and TRL's RLOO, GRPO and online DPO, with the same rewards."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cai.errors import ConfigError
from cai.models import locate
from cai.training.loading import adapters, find_model, load_policy, reference_arguments
from cai.training.online.colocated import reload_where_packed
from cai.training.online.kept import KeepsRollout
from cai.training.online.left_out import LeavesOut
from cai.training.online.order import Order
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
    policy = load_policy(settings)
    if not policy._can_compile_fullgraph:  # by transformers' word: attention by columns writes otherwise with a static cache
        parts.arguments.cache_implementation = None
    given = {**parts.shared, "model": policy, **more}
    if not isinstance(settings, OnlineDpoSettings):  # which copies the policy; the others load their reference anew
        parts.arguments.model_init_kwargs = reference_arguments(settings)
    for name in ("grpo_trainer", "rloo_trainer"):
        logging.getLogger(f"trl.trainer.{name}").addFilter(_is_not_told_otherwise)
    with _without_warnings():
        trainer = _ppo(settings, given) if isinstance(settings, PpoSettings) else _of_trl(settings, given)
    if note := getattr(trainer, "critic_note", None):
        parts.show.note(note)
    reload_where_packed(trainer)
    Order(trainer)
    return guards.guard(trainer)


def _is_not_told_otherwise(record: logging.LogRecord) -> bool:
    """TRL logs whole rows of which no reward has a number; they are counted, and told in one line."""
    return "All reward functions returned None" not in str(record.msg)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """TRL warns, while a trainer is built, that the policy ignores `model_init_kwargs`, which are for the reference; PPO of
    what is told as a note."""
    loggers = [logging.getLogger(name) for name in ("trl.trainer", "cai.training.ppo")]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


def _of_trl(settings: OnlineSettings, given: dict[str, Any]) -> Any:
    if isinstance(settings, OnlineDpoSettings):
        from cai.training.online.dpo import OnlineDpo

        return OnlineDpo(**given)
    if isinstance(settings, RlooSettings):
        from trl import RLOOTrainer as Trainer
    else:
        from trl import GRPOTrainer as Trainer
    return type(Trainer.__name__, (KeepsRollout, LeavesOut, Trainer), {})(**given)


def _ppo(settings: PpoSettings, given: dict[str, Any]) -> Any:
    from cai.training.ppo import PPOTrainer

    name = _critic_start(settings, given["processing_class"], given["args"].value_function == "head")
    more: dict[str, Any] = {"base_version": find_model(settings).version}
    if name is not None:
        weights = [one.weight for one in settings.reward if one.model == name]
        more |= {"value_model": locate(name, rewards=True).source, "value_weight": next(iter(weights), 1.0)}
    return PPOTrainer(**given, **more)


def _critic_start(settings: PpoSettings, tokenizer: Any, is_head: bool) -> str | None:
    """The reward model that the critic begins with: one that reads the policy's tokens.

    Raises `ConfigError` where the one that is named does not, or where the value function is no critic.
    """
    from cai.training.ppo.starting import reads

    if settings.critic is None:
        named = [one.model for one in settings.reward if one.model]
        fit = (one for one in named if reads(one, tokenizer))
        return None if is_head else next(fit, next(iter(named), None))  # of one that does not, the trainer tells why
    if is_head:
        raise ConfigError("critic: with trl.value_function: head there is none; remove one of them")
    if not reads(settings.critic, tokenizer):
        raise ConfigError(
            f"critic: '{settings.critic}' has another tokenizer than the policy, whose tokens it would read; leave critic out"
        )
    return settings.critic

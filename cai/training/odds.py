"""ORPO and CPO (with SimPO), which need no reference model; experimental in TRL, whose version is pinned for them."""

from __future__ import annotations

from typing import Any

from cai.training.loading import adapters, load_policy
from cai.training.settings import OrpoSettings
from cai.training.stage import Parts


def build(parts: Parts) -> Any:
    """TRL's trainer."""
    if isinstance(parts.settings, OrpoSettings):
        from trl.experimental.orpo import ORPOTrainer as Trainer
    else:
        from trl.experimental.cpo import CPOTrainer as Trainer
    return Trainer(model=load_policy(parts.settings), peft_config=adapters(parts.settings), **parts.shared)

"""KTO on single completions that are labelled good or bad."""

from __future__ import annotations

from typing import Any

from trl import KTOTrainer

from cai.training.loading import adapters, load_policy
from cai.training.stage import Parts


def build(parts: Parts) -> Any:
    """TRL's trainer."""
    return KTOTrainer(model=load_policy(parts.settings), peft_config=adapters(parts.settings), **parts.shared)

"""KTO on single completions that are labelled good or bad."""

from __future__ import annotations

from typing import Any

from trl import KTOTrainer

from cai.training.loading import adapters, load_policy, load_reference
from cai.training.stage import Parts


def build(parts: Parts) -> Any:
    """TRL's trainer; where its reference is, `cai.training.dpo` says."""
    settings = parts.settings
    return KTOTrainer(
        model=load_policy(settings),
        ref_model=load_reference(settings, parts.arguments),
        peft_config=adapters(settings),
        **parts.shared,
    )

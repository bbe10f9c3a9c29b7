"""Supervised fine-tuning on completions, as in the supervised phase of Bai et al. 2022 (arXiv 2212.08073, section 3)."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from cai.training.loading import adapters, load_policy
from cai.training.stage import Parts


def build(parts: Parts) -> Any:
    """TRL's trainer; the loss is on the completion's tokens alone unless `trl.completion_only_loss` is false."""
    return SFTTrainer(model=load_policy(parts.settings), peft_config=adapters(parts.settings), **parts.shared)

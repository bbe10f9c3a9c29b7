"""What every stage's trainer is built from, and which file builds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from cai.training.base_settings import TrainSettings
from cai.training.data import StageData
from cai.training.preparing import LeftOut
from cai.training.settings import StageName
from cai.training.watching import Show, Silent


@dataclass(frozen=True)
class Parts:
    """Settings, rows, tokenizer, TRL's arguments: what trainers of all stages take."""

    settings: TrainSettings
    data: StageData
    tokenizer: Any
    arguments: Any
    callbacks: tuple[Any, ...] = ()
    folder: Path = Path()
    """What the stage trains into."""
    show: Show = field(default_factory=Silent)
    """Who is told what happens."""

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that all of TRL's trainers have in common."""
        return {
            "args": self.arguments,
            "train_dataset": self.data.train,
            "eval_dataset": self.data.test if self.arguments.eval_strategy != "no" else None,
            "processing_class": self.tokenizer,
            "callbacks": list(self.callbacks),
        }


class Outcome(NamedTuple):
    """What came of a stage: what its manifest tells of it."""

    steps: int
    measures: dict[str, float]
    left_out: LeftOut
    training: dict[str, Any]
    """What it was trained by: see `cai.training.arguments.effective`."""
    guarded: Mapping[str, Any] = MappingProxyType({})
    """Of an online stage, what its safeguards tell: `stopped`, `best`, `gold`, `rollout`, and of `data` what gold held out."""


def build_trainer(stage: StageName, parts: Parts) -> Any:
    """The stage's trainer, its model loaded."""
    match stage:
        case "sft":
            from cai.training import sft

            return sft.build(parts)
        case "reward":
            from cai.training import reward

            return reward.build(parts)
        case "dpo":
            from cai.training import dpo

            return dpo.build(parts)
        case "kto":
            from cai.training import kto

            return kto.build(parts)
        case "orpo" | "cpo":
            from cai.training import odds

            return odds.build(parts)
        case "ppo" | "rloo" | "grpo" | "online-dpo":
            from cai.training.online import building

            return building.build(parts)

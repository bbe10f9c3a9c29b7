"""Training on TRL: SFT, reward models, DPO and its family. Settings load nothing; `cai.training.running.train` loads TRL."""

from cai.training.requirements import REQUIREMENTS, check_installed
from cai.training.settings import (
    SETTINGS,
    STAGES,
    CpoSettings,
    DpoSettings,
    KtoSettings,
    LoraSettings,
    OrpoSettings,
    RewardSettings,
    SftSettings,
    SourceSettings,
    StageName,
    TrainSettings,
)

__all__ = [
    "REQUIREMENTS",
    "SETTINGS",
    "STAGES",
    "CpoSettings",
    "DpoSettings",
    "KtoSettings",
    "LoraSettings",
    "OrpoSettings",
    "RewardSettings",
    "SftSettings",
    "SourceSettings",
    "StageName",
    "TrainSettings",
    "check_installed",
]

"""Training on TRL: SFT, reward models, DPO and its family. Settings load nothing; `cai.training.running.train` loads TRL."""

from cai.training.base_settings import LoraSettings, SourceSettings, TrainSettings
from cai.training.requirements import REQUIREMENTS, check_installed
from cai.training.settings import (
    SETTINGS,
    STAGES,
    CpoSettings,
    DpoSettings,
    KtoSettings,
    OrpoSettings,
    RewardSettings,
    SftSettings,
    StageName,
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

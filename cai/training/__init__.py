"""Training on TRL: SFT, reward models, DPO, PPO, and what is like them. Settings load nothing; `cai.training.running.train`
loads TRL."""

from cai.training.base_settings import LoraSettings, SourceSettings, TrainSettings
from cai.training.online.settings import GrpoSettings, OnlineDpoSettings, OnlineSettings, PpoSettings, RlooSettings
from cai.training.requirements import REQUIREMENTS, check_installed
from cai.training.settings import (
    ONLINE,
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
    "ONLINE",
    "REQUIREMENTS",
    "SETTINGS",
    "STAGES",
    "CpoSettings",
    "DpoSettings",
    "GrpoSettings",
    "KtoSettings",
    "LoraSettings",
    "OnlineDpoSettings",
    "OnlineSettings",
    "OrpoSettings",
    "PpoSettings",
    "RewardSettings",
    "RlooSettings",
    "SftSettings",
    "SourceSettings",
    "StageName",
    "TrainSettings",
    "check_installed",
]

"""TRL's own config of a stage, from what stands under `trl:`; every key of it is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cai.config import ModelConfig
from cai.errors import ConfigError, nearest
from cai.training.settings import StageName, TrainSettings
from cai.weights import best_device, resolve_dtype

_OURS = {
    "output_dir": "the folder of -o",
    "seed": "seed",
    "data_seed": "seed",
    "model_init_kwargs": "dtype, revision and quantization",
    "remove_unused_columns": "nothing: the stage chooses its columns",
    "resume_from_checkpoint": "the same command again",
    "overwrite_output_dir": "--fresh",
}
"""Keys of TRL that follow from something else, and from what."""


def config_class(stage: StageName) -> Any:
    """TRL's config class of a stage. Raises `ConfigError` where TRL is missing."""
    try:
        match stage:
            case "sft":
                from trl import SFTConfig as Config
            case "reward":
                from trl import RewardConfig as Config
            case "dpo":
                from trl import DPOConfig as Config
            case "kto":
                from trl import KTOConfig as Config
            case "orpo":
                from trl.experimental.orpo import ORPOConfig as Config
            case "cpo":
                from trl.experimental.cpo import CPOConfig as Config
    except ImportError as exc:
        raise ConfigError(f"training needs TRL: pip install 'cai-toolkit[train]' ({exc})") from exc
    return Config


def check_arguments(stage: StageName, given: Mapping[str, Any], where: str = "trl") -> None:
    """Raises `ConfigError` for a key that TRL's config class does not have, and for one that follows from something else."""
    config = config_class(stage)
    known = {field.name for field in dataclasses.fields(config) if field.init} - _OURS.keys()
    for key in given:
        if key in _OURS:
            raise ConfigError(f"{where}.{key}: follows from {_OURS[key]}; remove it")
        if key not in known:
            raise ConfigError(f"{where}.{key}: {config.__name__} has no such key{nearest(key, known)}")


def make_arguments(stage: StageName, settings: TrainSettings, folder: Path, evaluates: bool) -> Any:
    """TRL's config: its defaults, ours where this machine or the adapters ask for others, and on top what was given.

    Raises `ConfigError` with TRL's own words where it refuses a value.
    """
    check_arguments(stage, settings.trl)
    config = config_class(stage)
    fields = {field.name: field for field in dataclasses.fields(config)}
    device = best_device()
    ours: dict[str, Any] = {
        "bf16": computes_in_bf16(settings),
        "gradient_checkpointing": device == "cuda",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "eval_strategy": "epoch" if evaluates else "no",
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": False,
    }
    if settings.lora and (default := fields["learning_rate"].default) is not dataclasses.MISSING:
        ours["learning_rate"] = 10 * default
    whole = {**ours, **settings.trl, "output_dir": str(folder), "seed": settings.seed, "data_seed": settings.seed}
    try:
        return config(**whole)
    except (ValueError, TypeError, ImportError, NotImplementedError) as exc:
        raise ConfigError(f"trl: {config.__name__} refuses these values: {exc}") from exc


def computes_in_bf16(settings: TrainSettings) -> bool:
    """Whether products of matrices are computed in bfloat16 (autocast)."""
    if settings.dtype == "float32" or settings.trl.get("fp16"):
        return False
    return bool(resolve_dtype(ModelConfig(dtype=settings.dtype)) == torch.bfloat16)


def weights_dtype(settings: TrainSettings) -> torch.dtype:
    """In what the weights are held."""
    if settings.dtype == "auto" and settings.lora is None:
        return torch.float32
    return resolve_dtype(ModelConfig(dtype=settings.dtype))

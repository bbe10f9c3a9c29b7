"""TRL's own config of a stage, from what stands under `trl:`; every key of it is checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from cai.config import ModelConfig
from cai.errors import ConfigError, nearest
from cai.training.base_settings import TrainSettings
from cai.training.losses import SOFTENED
from cai.training.online.settings import OnlineSettings
from cai.training.settings import DpoSettings, StageName
from cai.weights import best_device, resolve_dtype

_OURS = {
    "output_dir": "the folder of -o",
    "seed": "seed",
    "data_seed": "seed",
    "model_init_kwargs": "dtype, revision and quantization",
    "remove_unused_columns": "nothing: the stage chooses its columns",
    "resume_from_checkpoint": "the same command again",
    "overwrite_output_dir": "--fresh",
    "reward_weights": "reward: each has its weight",
    "reward_model_path": "reward",
}
"""Keys of TRL that follow from something else, and from what."""


def config_class(stage: StageName) -> Any:
    """TRL's config class of a stage."""
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
        case "ppo":
            from cai.training.ppo.config import PPOConfig as Config
        case "rloo":
            from trl import RLOOConfig as Config
        case "grpo":
            from trl import GRPOConfig as Config
        case "online-dpo":
            from trl.experimental.online_dpo import OnlineDPOConfig as Config
    return Config


_ALIKE = {"max_completion_length": "max_new_tokens", "max_new_tokens": "max_completion_length"}
"""What TRL calls by one name in one trainer and by another in the next."""


def _below_trl(key: str) -> str:
    return f"trl.{key}"


def check_arguments(stage: StageName, given: Mapping[str, Any], where: Callable[[str], str] = _below_trl) -> None:
    """Raises `ConfigError` for a key that TRL's config class does not have, one that follows from something else, and a value
    of another type than the class has there. `where`: how errors call a key."""
    config = config_class(stage)
    known = {field.name for field in dataclasses.fields(config) if field.init} - _OURS.keys()
    for key in given:
        if key in _OURS:
            raise ConfigError(f"{where(key)}: follows from {_OURS[key]}; remove it")
        if key not in known:
            other = _ALIKE.get(key)
            hint = f" (did you mean '{other}'?)" if other in known else nearest(key, known)
            raise ConfigError(f"{where(key)}: {config.__name__} has no such key{hint}")
    types = typing.get_type_hints(config)
    for key, value in _without_truth(given).items():
        _check_value(where(key), value, types[key])
        _check_range(where(key), key, value)
    for key in _FORMS.intersection(given.get("generation_kwargs") or {}):
        raise ConfigError(f"{where('generation_kwargs')}: {key} changes what the trainer gets back, which it has no use for")
    for key, why in _LOST_ON_RESUME.items():
        if given.get(key):
            raise ConfigError(f"{where(key)}: {why}")
    _check_losses(stage, given.get("loss_type"), where("loss_type"))


_LOST_ON_RESUME = {
    "save_only_model": "from weights alone no training goes on as it was; remove it (save_total_limit: 1 keeps one checkpoint)",
    "sync_ref_model": "checkpoints do not hold a reference that moves, so that a training that goes on would be another one; "
    "remove it (stages of a pipeline with rounds can each begin from the one before)",
}
"""Keys under which a checkpoint lacks what a training needs to go on."""
_FORMS = {"num_return_sequences", "n", "best_of", "return_dict_in_generate", "streamer", "stream"}
"""Keys of generation by transformers or vLLM under which more, or something else, is written than a completion for each prompt;
`num_generations` says how many there are."""


def _check_losses(stage: StageName, named: Any, where: str) -> None:
    """Raises `ConfigError` for a loss that the stage's trainer does not know, which TRL itself finds out at the first step."""
    known = LOSSES.get(stage, ())
    for one in [named] if isinstance(named, str) else named or ():
        if known and one not in known:
            raise ConfigError(f"{where}: no loss {one!r}{nearest(one, known)}; expected {', '.join(known)}")


LOSSES: dict[str, tuple[str, ...]] = {
    "dpo": (
        "sigmoid",
        "hinge",
        "ipo",
        "exo_pair",
        "nca_pair",
        "robust",
        "bco_pair",
        "sppo_hard",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "apo_down",
        "discopop",
        "sft",
        "sigmoid_norm",
    ),
    "kto": ("kto", "apo_zero_unpaired"),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
}
"""What `loss_type` may be, of trainers that look at it only when they compute a loss."""
_LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "beta": 0,
    "gradient_accumulation_steps": 1,
    "generation_batch_size": 1,
    "dataloader_num_workers": 0,
    "missing_eos_penalty": 0,
    "top_entropy_quantile": 0,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "num_iterations": 1,
    "num_generations": 1,
    "steps_per_generation": 1,
    "max_completion_length": 1,
    "max_new_tokens": 1,
    "top_k": -1,
    "min_p": 0,
    "epsilon": 0,
    "epsilon_high": 0,
}
_ABOVE = {"temperature": 0, "repetition_penalty": 0, "top_p": 0, "num_train_epochs": 0, "save_steps": 0, "logging_steps": 0}
_MOST = {"top_p": 1, "min_p": 1, "top_entropy_quantile": 1}
_MAY_BE_INFINITE = ("epsilon_high",)
"""Ranges of numbers that TRL looks at only when the data has been read and the model loaded, or learns wrongly with."""


def _check_range(where: str, key: str, value: Any) -> None:
    """Raises `ConfigError` for a number, or one of a list of numbers, that is none of the key's."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, bool) or not isinstance(one, int | float):
            continue
        if math.isnan(one) or (math.isinf(one) and key in _LEAST | _ABOVE and key not in _MAY_BE_INFINITE):
            raise ConfigError(f"{where}: expected a finite number, found {one!r}")
        if key == "max_steps" and one < 1 and one != -1:
            raise ConfigError(f"{where}: expected 1 or more, or -1 for whole epochs, found {one!r}")
        if key in _LEAST and one < _LEAST[key]:
            raise ConfigError(f"{where}: expected a number from {_LEAST[key]} on, found {one!r}")
        if key in _ABOVE and one <= _ABOVE[key]:
            raise ConfigError(f"{where}: expected a number above {_ABOVE[key]}, found {one!r}")
        if key in _MOST and one > _MOST[key]:
            raise ConfigError(f"{where}: expected a number up to {_MOST[key]}, found {one!r}")


def _check_value(where: str, value: Any, kind: Any) -> None:
    """Raises `ConfigError` for a value of another type."""
    found = f"found {value!r:.60}"
    allowed = {list[str]: str | list[str], list[float]: float | list[float]}.get(kind, kind)  # TRL takes the only one as it is
    try:
        TypeAdapter(allowed).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError) as exc:
        named = dict.fromkeys(_NAMES.get(one, str(one)) for one in typing.get_args(kind) or (kind,))
        raise ConfigError(f"{where}: expected {' or '.join(named)}, {found}") from exc


_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null", dict: "a mapping"}


def make_arguments(
    stage: StageName, settings: TrainSettings, folder: Path, evaluates: bool = False, context: int | None = None
) -> Any:
    """TRL's config: its defaults, ours where this machine or the adapters ask for others, and on top what was given.

    `context` is the model's, in tokens. Raises `ConfigError` with TRL's own words where it refuses a value.
    """
    check_arguments(stage, settings.trl)
    _check_reports(settings.trl.get("report_to"))
    if settings.trl.get("use_liger_kernel") and find_spec("liger_kernel") is None:
        raise ConfigError("trl.use_liger_kernel: liger_kernel is not installed: pip install liger-kernel")
    if settings.trl.get("use_vllm"):
        _check_vllm(stage, settings.trl.get("vllm_mode", "colocate"))
    config = config_class(stage)
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    ours = _ours(settings, defaults, evaluates) | _lengths(settings, defaults, context)
    if "precompute_ref_log_probs" in defaults and settings.lora is None:
        ours["precompute_ref_log_probs"] = True
    given: dict[str, Any] = {"output_dir": str(folder), "seed": settings.seed, "data_seed": settings.seed}
    if stage in _KEEPS_COLUMNS:
        given["remove_unused_columns"] = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, about names that TRL still has
            made = config(**{**ours, **_without_truth(settings.trl), **given})
    except (ValueError, TypeError, ImportError, NotImplementedError) as exc:
        raise ConfigError(f"trl: {config.__name__} refuses these values: {exc}{_keys_to_change(exc, settings.trl)}") from exc
    if isinstance(settings, DpoSettings) and settings.soft_labels:
        _check_softened(made)
    return made


def _keys_to_change(refused: Exception, given: Mapping[str, Any]) -> str:
    """Of a rollout that TRL cannot divide into groups."""
    if "must be divisible by num_generations" not in str(refused):
        return ""
    size = "generation_batch_size" if given.get("generation_batch_size") else "per_device_train_batch_size"
    return f" Make trl.{size} a multiple of trl.num_generations"


def _check_vllm(stage: StageName, mode: Any) -> None:
    """Raises `ConfigError` where vLLM cannot write here."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "trl.use_vllm: vllm is not installed: pip install 'cai-toolkit[vllm]' where there is a GPU; for a CPU see Engines "
            "in the README"
        )
    if stage == "online-dpo" and mode == "colocate" and best_device() == "cpu":
        raise ConfigError("trl.use_vllm: online-dpo cannot have vLLM in its process on a CPU; leave it out, or use a GPU")


_KEEPS_COLUMNS = ("orpo", "cpo")
"""Stages whose trainers set `remove_unused_columns` to false themselves, and print a warning when they do."""


def _check_softened(arguments: Any) -> None:
    """Raises `ConfigError` for a loss that soft labels are not defined for."""
    unable = [kind for kind in arguments.loss_type if kind not in SOFTENED]
    if unable:
        raise ConfigError(
            f"trl.loss_type: soft labels are defined for {', '.join(SOFTENED)}, not for {', '.join(map(str, unable))}; "
            "set soft_labels: false"
        )
    for key, usual in (("f_divergence_type", "reverse_kl"), ("ld_alpha", None), ("use_weighting", False)):
        if getattr(arguments, key) != usual:
            raise ConfigError(f"trl.{key}: with soft labels only {usual}; set soft_labels: false")


def effective(arguments: Any) -> dict[str, Any]:
    """What was trained by, whoever chose it: learning rate and schedule, rows a step and of what they are made, how long.

    `warmup_steps` below 1 are a share of all; `epochs` is null where `max_steps` ends the training, and the other way round.
    """
    processes, accumulation = arguments.world_size, arguments.gradient_accumulation_steps
    limited = arguments.max_steps > 0
    return {
        "learning_rate": arguments.learning_rate,
        "schedule": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
        "warmup_steps": arguments.warmup_steps,
        "rows_per_step": arguments.train_batch_size * accumulation * processes,
        "rows_per_device": arguments.per_device_train_batch_size,
        "accumulation": accumulation,
        "processes": processes,
        "epochs": None if limited else arguments.num_train_epochs,
        "max_steps": arguments.max_steps if limited else None,
    }


def _without_truth(given: Mapping[str, Any]) -> dict[str, Any]:
    """What YAML reads as false is `no` where a strategy is meant."""
    return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in given.items()}


def _ours(settings: TrainSettings, defaults: Mapping[str, Any], evaluates: bool) -> dict[str, Any]:
    """A reference model is in memory in no stage by default: see `cai.training.dpo`. A checkpoint is written each tenth."""
    device = best_device()
    ours: dict[str, Any] = {
        "bf16": computes_in_bf16(settings),
        "gradient_checkpointing": device == "cuda",
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "eval_strategy": "epoch" if evaluates else "no",
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 0.02,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if settings.lora and isinstance(rate := defaults["learning_rate"], float):
        ours["learning_rate"] = 10 * rate
    if isinstance(settings, OnlineSettings):
        ours |= {"eval_strategy": "no", "logging_steps": 1, "reward_weights": [one.weight for one in settings.reward]}
        if device == "cpu" and computes_in_bf16(settings) == (weights_dtype(settings) == torch.bfloat16):
            ours["cache_implementation"] = "static"  # a growing one is copied at each token; this one has the weights' dtype
    return ours


def room_for_prompts(settings: TrainSettings, arguments: Any, context: int | None) -> int | None:
    """The most tokens of a row: those of the context, or of `trl.max_length`; of a prompt, less those of a completion.

    `context` is the shortest of those who read a row; vLLM and `trl.max_length` may be shorter. Raises `ConfigError` where a
    completion takes all of it, or has no end.
    """
    if not isinstance(settings, OnlineSettings):
        longest: int | None = getattr(arguments, "max_length", None)
        return longest or context
    name = "max_completion_length" if hasattr(arguments, "max_completion_length") else "max_new_tokens"
    completion = getattr(arguments, name)
    if completion is None:
        raise ConfigError(f"trl.{name}: expected a whole number, found None")
    of_vllm = getattr(arguments, "vllm_max_model_length", None) if arguments.use_vllm else None
    limits = (context, of_vllm, getattr(arguments, "max_length", None))  # the last is online-dpo's, which cuts prompts there
    context = min((one for one in limits if one is not None and one > 0), default=None)  # -1: what vLLM finds
    if context is not None and completion >= context:
        raise ConfigError(
            f"trl: completions of {completion} tokens leave no room for prompts in a context of {context} (the shortest of the "
            f"model, its reward models, trl.max_length and trl.vllm_max_model_length); lower trl.{name}"
        )
    return None if context is None else context - completion


def _lengths(settings: TrainSettings, defaults: Mapping[str, Any], context: int | None) -> dict[str, int]:
    """TRL's default of `max_length`, where that is beyond the context. Raises `ConfigError` for one that was given."""
    usual, given = defaults.get("max_length"), settings.trl.get("max_length")
    if context is None:
        return {}
    if isinstance(given, int) and given > context:
        raise ConfigError(f"trl.max_length: {given} is more than the {context} tokens of the model's context; lower it")
    return {"max_length": context} if isinstance(usual, int) and usual > context else {}


def keeps_own_pace(settings: TrainSettings) -> bool:
    """Whether it was said when checkpoints are written."""
    return not {"save_strategy", "save_steps"}.isdisjoint(settings.trl)


def _check_reports(names: Any) -> None:
    """Raises `ConfigError` for a tracker that is not installed."""
    for name in [names] if isinstance(names, str) else names or ():
        if name in _TRACKERS and find_spec(name) is None:
            raise ConfigError(f"trl.report_to: {name} is not installed: pip install {name}")


_TRACKERS = ("trackio", "wandb", "tensorboard")


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

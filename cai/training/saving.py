"""A trained model as others read it: safetensors, tokenizer and chat template, adapters merged where that is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cai.models import locate
from cai.training.base_settings import TrainSettings
from cai.weights import loading, pretrained

_PICKLED = "training_args.bin"
"""Of transformers; only its own trainer reads it, and reading it runs code."""


def save_model(trainer: Any, settings: TrainSettings, path: Path) -> None:
    """Write the trainer's model and tokenizer into a folder that `from_pretrained` reads. All processes call this.

    Raises `OSError`, or what safetensors makes of it.
    """
    target = path / "run" / "adapters" if _merges(settings) else path
    _unwrapped(trainer).config.use_cache = True  # off while it was trained
    trainer.save_model(str(target))  # gathers what is spread over processes
    if not PartialState().is_main_process:
        return
    if _merges(settings):
        _save_merged(trainer, settings, target, path)
        shutil.rmtree(target)
    _save_rest(trainer, path)


def keep_weights(trainer: Any, path: Path) -> None:
    """Write what is trained (all weights, or the adapters) into the folder `path`, whole or not at all, while training goes on.
    All processes call this."""
    part = path.with_name(f"{path.name}.part")
    config = _unwrapped(trainer).config
    caches, config.use_cache = config.use_cache, True
    trainer.save_model(str(part), _internal_call=True)
    config.use_cache = caches
    if PartialState().is_main_process:
        shutil.rmtree(path, ignore_errors=True)
        part.replace(path)


def save_kept(trainer: Any, settings: TrainSettings, kept: Path, path: Path) -> None:
    """Make of what `keep_weights` wrote a folder as `save_model` writes one, whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    if _merges(settings):
        _save_merged(trainer, settings, kept, part)
    else:
        shutil.copytree(kept, part)
    _save_rest(trainer, part)
    shutil.rmtree(path, ignore_errors=True)
    part.replace(path)


def _merges(settings: TrainSettings) -> bool:
    return settings.lora is not None and settings.lora.merge


def _save_rest(trainer: Any, path: Path) -> None:
    trainer.processing_class.save_pretrained(path)
    (path / _PICKLED).unlink(missing_ok=True)


def _save_merged(trainer: Any, settings: TrainSettings, adapters: Path, path: Path) -> None:
    """The adapters are added to the weights as they were loaded, unquantized and in float32, so that nothing is rounded away;
    what is saved has the dtype of the training."""
    from peft import PeftModel

    trained = _unwrapped(trainer)
    source, revision = pretrained(locate(settings.model, settings.revision))
    with loading(f"model '{settings.model}'"):
        base = type(trained).from_pretrained(source, revision=revision, config=_plain(trained.config), dtype=torch.float32)
        merged = PeftModel.from_pretrained(base, str(adapters)).merge_and_unload()
    merged.to(trained.dtype).save_pretrained(path)


def _unwrapped(trainer: Any) -> Any:
    """The model under the adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plain(config: Any) -> Any:
    """The configuration without its quantization."""
    plain = type(config).from_dict(config.to_dict())
    for name in ("quantization_config", "_pre_quantization_dtype"):
        vars(plain).pop(name, None)
    return plain

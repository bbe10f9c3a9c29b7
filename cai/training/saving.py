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
    merges = settings.lora is not None and settings.lora.merge
    target = path / "run" / "adapters" if merges else path
    _unwrapped(trainer).config.use_cache = True  # off while it was trained
    trainer.save_model(str(target))  # gathers what is spread over processes
    if not PartialState().is_main_process:
        return
    if merges:
        _save_merged(trainer, settings, target, path)
        shutil.rmtree(target)
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

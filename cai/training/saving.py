"""A trained model as others read it: safetensors, tokenizer and chat template, adapters merged where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cai.errors import StoreError
from cai.training.settings import TrainSettings


def save_model(trainer: Any, settings: TrainSettings, path: Path) -> None:
    """Write the trainer's model and tokenizer into a folder that `from_pretrained` reads. Raises `StoreError`."""
    try:
        if settings.lora and settings.lora.merge:
            _save_merged(trainer, settings, path)
        else:
            trainer.save_model(str(path))
        trainer.processing_class.save_pretrained(path)
    except OSError as exc:
        raise StoreError(
            f"{path}: the model cannot be saved: {exc.strerror or exc}; mend that, then the same command continues"
        ) from exc


def _save_merged(trainer: Any, settings: TrainSettings, path: Path) -> None:
    """The adapters are added in float32, so that nothing of them is rounded away, and all is saved as it was loaded."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    dtype = next(model.parameters()).dtype
    merged = model.to(torch.float32).merge_and_unload()
    merged.to(dtype).save_pretrained(path)

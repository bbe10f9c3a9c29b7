"""One training stage from its settings to a saved model: continued where it was stopped, skipped where it is finished."""

from __future__ import annotations

import hashlib
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from cai.documents import dump
from cai.errors import EngineError, Interrupted, StoreError
from cai.training.arguments import make_arguments
from cai.training.card import render_card
from cai.training.data import StageData, load_data
from cai.training.folder import Mode, TrainFolder
from cai.training.lengths import drop_long_rows
from cai.training.loading import find_model, load_tokenizer
from cai.training.saving import save_model
from cai.training.settings import StageName, TrainSettings
from cai.training.stage import Parts, build_trainer
from cai.training.watching import Watch, check_losses
from cai.weights import loading, pretrained

_QUIET = {"report_to", "run_name", "save_total_limit", "disable_tqdm", "logging_steps", "logging_strategy"}
"""Keys of TRL that change nothing in the model."""
_VERSIONS = ("cai-toolkit", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def train(stage: StageName, settings: TrainSettings, out: Path, mode: Mode = "continue") -> dict[str, Any]:
    """Train one stage into the folder `out` and return its manifest; a training that was begun there goes on.

    Raises `ConfigError` before weights are loaded where the settings cannot work, `EngineError` where the loss is no number
    or memory runs out, `StoreError` for the disk, `Interrupted` after a Ctrl-C; the last good checkpoint is kept.
    """
    place = find_model(settings)
    make_arguments(stage, settings, out, evaluates=False)
    data = load_data(stage, settings)
    with TrainFolder(out, identity(stage, settings, place.version, data), mode) as folder:
        return folder.finished or _train(stage, settings, data, folder)


def identity(stage: StageName, settings: TrainSettings, version: str, data: StageData) -> dict[str, Any]:
    """What decides the trained model: the settings, the weights it begins with, the rows."""
    return {
        "stage": stage,
        **settings.model_dump(mode="json", exclude={"data", "trl"}),
        "model": f"{Path(settings.model).name}@{version}",
        "rows": rows_hash(data),
        "trl": {key: value for key, value in settings.trl.items() if key not in _QUIET},
    }


def rows_hash(data: StageData) -> str:
    """16 hex digits over all rows, in their order."""
    digest = hashlib.sha256()
    for rows in (data.train, data.test):
        for row in rows or ():
            digest.update(json.dumps(row, sort_keys=True).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _train(stage: StageName, settings: TrainSettings, data: StageData, folder: TrainFolder) -> dict[str, Any]:
    began = time.time()
    tokenizer = load_tokenizer(settings)
    arguments = make_arguments(stage, settings, folder.checkpoints, evaluates=data.test is not None)
    data, too_long = drop_long_rows(data, tokenizer, _model_config(settings), getattr(arguments, "max_length", None))
    watch = Watch(folder.path / "run" / "log.jsonl")
    trainer = build_trainer(stage, Parts(settings, data, tokenizer, arguments, (watch,)))
    fit(trainer, watch, folder.last_checkpoint())
    measures = measure(trainer, data)
    if not trainer.is_world_process_zero():
        return {}
    save_model(trainer, settings, folder.path)
    manifest = {
        "status": "done",
        "stage": stage,
        "model": settings.model,
        "data": list(data.sources),
        "too_long": too_long,
        "steps": trainer.state.global_step,
        "measures": measures,
        "seconds": round(time.time() - began, 1),
        "versions": {name: metadata.version(name) for name in _VERSIONS if _installed(name)},
    }
    folder.write("recipe.yaml", dump({stage: settings.model_dump(mode="json")}))
    folder.write("README.md", render_card(stage, settings, manifest, folder.path.name))
    folder.write("manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return manifest


def _model_config(settings: TrainSettings) -> Any:
    source, revision = pretrained(find_model(settings))
    with loading(f"the configuration of '{settings.model}'"):
        return AutoConfig.from_pretrained(source, revision=revision)


def fit(trainer: Any, watch: Watch, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint where there is one. Raises as `train` does."""
    check_losses(trainer)
    try:
        with watch.on_signals():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (torch.OutOfMemoryError, MemoryError) as exc:
        size = trainer.args.per_device_train_batch_size
        raise EngineError(
            f"out of memory: lower trl.per_device_train_batch_size (now {size}; trl.gradient_accumulation_steps keeps what a "
            "step sees) or trl.max_length, set trl.gradient_checkpointing, or lora; the same command continues"
        ) from exc
    except OSError as exc:
        raise StoreError(
            f"{trainer.args.output_dir}: {exc.strerror or exc}; mend that, then the same command continues"
        ) from exc
    except KeyboardInterrupt:
        raise Interrupted("stopped at once; the same command continues from the last checkpoint") from None
    if watch.stopping and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command continues"
        )


def measure(trainer: Any, data: StageData) -> dict[str, float]:
    """TRL's measures on the held-out rows at the end, and the last loss."""
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    told = {"train_loss": losses[-1]} if losses else {}
    if data.test is None or trainer.args.eval_strategy == "no":
        return told
    found = trainer.evaluate()
    unwanted = ("runtime", "per_second", "num_tokens", "epoch")
    return told | {key: value for key, value in found.items() if not any(word in key for word in unwanted)}


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True

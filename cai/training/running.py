"""One training stage from its settings to a saved model: continued where it was stopped, skipped where it is finished."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from cai.documents import dump
from cai.errors import Interrupted
from cai.models import locate
from cai.training.adapters import quicken
from cai.training.arguments import effective, keeps_own_pace, make_arguments, room_for_prompts
from cai.training.base_settings import QUIET, TrainSettings
from cai.training.card import render_card
from cai.training.checkpoints import find_last
from cai.training.data import StageData, load_data, neutral_row
from cai.training.failing import failures, refusals, server_of
from cai.training.folder import QUARANTINE, Mode, TrainFolder
from cai.training.loading import check_reference, check_rewards_of, context_of, context_with_rewards, find_model, load_tokenizer
from cai.training.online.held_out import tell_sources
from cai.training.online.settings import OnlineSettings, PpoSettings, Source
from cai.training.online.versions import version_of
from cai.training.preparing import prepare_rows, read_rows
from cai.training.saving import save_model
from cai.training.settings import DpoSettings, RewardSettings, StageName
from cai.training.stage import Outcome, Parts, build_trainer
from cai.training.watching import ENDED, SAVING, AllSteps, Show, Silent, Watch, check_losses

_VERSIONS = ("cai-toolkit", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
_UNWANTED = ("runtime", "per_second", "num_tokens", "epoch", "step")
"""Parts of the names of measures that say nothing of the model."""
_QUIET = {"TQDM_DISABLE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
"""Bars of TRL's own loops, since whoever shows the training notes what is done; what it calls experimental, the help says."""
_TOGETHER = 1000
"""Rows that are hashed together, column by column: one by one takes many times as long."""
_ONLINE = ("reward", "objective/scores")
"""What is told of the last completions that were trained on, by TRL's names."""


def train(
    stage: StageName,
    settings: TrainSettings,
    out: Path,
    mode: Mode = "continue",
    show: Show | None = None,
    stop_file: Path | None = None,
) -> dict[str, Any]:
    """Train one stage into the folder `out` and return its manifest; a training that was begun there goes on.

    Where several processes do this together (`accelerate launch`), the first one writes, and only it tells `show`. They stop,
    saved, where `stop_file` appears. Raises `ConfigError` before weights are loaded where the settings cannot work,
    `EngineError` where the loss is no number or memory runs out, `StoreError` for the disk, `Interrupted` after a Ctrl-C;
    the last good checkpoint is kept.
    """
    show = show or Silent()
    with _quietly():
        place = find_model(settings)
        make_arguments(stage, settings, out)
        check_reference(settings)
        check_rewards_of(settings)
        show.note("reading the data")
        data = load_data(stage, settings)
        processes = PartialState()
        told = identity(stage, settings, place.version, data, processes.num_processes)
        with _opened(out, told, mode, processes) as folder:
            spare = 0.0 if keeps_own_pace(settings) else 60.0
            watch = Watch(folder.log, show, spare, stop_file, folder.note_seconds)
            finished = folder.finished
            if finished and not _goes_on(settings, finished):
                if processes.is_main_process:
                    _tidy(folder)
                return finished
            if processes.is_main_process:
                _quarantine(data, folder)
            processes.wait_for_everyone()
            folder.reopen()
            manifest = _train(stage, settings, data, folder, watch, show)
            if watch.stopping and stop_file is None:
                raise Interrupted(ENDED.format(out))
            return manifest


@contextmanager
def _quietly() -> Iterator[None]:
    """Without bars of libraries, which would garble what is shown, and what they announce of their next versions."""
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        datasets.enable_progress_bars()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _goes_on(settings: TrainSettings, finished: dict[str, Any]) -> bool:
    """Whether a training that was stopped was so by what does not stop it any more: see `OnlineSettings.stops`."""
    stopped = finished.get("stopped")
    return isinstance(settings, OnlineSettings) and stopped is not None and stopped.get("stops") != settings.stops


def _quarantine(data: StageData, folder: TrainFolder) -> None:
    if data.unusable:
        folder.write(QUARANTINE, "".join(json.dumps(one._asdict()) + "\n" for one in data.unusable))
    else:
        (folder.path / QUARANTINE).unlink(missing_ok=True)


@contextmanager
def _opened(out: Path, identity: dict[str, Any], mode: Mode, processes: PartialState) -> Iterator[TrainFolder]:
    """The folder, opened by the first process before the others look into it."""
    with TrainFolder(out, identity, mode, leads=processes.is_main_process) as folder:
        processes.wait_for_everyone()
        yield folder


def identity(stage: StageName, settings: TrainSettings, version: str, data: StageData, processes: int = 1) -> dict[str, Any]:
    """What decides the trained model: the settings, the weights it begins with, the rows, and how many processes share a
    global batch of so many times `trl.per_device_train_batch_size`.

    All of `gold` but its `stop` belongs to it: it says which model is the best. Where a training stops does not: with other
    limits it goes on from there.
    """
    bases = settings.bases if isinstance(settings, RewardSettings) else ()
    reference = settings.reference if isinstance(settings, DpoSettings) else None
    return {
        "stage": stage,
        **settings.model_dump(mode="json", exclude={"data", "trl", "bases", "limits"}),
        **({"bases": [f"{Path(one).name}@{locate(one).version}" for one in bases]} if bases else {}),
        "model": f"{Path(settings.model).name}@{version}",
        **({"reference": f"{Path(reference).name}@{locate(reference).version}"} if reference else {}),
        **(_rewarded_by(settings) if isinstance(settings, OnlineSettings) else {}),
        "rows": rows_hash(data),
        "processes": processes,
        "trl": {key: value for key, value in settings.trl.items() if key not in QUIET},
    }


def _rewarded_by(settings: OnlineSettings) -> dict[str, Any]:
    """Rewards, gold measure and critic with the versions of what they are made of."""
    critic = settings.critic if isinstance(settings, PpoSettings) else None
    gold = settings.gold
    measured = gold and {**version_of(gold), **gold.model_dump(mode="json", exclude={*Source.model_fields, "stop"})}
    return {
        "reward": [{**version_of(one), "weight": one.weight} for one in settings.reward],
        "gold": measured,
        **({"critic": f"{Path(critic).name}@{locate(critic, rewards=True).version}"} if critic else {}),
    }


def rows_hash(data: StageData) -> str:
    """16 hex digits over all rows, in their order."""
    digest = hashlib.sha256()
    for rows in (data.train, data.test):
        for several in rows.iter(_TOGETHER) if rows else ():
            digest.update(json.dumps(several, sort_keys=True).encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()[:16]


def _train(
    stage: StageName, settings: TrainSettings, data: StageData, folder: TrainFolder, watch: Watch, show: Show
) -> dict[str, Any]:
    processes = PartialState()
    try:
        if isinstance(settings, RewardSettings):
            from cai.training.members import train_members

            outcome = train_members(settings, data, folder, watch, show)
        else:
            outcome = _train_one(stage, settings, data, folder, watch, show)
    finally:
        folder.note_seconds()
    manifest = {
        "status": "done",
        "stage": stage,
        "model": settings.model,
        "data": list(data.sources),
        **outcome.left_out._asdict(),
        "training": outcome.training,
        "steps": outcome.steps,
        "measures": outcome.measures,
        **outcome.guarded,
        **({"changes": folder.changes} if folder.changes else {}),
        "seconds": folder.seconds,
        "versions": {name: version for name in _VERSIONS if (version := _version(name))},
    }
    if processes.is_main_process:
        try:
            with watch.on_signals(SAVING):
                _finish(stage, settings, folder, manifest)
        except KeyboardInterrupt:
            raise Interrupted("stopped at once, while the card was written; the same command continues") from None
    processes.wait_for_everyone()
    return manifest


def _train_one(
    stage: StageName, settings: TrainSettings, data: StageData, folder: TrainFolder, watch: Watch, show: Show
) -> Outcome:
    """Train and save the one model of a stage."""
    processes = PartialState()
    context = context_of(settings)
    arguments = make_arguments(stage, settings, folder.checkpoints, data.test is not None, context)
    with failures(folder, arguments, settings.lora is not None):
        tokenizer = load_tokenizer(settings)
        show.note("preparing the rows")
        if processes.is_main_process:
            shortest = context_with_rewards(settings, context)
            prepare_rows(data, tokenizer, room_for_prompts(settings, arguments, shortest), folder.rows)
        processes.wait_for_everyone()
        given = data
        data, left_out = read_rows(data, folder.rows)
        if data.test is None:
            arguments.eval_strategy = "no"
        show.note(_loading(settings, arguments))
        with refusals(stage):
            trainer = build_trainer(stage, Parts(settings, data, tokenizer, arguments, (watch,), folder.path, show))
        try:
            fit(trainer, watch, folder.checkpoints, show)
        except BaseException:  # a Ctrl-C too
            if isinstance(settings, OnlineSettings):
                trainer.safeguards.draw()
            raise
        show.note("saving the model" if arguments.eval_strategy == "no" else "measuring on held-out rows")
        with watch.on_signals(SAVING):
            measures = measure(trainer, data)
            save_model(trainer, settings, folder.path)
            guarded = trainer.safeguards.finish() if isinstance(settings, OnlineSettings) else {}
        measures |= guarded.pop("measures", {})
        if isinstance(settings, OnlineSettings) and len(trainer.safeguards.held_out.train) < len(data.train):
            guarded["data"] = list(tell_sources(given, trainer.safeguards.held_out, neutral_row(tokenizer)))
    return Outcome(trainer.state.global_step, measures, left_out, effective(arguments), guarded)


def _finish(stage: StageName, settings: TrainSettings, folder: TrainFolder, manifest: dict[str, Any]) -> None:
    folder.write("recipe.yaml", dump({stage: settings.model_dump(mode="json")}))
    folder.write("README.md", render_card(stage, settings, manifest, folder.path.name))
    if (folder.path / "best").is_dir():
        folder.write("best/README.md", render_card(stage, settings, manifest, f"{folder.path.name}, best", is_best=True))
    folder.write("manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    _tidy(folder)


def _tidy(folder: TrainFolder) -> None:
    """Delete what only the training needed."""
    shutil.rmtree(folder.rows, ignore_errors=True)
    shutil.rmtree(folder.path / "run" / "best", ignore_errors=True)
    (folder.checkpoints / "README.md").unlink(missing_ok=True)  # TRL's own
    with suppress(OSError):  # there are checkpoints where it took long enough
        folder.checkpoints.rmdir()


def _loading(settings: TrainSettings, arguments: Any) -> str:
    more = " and computing what it says of each row, as the reference" if _precomputes(arguments) else ""
    if getattr(arguments, "use_vllm", False) and arguments.vllm_mode == "server":
        longest = f"{arguments.vllm_server_timeout:g} s, trl.vllm_server_timeout"
        more += f" and waiting for the vLLM server at {server_of(arguments)} (at most {longest})"
    return f"loading {Path(settings.model).name}{more}"


def _precomputes(arguments: Any) -> bool:
    return bool(getattr(arguments, "precompute_ref_log_probs", False))


def fit(trainer: Any, watch: Watch, checkpoints: Path, show: Show) -> None:
    """Train to the end, from the last whole one of the checkpoints where there are any. Raises as `train` does."""
    check_losses(trainer)
    if trainer.accelerator.device.type == "cpu":
        quicken(trainer.model)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.remove_callback(watch)
    trainer.add_callback(watch)  # as the last one
    found = find_last(checkpoints) if PartialState().is_main_process else (None, [])
    checkpoint, left_out = broadcast_object_list([*found])  # one process decides for all
    for text in left_out:
        show.note(text)
    show.note(f"training goes on from {checkpoint.name}" if checkpoint else "training")
    with watch.on_signals(), suppress(AllSteps):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if watch.stopping and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command continues"
        )


def measure(trainer: Any, data: StageData) -> dict[str, float]:
    """TRL's measures on the held-out rows at the end; the last loss, or of an online stage, whose loss says nothing, the last
    reward."""
    history = trainer.state.log_history
    losses = [line["loss"] for line in history if "loss" in line]
    told = {name: line[name] for line in history for name in _ONLINE if name in line}
    if losses and not told:
        told["loss"] = losses[-1]
    if data.test is None or trainer.args.eval_strategy == "no":
        return told
    ended = (line for line in history if line["step"] == trainer.state.global_step and "eval_loss" in line)
    measured = next(ended, None) or trainer.evaluate()
    return told | {key: value for key, value in measured.items() if not any(word in key for word in _UNWANTED)}


def _version(name: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None

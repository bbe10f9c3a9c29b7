"""Runs a pipeline: stages in order, finished ones skipped, what is made of changed inputs made anew.

OUT/1-data, OUT/2-sft, ...   what each stage made      OUT/manifest.json   stages, their states, inputs, seconds, measures
OUT/recipe.yaml              the pipeline

A stage finds its folder by its name and round: one that is put before others, or left out, changes no other's folder.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cai.config import Recipe
from cai.errors import CaiError, ConfigError, Interrupted, StoreError
from cai.pipeline.forecasting import ASKED, Choice, Entry, Verdict, entries_of, forecast, is_done, read_manifest, verdict_on
from cai.pipeline.inputs import inputs_of, output_of, settings_told
from cai.pipeline.recipe import Pipeline
from cai.pipeline.running import Watch, generate
from cai.pipeline.steps import Step
from cai.store import Mode, would_lose, write_whole
from cai.training import StageName, TrainSettings
from cai.training.folder import kept_in

Train = Callable[[StageName, TrainSettings, Path, Any], dict[str, Any]]
"""Trains a stage into a folder, tells a `cai.training.watching.Show` how far it is, and returns the manifest."""
_MEASURES = (
    "accuracy",
    "accuracy_low",
    "accuracy_high",
    "eval_accuracy",
    "eval_rewards/accuracies",
    "eval_mean_token_accuracy",
    "reward",
    "objective/scores",
    "kl",
    "eval_loss",
    "loss",
)
"""Of a trained model, what says most first."""


class Watcher:
    """Is told what happens; a command shows it. This one shows nothing, and agrees to no loss."""

    def agree(self, lost: list[Step]) -> None:
        """Raises where what these steps made may not be deleted: trained models, or calls that were paid for."""
        folders = ", ".join(str(step.folder) for step in lost)
        raise ConfigError(f"this would delete what was made in {folders}; add --yes if that is meant, or use another -o")

    def begin(self, step: Step, verdict: Verdict) -> None:
        """A step is skipped or begins."""

    def end(self, step: Step, entry: Entry) -> None:
        """A step has been made."""

    def watch(self, step: Step, settings: Recipe) -> Watch | None:
        """What shows the progress of generating."""
        return None

    def show(self, step: Step) -> AbstractContextManager[Any]:
        """What shows the progress of training."""
        from cai.training.watching import Silent

        return nullcontext(Silent())


def train_apart(stage: StageName, settings: TrainSettings, out: Path, show: Any, how: str | None = None) -> dict[str, Any]:
    """In a process of its own, so that its memory is free again for the next stage; or in those of `--launch how`."""
    from cai.training.launching import launch

    return launch(stage, settings, out, "continue", how, show)


class PipelineFolder:
    """The folder of a pipeline, locked while it is open, and what its manifest says. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        """Raises `ConfigError` where it holds something else, `StoreError` where another process runs a pipeline in it."""
        self.path = path
        self.manifest = read_manifest(path)
        there = sorted(one for one in (os.listdir(path) if path.is_dir() else ()) if not one.startswith("."))
        if path.exists() and (not path.is_dir() or ("pipeline" not in self.manifest and there)):
            raise ConfigError(f"{path} holds {', '.join(there[:5]) or 'a file'}, but no pipeline of cai run; use another -o")
        self.entries = entries_of(self.manifest)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=0)
        except Timeout as exc:
            raise StoreError(f"{path}: another process runs a pipeline here; wait for it or use another -o") from exc
        except OSError as exc:
            raise StoreError(f"{path}: cannot be written: {exc.strerror or exc}; mend that or use another -o") from exc

    def __enter__(self) -> PipelineFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def note(self, pipeline: Pipeline, steps: list[Step], status: str) -> dict[str, Any]:
        """Write the manifest."""
        stages = [self.entries[step.folder.name] for step in steps if step.folder.name in self.entries]
        former = [entry for entry in self.entries.values() if entry not in stages]
        self.manifest = {"pipeline": pipeline.name, "status": status, "stages": stages}
        if former:
            self.manifest["former_stages"] = former
        write_whole(self.path / "manifest.json", json.dumps(self.manifest, indent=2, ensure_ascii=False) + "\n")
        return self.manifest


def run_pipeline(
    pipeline: Pipeline,
    out: Path,
    choice: Choice | None = None,
    watcher: Watcher | None = None,
    train: Train = train_apart,
) -> dict[str, Any]:
    """Run the stages into the folder `out` and return its manifest; what is finished and has the same inputs is skipped.

    Raises `ConfigError` before anything is made, where a stage cannot work or a trained model would be deleted to which
    `watcher` does not agree; `Interrupted` after a Ctrl-C; what a stage raises, with its name. The same call continues.
    """
    choice, watcher = choice or Choice(), watcher or Watcher()
    seen = forecast(pipeline, out, choice)
    if lost := [step for step, verdict in seen.verdicts.items() if _would_lose(step, verdict)]:
        watcher.agree(lost)
    with PipelineFolder(out) as folder:
        if choice.fresh:
            for step in seen.verdicts:
                folder.entries.get(step.folder.name, {})["state"] = "anew"
        write_whole(out / "recipe.yaml", pipeline.to_yaml())
        run = _Run(pipeline, seen.steps, folder, watcher, train)
        try:
            for step in seen.verdicts:
                run.reach(step)
        except KeyboardInterrupt:
            raise Interrupted("stopped; the same command continues") from None
        ended = all(folder.entries.get(step.folder.name, {}).get("state") == "done" for step in seen.steps)
        return folder.note(pipeline, seen.steps, "done" if ended else "partial")


class _Run:
    """One pass over the steps."""

    def __init__(self, pipeline: Pipeline, steps: list[Step], folder: PipelineFolder, watcher: Watcher, train: Train) -> None:
        self._pipeline, self._steps, self._folder, self._watcher, self._train = pipeline, steps, folder, watcher, train

    def reach(self, step: Step) -> None:
        """Make the step, or skip it."""
        entry = self._folder.entries.get(step.folder.name)
        verdict = verdict_on(step, entry)
        self._watcher.begin(step, verdict)
        if verdict.does == "skip":
            return
        entry = {
            "folder": step.folder.name,
            "name": step.name,
            "round": step.round,
            "kind": step.kind,
            "state": "running",
            "seconds": entry.get("seconds", 0.0) if entry and verdict.does == "continue" else 0.0,
            "inputs": inputs_of(step),
            "settings": settings_told(step),
        }
        if verdict.does == "remake" and step.kind != "generate":
            self._note(step, {**entry}, "anew")  # a kill while it is cleared leaves no folder that seems finished
            _clear(step.folder)
        self._note(step, entry, "running")
        self._make(step, entry, "fresh" if verdict.why == ASKED else "update" if verdict.does != "run" else "continue")
        self._watcher.end(step, entry)

    def _make(self, step: Step, entry: Entry, mode: Mode) -> None:
        began, before = time.monotonic(), entry["seconds"]
        try:
            manifest = self._work(step, mode)
        except (CaiError, KeyboardInterrupt) as exc:
            stopped = isinstance(exc, Interrupted | KeyboardInterrupt)
            entry["seconds"] = round(before + time.monotonic() - began, 1)
            with suppress(StoreError):  # where the disk is full, the failure says so already
                self._note(step, {**entry, "error": str(exc)}, "stopped" if stopped else "failed")
            if isinstance(exc, KeyboardInterrupt):
                raise
            raise type(exc)(f"stage '{step.label}' ({step.folder}): {exc}") from exc
        entry["seconds"] = round(before + time.monotonic() - began, 1)
        entry.update(output=output_of(step), measures=measures_of(step, manifest))
        self._note(step, entry, "done")

    def _work(self, step: Step, mode: Mode) -> dict[str, Any]:
        settings = step.settings
        if isinstance(settings, Recipe):
            made = generate(settings, step.folder, mode, self._watcher.watch(step, settings))
            _free_memory()
            return made
        with self._watcher.show(step) as show:
            return self._train(step.training, settings, step.folder, show)

    def _note(self, step: Step, entry: Entry, state: str) -> None:
        entry["state"] = state
        self._folder.entries[step.folder.name] = entry
        self._folder.note(self._pipeline, self._steps, {"done": "running"}.get(state, state))


def _would_lose(step: Step, verdict: Verdict) -> bool:
    """Whether a trained model, or the beginning of one, would be deleted, or calls that were paid for."""
    if step.kind == "generate":
        return verdict.why == ASKED and would_lose(step.folder) is not None
    return verdict.does in ("remake", "maybe") and (is_done(step) or kept_in(step.folder) is not None)


def _clear(folder: Path) -> None:
    """Remove what another training left. Raises `StoreError` where one is under way."""
    if not folder.exists():
        return
    try:
        if (folder / "run").is_dir():
            FileLock(folder / "run" / "lock").acquire(timeout=0).lock.release()
        shutil.rmtree(folder)
    except Timeout as exc:
        raise StoreError(f"{folder}: another process trains here; wait for it") from exc
    except OSError as exc:
        raise StoreError(
            f"{folder}: cannot be removed: {exc.strerror or exc}; mend that, then the same command continues"
        ) from exc


def _free_memory() -> None:
    """Give back what an engine that was used in this process held of a GPU, which the next stage needs."""
    if torch := sys.modules.get("torch"):
        gc.collect()
        torch.cuda.empty_cache()


def measures_of(step: Step, manifest: dict[str, Any]) -> dict[str, Any]:
    """The measures that say most about what a step made."""
    if step.kind != "generate":
        found = manifest["measures"]
        return {name: found[name] for name in _MEASURES if isinstance(found.get(name), int | float)}
    dataset = manifest["dataset"]
    rows = {name: sum(splits.values()) for name, splits in dataset["rows"].items() if name in ("sft", "preference")}
    means = {name: dataset["means"].get(name) for name in ("candidate_length", "candidates_truncated")}
    return {"prompts": dataset["records"], **rows, **{name: value for name, value in means.items() if value is not None}}

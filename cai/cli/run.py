"""What `cai run` shows: each stage as it is reached, the dry run, the table at the end."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from rich.table import Table

from cai import pipeline
from cai.cli import progress
from cai.cli.terminal import console, counted, duration, errors, printable
from cai.cli.training import progress as training_progress
from cai.config import Recipe
from cai.errors import CaiError, PromptSourceError
from cai.generation.estimate import estimate
from cai.intervals import gathered
from cai.models import best_model
from cai.pipeline import Choice, Pipeline, Watch, Watcher
from cai.pipeline.forecasting import Entry, Forecast, Verdict, read_manifest
from cai.pipeline.stages import train_apart
from cai.pipeline.steps import Step
from cai.prompts import read_prompts
from cai.training import ONLINE, TrainSettings, check_installed

_DOES = {
    "skip": "finished",
    "run": "would run",
    "continue": "would go on",
    "remake": "would be made anew",
    "maybe": "would be made anew",
}
_BEGINS = {"run": "begins", "continue": "goes on", "remake": "is made anew"}
_ROWS: dict[str, str] = {"sft": "sft", "kto": "unpaired", **dict.fromkeys(ONLINE, "trace")}
"""What a stage trains on, where that is not `preference`."""


def run(loaded: Pipeline, out: Path, choice: Choice, yes: bool, launch: str | None, words: Sequence[str]) -> None:
    """Run a pipeline and show what comes of it; `words` is the command that goes on with it, for errors."""
    check_launch(loaded, launch)
    shown = _Shown(yes)
    try:
        manifest = pipeline.run_pipeline(loaded, out, choice, shown, partial(train_apart, how=launch))
    except CaiError as exc:
        if not shown.begun:  # what refused would do so again
            raise
        raise type(exc)(f"{exc}\nthis command continues: {shlex.join(words)}") from exc
    _show_table(manifest, out)


def check_launch(loaded: Pipeline, launch: str | None) -> None:
    """Raises `ConfigError` where `--launch` names nothing, or what a stage cannot train in."""
    if launch is not None:
        check_installed()
        from cai.training import launching

        launching.find_config(launch)
        for stage in loaded.stages.values():
            if isinstance(stage.section, TrainSettings):
                launching.check_launch(stage.kind, stage.section, launch)


class _Shown(Watcher):
    """Shows what happens, and asks."""

    def __init__(self, yes: bool) -> None:
        self._yes, self.begun = yes, False

    def agree(self, lost: list[Step]) -> None:
        """Asks at a terminal."""
        if self._yes:
            return
        if not sys.stdin.isatty():
            super().agree(lost)
        names = ", ".join(str(step.folder) for step in lost)
        typer.confirm(f"Delete what was made in {names}, and make it anew?", abort=True)

    def begin(self, step: Step, verdict: Verdict) -> None:
        """One line."""
        self.begun = True
        if verdict.does == "skip":
            said = "finished, skipped"
        else:
            said = _BEGINS[verdict.does] + (f" ({verdict.why})" if verdict.does == "remake" else "")
        console.print(f"[bold]{escape(step.label)}[/] ({step.kind}): {escape(printable(said))}", soft_wrap=True)

    def end(self, step: Step, entry: Entry) -> None:
        """One line."""
        told = escape(printable(_result(entry)))
        console.print(
            f"[bold]{escape(step.label)}[/] ({step.kind}): done in {duration(entry['seconds'])}; {told}", soft_wrap=True
        )

    def watch(self, step: Step, settings: Recipe) -> Watch:
        """The progress of generating."""
        return progress.watch

    def show(self, step: Step) -> AbstractContextManager[Any]:
        """The progress of training."""
        return training_progress()


def _result(entry: Entry) -> str:
    """What came of a stage, in words."""
    measures = entry.get("measures", {})
    if entry["kind"] != "generate":
        return ", ".join(_measured(*one) for one in list(gathered(measures))[:2])
    parts = [counted(measures["prompts"], "prompt"), counted(measures["preference"], "pair")]
    if measures.get("sft"):
        parts.append(counted(measures["sft"], "row") + " for sft")
    if "candidate_length" in measures:
        cut = f", {measures['candidates_truncated']:.0%} cut off" if measures["candidates_truncated"] else ""
        parts.append(f"answers of {measures['candidate_length']:.0f} characters (mean{cut})")
    return ", ".join(parts)


def _measured(name: str, value: float, ends: tuple[float, float] | None) -> str:
    """A measure with its interval where it has one."""
    return f"{name.removeprefix('eval_')} {value:.3g}" + (f" ({ends[0]:.3g} to {ends[1]:.3g})" if ends else "")


def _show_table(manifest: dict[str, Any], out: Path) -> None:
    table = Table("stage", "what came of it", "time", "folder", box=None, header_style="bold", pad_edge=False)
    for entry in manifest["stages"]:
        name = f"{entry['name']} (round {entry['round']})" if entry["round"] > 1 else entry["name"]
        told = _result(entry) if entry["state"] == "done" else entry["state"]
        table.add_row(escape(name), escape(printable(told)), duration(entry["seconds"]), escape(entry["folder"]))
    console.print()
    console.print(table)
    console.print(f"\nall of it is in {escape(printable(str(out)))}", soft_wrap=True)
    policies = [entry["folder"] for entry in manifest["stages"] if entry["kind"] not in ("generate", "reward")]
    if policies and manifest["status"] == "done":
        last = best_model(out / policies[-1])
        console.print(f"use the last model:  cai generate -m {escape(printable(str(last)))}", soft_wrap=True)


# --- the dry run


def show_dry_run(loaded: Pipeline, out: Path, choice: Choice, launch: str | None) -> None:
    """The stages, what would be skipped or run, calls and rows where they are known. Makes nothing."""
    check_launch(loaded, launch)
    seen = pipeline.forecast(loaded, out, choice)
    table = Table("stage", "kind", "would be", "calls or rows", "folder", box=None, header_style="bold", pad_edge=False)
    for step in seen.steps:
        verdict = seen.verdicts.get(step)
        if verdict is None:
            said = "left as it is"
        else:
            said = _DOES[verdict.does] + (f", {verdict.why}" if verdict.why and verdict.does != "continue" else "")
        table.add_row(escape(step.label), step.kind, escape(said), _size(step, seen), escape(step.folder.name))
    console.print(table)
    console.print(f"nothing was made; a run would make it in {escape(printable(str(out)))}", soft_wrap=True)


def _size(step: Step, seen: Forecast) -> str:
    settings = seen.settings.get(step)
    if isinstance(settings, Recipe):
        return _calls(step, settings, seen)
    if isinstance(settings, TrainSettings):
        return _training_rows(step, seen)
    return ""


def _calls(step: Step, recipe: Recipe, seen: Forecast) -> str:
    from cai.constitution import load_constitution

    if any(one.kind == "generate" and one not in seen.finished for one in step.reads):
        return "prompts are not there yet"
    try:
        told = estimate(recipe, load_constitution(recipe.constitution), read_prompts(recipe.prompts))
    except PromptSourceError as exc:
        errors.print(f"[yellow]note:[/] {escape(printable(str(exc)))}", soft_wrap=True)
        return ""
    return f"{counted(told.prompts, 'prompt')}, at most {counted(sum(told.calls.values()), 'call')}"


def _training_rows(step: Step, seen: Forecast) -> str:
    sources = [step.bound.get(one.source) for one in step.section.data]
    rows = 0
    for source in sources:
        if not isinstance(source, Step) or source not in seen.finished:
            return "" if not isinstance(source, Step) else f"rows of @{source.name}, not there yet"
        made = read_manifest(source.folder).get("dataset", {}).get("rows", {})
        rows += made.get(_ROWS.get(step.kind, "preference"), {}).get("train", 0)
    return counted(rows, "row")

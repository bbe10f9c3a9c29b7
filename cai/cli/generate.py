"""What `cai generate` does beside the run itself: the dry run, questions, notes; the summary is in `summary.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from cai import pipeline
from cai.cli import progress
from cai.cli.summary import saying_what_is_kept, show_summary
from cai.cli.terminal import console, counted, errors, printable
from cai.config import Recipe
from cai.generation import Tally
from cai.generation.estimate import Estimate
from cai.judging import judge_sections
from cai.store import Mode, would_lose


def show_dry_run(recipe: Recipe, out: Path | str) -> None:
    """The resolved recipe, the number of calls, about how many tokens, what `out` holds of it already. Makes no call."""
    plan, estimate = pipeline.dry_run(recipe)
    print(recipe.to_yaml())
    _show_estimate(recipe, estimate)
    local = pipeline.local_folder(out)
    there = _identity(local)
    if there is not None and (kept := would_lose(local)):
        which = "this run already" if there == plan.identity else "another run (--update keeps what of it still fits)"
        console.print(f"{escape(printable(str(out)))} holds {which}: {kept} are paid for", soft_wrap=True)


def _judge_models(recipe: Recipe) -> str:
    sections = judge_sections(recipe.judge)
    return ", ".join(dict.fromkeys(recipe.judge_model(one).model for one in sections if one.method != "checks")) or "checks"


def _show_estimate(recipe: Recipe, estimate: Estimate) -> None:
    table = Table(box=None, title="no call was made; a run would make at most", title_justify="left", pad_edge=False)
    table.add_column("role")
    table.add_column("model", overflow="fold")
    for column in ("calls", "prompt tokens", "completion tokens"):
        table.add_column(column, justify="right")
    judged = estimate.calls["judge"]
    asked = sum(estimate.calls.values()) - judged
    for role, model, *numbers in (
        ("policy", recipe.policy.model, asked, estimate.policy_prompt_tokens, estimate.policy_completion_tokens),
        ("judge", _judge_models(recipe), judged, estimate.judge_prompt_tokens, estimate.judge_completion_tokens),
        ("together", "", asked + judged),
    ):
        table.add_row(role, escape(printable(str(model))), *(f"{number:,}" for number in numbers))
    console.print(table)
    steps = ", ".join(f"{calls:,} {step}" for step, calls in estimate.calls.items() if step != "judge")
    bad = f"; {counted(estimate.bad_rows, 'row')} without one would be set aside" if estimate.bad_rows else ""
    console.print(
        f"{counted(estimate.prompts, 'prompt')}{bad}. Calls of the policy: {steps}. Tokens are a rough guess, as if every "
        "text had full length; the judge's are those sent, shared beginnings counted each time."
    )


def _identity(out: Path) -> object:
    """Which run is in a folder; None where that cannot be read."""
    try:
        return json.loads((out / "run" / "identity.json").read_bytes())
    except (OSError, ValueError):
        return None


def run(recipe: Recipe, out: Path | str, mode: Mode) -> None:
    """Generate with progress, then show what came of it."""
    local = pipeline.local_folder(out)

    @contextmanager
    def watch(tally: Tally, total: int | None) -> Iterator[None]:
        _note_self_judging(recipe)  # not before: what cannot run at all needs no advice
        with progress.watch(tally, total):
            yield

    with saying_what_is_kept(local):
        manifest = pipeline.generate(recipe, out, mode, watch)
    show_summary(manifest, local)
    if local != out:
        console.print(f"  all of it is also at {escape(printable(str(out)))}", soft_wrap=True)


def _note_self_judging(recipe: Recipe) -> None:
    if recipe.judge.model is None and recipe.judge.method not in ("checks", "panel"):
        errors.print(
            f"[yellow]note:[/] the policy {escape(recipe.policy.model)} also judges its own completions; "
            "--judge-model names another judge",
            soft_wrap=True,
        )

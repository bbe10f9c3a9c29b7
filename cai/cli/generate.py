"""What `cai generate` shows: the plan, the progress, the summary."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cai import pipeline
from cai.cli.progress import watch
from cai.cli.terminal import printable, shortened
from cai.config import Recipe
from cai.errors import ConfigError
from cai.store import Mode, would_lose


class _Console(Console):
    """Shows texts as they are: no emoji for `:names:`; and where the reader is gone (`| head`), the run is no failure."""

    def on_broken_pipe(self) -> None:
        """Print no more, but go on."""
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


_console = _Console(highlight=False, emoji=False)
_errors = _Console(stderr=True, highlight=False, emoji=False)


def show_dry_run(recipe: Recipe) -> None:
    """The resolved recipe, the number of calls, about how many tokens. Makes no call."""
    plan, estimate = pipeline.dry_run(recipe)
    print(recipe.to_yaml())
    table = Table("step", "calls, at most", box=None, title="no call was made", title_justify="left")
    for step, calls in estimate.calls.items():
        table.add_row(step, f"{calls:,}")
    table.add_row("together", f"{sum(estimate.calls.values()):,}")
    _console.print(table)
    bad = f" ({estimate.bad_rows} rows are no prompts and would be set aside)" if estimate.bad_rows else ""
    _console.print(
        f"{estimate.prompts:,} prompts{bad}. About {estimate.policy_prompt_tokens:,} prompt tokens and at most "
        f"{estimate.policy_completion_tokens:,} completion tokens for the policy ({escape(plan.policy.fingerprint)}), "
        f"about {estimate.judge_prompt_tokens:,} prompt tokens for the judge ({escape(plan.judge.fingerprint)}), if "
        "every text had full length; beginnings that are shared are counted each time."
    )


def confirm_loss(out: Path) -> None:
    """Ask before what was paid for is deleted; without a terminal, refuse."""
    loss = would_lose(out)
    if loss is None:
        return
    if not sys.stdin.isatty():
        raise ConfigError(f"--fresh would delete {loss} in {out}; add --yes if that is meant")
    typer.confirm(f"{printable(str(out))} holds {loss}. Delete and start over?", abort=True)


def run(recipe: Recipe, out: Path, mode: Mode) -> None:
    """Generate with progress, then show what came of it."""
    if recipe.judge.model is None:
        _errors.print(
            f"[yellow]note:[/] the policy {escape(recipe.policy.model)} also judges its own completions; "
            "--judge-model names another judge",
            soft_wrap=True,
        )
    manifest = pipeline.generate(recipe, out, mode, watch)
    show_summary(manifest, out)


def show_summary(manifest: dict[str, Any], out: Path) -> None:
    """What was made, what was left out and why, what it cost, an example, and what to type next."""
    dataset, means = manifest["dataset"], manifest["dataset"]["means"]
    _console.print()
    table = Table("dataset", "train", "test", box=None, header_style="bold", pad_edge=False)
    for name, rows in dataset["rows"].items():
        table.add_row(name, f"{rows['train']:,}", f"{rows.get('test', 0):,}")
    _console.print(table)
    _show_labels(means)
    left_out = {**dataset["dropped"], **{f"rows: {why}": n for why, n in manifest["prompts"]["quarantined"].items()}}
    if manifest["prompts"]["duplicates"]:
        left_out["rows: duplicate prompt"] = manifest["prompts"]["duplicates"]
    if left_out:
        _console.print("\n[bold]left out[/]")
        for reason, count in sorted(left_out.items(), key=lambda item: -item[1]):
            _console.print(f"  {count:>6,}  {escape(reason)}")
    _show_cost(manifest)
    _show_next(manifest, out)


def _show_labels(means: dict[str, Any]) -> None:
    if means["chosen_probability"] is None:
        return
    _console.print("\n[bold]labels[/]")
    facts = {
        "revision preferred to the original": means["revision_preferred"],
        "flip with the order of the completions": means["order_flips"],
    }
    for name, share in facts.items():
        if share is not None:
            _console.print(
                f"  {share:>6.0%}  {name}  [cyan]{'━' * round(share * 24)}[/][dim]{'─' * (24 - round(share * 24))}[/]"
            )
    _console.print(
        f"  {means['chosen_probability']:>6.2f}  mean probability of the chosen one\n"
        f"  {means['chosen_length']:>6.0f}  characters in chosen, {means['rejected_length']:.0f} in rejected (mean)"
    )


def _show_cost(manifest: dict[str, Any]) -> None:
    _console.print("\n[bold]cost[/]")
    for role, usage in manifest["usage"].items():
        _console.print(
            f"  {role}: {usage['calls']:,} calls, {usage['prompt_tokens']:,} prompt tokens, "
            f"{usage['completion_tokens']:,} completion tokens"
        )
    session = manifest["sessions"][-1]
    replayed = f", {session['calls_replayed']:,} calls were already paid for" if session["calls_replayed"] else ""
    _console.print(f"  {session['seconds']:,.0f} s this time{replayed}")


def _show_next(manifest: dict[str, Any], out: Path) -> None:
    _show_example(out)
    folder = printable(str(out))
    _console.print(f"\n[bold]next[/]\n  the card, counts and limits:  {escape(folder)}/README.md", soft_wrap=True)
    rows = manifest["dataset"]["rows"]
    name = "preference" if rows["preference"]["train"] else "trace"
    if not sum(rows["preference"].values()):
        _console.print(
            "  [yellow]no pair was made[/]: 'left out' above says why; a larger model or generation.max_tokens may help"
        )
    if rows[name]["train"]:
        code = f"from datasets import load_dataset; print(load_dataset({folder!r}, {name!r})['train'][0])"
        _console.print(f'  look at a row:  python -c "{escape(code)}"', soft_wrap=True)


def _show_example(out: Path) -> None:
    import pyarrow.parquet

    file = next(iter(sorted((out.absolute() / "data" / "preference").glob("train-*.parquet"))))
    rows = next(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=200), None)
    pairs = rows.to_pylist() if rows is not None else []
    if not pairs:
        return
    surest = max(pairs, key=lambda pair: pair["chosen_probability"])
    _console.print(f"\n[bold]a pair[/], {surest['chosen_probability']:.2f} sure")
    for name, style in (("prompt", "dim"), ("chosen", "green"), ("rejected", "red")):
        text = shortened(surest[name][-1]["content"], 300)
        _console.print(f"  [{style}]{name:>8}[/]  {escape(text)}")

"""The end of `cai generate`: what was made, what was left out and why, what it cost, an example, what to type next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cai.cli.terminal import console, counted, duration, printable, shortened
from cai.errors import Interrupted
from cai.store import would_lose

_GROUPS = ("rows", "candidates", "revisions", "sft", "preference", "unpaired")
"""What is left out, in the order in which it is."""
_ALL = 0.9
"""From this share on, a judge whose label flips with the order is said to follow it."""
_LONGER = "raise generation.max_tokens"
_HINTS = {
    "less sure than dataset.min_probability": "lower dataset.min_probability, which costs no call",
    "tie": "try another --judge-model",
    "chosen is cut off by the token limit": _LONGER,
    "candidates: empty": "where a model's thoughts take up all of generation.max_tokens, raise it or switch them off",
    "candidates: the same as an earlier one": "raise generation.temperature",
    "revisions: truncated": _LONGER,
}
"""By what most pairs, or the texts for them, were left out: what may help."""


@contextmanager
def saying_what_is_kept(out: Path) -> Iterator[None]:
    """Adds to an interruption how many finished calls the folder keeps."""
    try:
        yield
    except Interrupted as exc:
        kept = would_lose(out)
        raise type(exc)(f"{exc}; {kept} are kept" if kept else str(exc)) from exc


def show_summary(manifest: dict[str, Any], out: Path) -> None:
    """Everything, from the manifest of a run that is done and the dataset in its folder."""
    _show_rows(manifest["dataset"]["rows"])
    _show_labels(manifest["dataset"])
    _show_left_out(manifest)
    _show_cost(manifest)
    _show_example(out)
    _show_next(manifest["dataset"], out)


def _show_rows(rows: dict[str, dict[str, int]]) -> None:
    table = Table("dataset", "train", "test", box=None, header_style="bold", pad_edge=False)
    for name, splits in rows.items():
        table.add_row(name, f"{splits['train']:,}", f"{splits.get('test', 0):,}")
    console.print()
    console.print(table)
    if empty := [name for name, splits in rows.items() if not sum(splits.values())]:
        console.print(f"[yellow]without rows, so not there to load:[/] {', '.join(empty)}")


def _show_labels(dataset: dict[str, Any]) -> None:
    means = dataset["means"]
    if means["order_flips"] is None:
        return
    console.print("\n[bold]labels[/]")
    facts = {
        "revision preferred to the original": means["revision_preferred"],
        "flip with the order of the completions": means["order_flips"],
        "shown first preferred to shown second": means["first_shown"],
    }
    for name, share in facts.items():
        if share is not None:
            console.print(
                f"  {share:>6.0%}  {name:<38}  [cyan]{'━' * round(share * 24)}[/][dim]{'─' * (24 - round(share * 24))}[/]"
            )
    if means["order_flips"] >= _ALL:
        console.print("  [yellow]the judge follows the order, not the text[/]: try another --judge-model")
    if means["chosen_probability"] is not None:
        pairs = counted(sum(dataset["rows"]["preference"].values()), "pair")
        console.print(
            f"  {means['chosen_probability']:>6.2f}  mean probability of the chosen one ({pairs})\n"
            f"  {means['chosen_length']:>6.0f}  characters in chosen, {means['rejected_length']:.0f} in rejected (mean)"
        )


def _show_left_out(manifest: dict[str, Any]) -> None:
    dataset, prompts = manifest["dataset"], manifest["prompts"]
    left_out = {**dataset["dropped"], **{f"rows: {why}": count for why, count in prompts["quarantined"].items()}}
    if prompts["duplicates"]:
        left_out["rows: duplicate prompt"] = prompts["duplicates"]
    if not left_out:
        return
    console.print("\n[bold]left out[/]")
    for group in _GROUPS:
        reasons = {key.removeprefix(f"{group}: "): count for key, count in left_out.items() if key.startswith(f"{group}: ")}
        if reasons:
            console.print(f"  {group}")
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
            console.print(f"  {count:>6,}  {escape(printable(reason))}")
    if "paired" in dataset:  # a manifest of before has no such count
        read = prompts["read"] - prompts["duplicates"]
        console.print(f"  {dataset['paired']:,} of {counted(read, 'prompt')} gave a pair")


def _show_cost(manifest: dict[str, Any]) -> None:
    console.print("\n[bold]cost[/]")
    for role, usage in manifest["usage"].items():
        console.print(
            f"  {role}: {counted(usage['calls'], 'call')}, {usage['prompt_tokens']:,} prompt tokens, "
            f"{usage['completion_tokens']:,} completion tokens"
        )
    session = manifest["sessions"][-1]
    every = sum(usage["calls"] for usage in manifest["usage"].values())
    paid = ""
    if not session["calls_made"] and every:
        paid = f", all {counted(every, 'call')} were already paid for"
    elif session["calls_replayed"]:
        paid = f", {counted(session['calls_replayed'], 'call')} were already paid for"
    console.print(f"  {duration(session['seconds'])} this time{paid}")


def _show_example(out: Path) -> None:
    import pyarrow.parquet

    file = next(iter(sorted((out.absolute() / "data" / "preference").glob("train-*.parquet"))))
    rows = next(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=200), None)
    pairs = rows.to_pylist() if rows is not None else []
    if not pairs:
        return
    surest = max(pairs, key=lambda pair: pair["chosen_probability"])
    console.print(f"\n[bold]a pair[/], {surest['chosen_probability']:.2f} sure")
    for name, style in (("prompt", "dim"), ("chosen", "green"), ("rejected", "red")):
        text = Text(shortened(surest[name][-1]["content"], 300))
        for number, line in enumerate(text.wrap(console, max(20, console.width - 12))):
            console.print(Text.assemble(("" if number else f"  {name:>8}").ljust(12), style=style).append(line.plain, ""))


def _show_next(dataset: dict[str, Any], out: Path) -> None:
    folder = printable(str(out))
    console.print(f"\n[bold]next[/]\n  the card, counts and limits:  {escape(folder)}/README.md", soft_wrap=True)
    rows = dataset["rows"]
    if not sum(rows["preference"].values()):
        console.print(f"  [yellow]no pair was made[/]{_why_no_pair(dataset['dropped'])}")
    name = "preference" if rows["preference"]["train"] else "trace"
    if rows[name]["train"]:
        code = f"from datasets import load_dataset; print(load_dataset({folder!r}, {name!r})['train'][0])"
        console.print(f'  look at a row:  python -c "{escape(code)}"', soft_wrap=True)


def _why_no_pair(dropped: dict[str, int]) -> str:
    """What most pairs failed of, and what may help; where there was nothing to compare, what the texts failed of."""
    reason = _leading(dropped, "preference: ").removeprefix("preference: ")
    if reason == "nothing to compare":
        reason = _leading(dropped, "revisions: ", "candidates: ") or reason
    hint = _HINTS.get(reason, "a larger model may help")
    return f", mostly for '{reason}': {hint}" if reason else ""


def _leading(dropped: dict[str, int], *groups: str) -> str:
    """The reason of these groups that is counted most often, or an empty string."""
    return max((key for key in dropped if key.startswith(groups)), key=lambda key: dropped[key], default="")

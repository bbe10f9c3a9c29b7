"""What is shown at the end of `cai train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cai.cli.terminal import console, duration, printable

_NEXT = {
    "reward": "score completions:  cai reward score {out} completions.jsonl",
    "sft": "train on pairs:     cai train dpo DATA -m {out}",
}


def show_summary(manifest: dict[str, Any], out: Path) -> None:
    """Rows, measures, where the model is, what to type next."""
    console.print()
    table = Table("data", "train", "test", box=None, header_style="bold", pad_edge=False)
    for one in manifest["data"]:
        table.add_row(escape(printable(one["source"])), f"{one['train']:,}", f"{one['test']:,}")
    console.print(table)
    for split, count in manifest["too_long"].items():
        console.print(f"[yellow]left out[/] {count:,} of {split}: longer than trl.max_length")
    console.print(f"\n[bold]measures[/] after {manifest['steps']:,} steps, {duration(manifest['seconds'])}")
    for name, value in manifest["measures"].items():
        if isinstance(value, int | float):
            console.print(f"  {value:>10.4g}  {escape(name)}")
    console.print(f"\nmodel: {escape(str(out))}", soft_wrap=True)
    follow = _NEXT.get(manifest["stage"], "use it:             cai generate -m {out}")
    console.print(escape(follow.format(out=out)), soft_wrap=True)

"""Rows scored by a reward model: a table of the first ones, a file of all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from rich.markup import escape
from rich.table import Table

from cai.cli.progress import counting
from cai.cli.terminal import console, counted, errors, printable, shortened
from cai.config import PromptsConfig
from cai.errors import PromptSourceError, StoreError
from cai.prompts import read_completions

_SHOWN = 10
"""Rows of the table, and bad rows that are named."""
_TELLING = 10
"""From so many completions on, a correlation says something."""
_MEMBERS = 5
"""The most members whose rewards the table shows; a file has those of all."""


def score(model_name: str, file: str, limit: int | None, out: Path | None) -> None:
    """Score the rows and show what came of it. Raises `PromptSourceError` where no row can be scored."""
    from cai.rewards.model import RewardModel
    from cai.training.scoring import candidates, score_candidates, summarize

    rows = read_completions(PromptsConfig(source=file, limit=limit))
    model, bad = RewardModel.load(model_name), _Bad()
    given = list(candidates(model, rows, bad.add))
    bad.show()
    if not given:
        raise PromptSourceError(f"{file}: there is no row that can be scored")
    with counting("scored", len(given) * len(model.members)) as more, _written(out) as output:
        lines = list(_passing(score_candidates(model, given, more), output))
    console.print(_table(lines[:_SHOWN], model.spec.length is not None))
    _show_summary(summarize(lines, [one.dialogue[:-1] for one in given]))
    if out:
        console.print(f"\nall scores: {escape(printable(str(out)))}", soft_wrap=True)


class _Bad:
    """Rows that were left out; the first ones are named."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, origin: str, why: str) -> None:
        self._count += 1
        if self._count <= _SHOWN:
            errors.print(f"[yellow]left out[/] {escape(printable(origin))}: {escape(printable(why))}", soft_wrap=True)

    def show(self) -> None:
        if self._count > _SHOWN:
            errors.print(f"[yellow]left out[/] {counted(self._count, 'row')} in all")


@contextmanager
def _written(out: Path | None) -> Iterator[IO[str] | None]:
    """A file that has its name only when it is whole. Raises `StoreError`."""
    if out is None:
        yield None
        return
    part = out.with_name(out.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(out)
    except OSError as exc:
        raise StoreError(f"{out}: cannot be written: {exc.strerror or exc}") from exc


def _passing(lines: Iterable[dict[str, Any]], output: IO[str] | None) -> Iterator[dict[str, Any]]:
    for line in lines:
        if output:
            output.write(json.dumps(line, ensure_ascii=False) + "\n")
        yield line


def _table(lines: list[dict[str, Any]], has_length: bool) -> Table:
    first = lines[0]
    names = list(first["objectives"]) if len(first["objectives"]) > 1 else []
    members = [f"member {number}" for number in range(len(first["members"]))] if 1 < len(first["members"]) <= _MEMBERS else []
    numbers = ["reward", *names, *members, *(["for length"] if has_length else []), "tokens"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("row", no_wrap=True, min_width=9, max_width=24)
    for name in numbers:
        shown_name = printable(name)
        table.add_column(escape(shown_name), justify="right", no_wrap=True, min_width=max(len(shown_name), 5))
    table.add_column("completion", ratio=1, no_wrap=True, min_width=12)
    for one in lines:
        parts = [one["reward"], *(one["objectives"][name] for name in names), *(one["members"] if members else [])]
        shown = [f"{part:+.2f}" for part in [*parts, *([one["length"]] if has_length else [])]]
        side = "" if one["side"] == "completion" else f" {one['side']}"
        where = escape(printable(Path(one["origin"]).name)) + side
        table.add_row(where, *shown, f"{one['tokens']:,}", escape(shortened(one["completion"], 60)))
    return table


def _show_summary(found: dict[str, float]) -> None:
    said = f"{counted(int(found['completions']), 'completion')}: mean {found['mean']:+.3f}, deviation {found['deviation']:.3f}"
    if "chosen_ahead" in found:
        said += f"; chosen ahead of rejected in {found['chosen_ahead']:.1%} of the pairs"
        if "chosen_ahead_low" in found:
            said += f" ({found['chosen_ahead_low']:.1%} to {found['chosen_ahead_high']:.1%})"
    console.print(f"\n{said}")
    names = {"overall": "correlation with length", "within_prompts": "within prompts"}
    parts = [f"{name} {found[key]:+.2f}" for one, name in names.items() if (key := f"length_correlation_{one}") in found]
    if parts and found["completions"] >= _TELLING:
        console.print(", ".join(parts))

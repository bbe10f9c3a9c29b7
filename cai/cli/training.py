"""How far a training is, and what is shown at its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from cai.cli.terminal import console, counted, duration, printable, time_left
from cai.intervals import gathered
from cai.models import best_model
from cai.report.written import named
from cai.training import ONLINE
from cai.training.folder import PAGE, QUARANTINE

if TYPE_CHECKING:
    from cai.training.watching import Show

_LINE_EVERY = 15.0
"""Seconds between plain lines of one phase."""
_SHOWN = (
    "loss",
    "eval_loss",
    "reward",
    "objective/scores",
    "objective/kl",
    "rewards/accuracies",
    "rewards/margins",
    "mean_token_accuracy",
)
"""Measures that are shown as they come."""
_NEXT = {
    "reward": "score completions:  cai reward score {out} completions.jsonl",
    "sft": "train on pairs:     cai train dpo DATA -m {out}",
    **dict.fromkeys(ONLINE, "look at answers:    cai generate PROMPTS -m {out}"),
}


@contextmanager
def progress() -> Iterator[Show]:
    """On standard error: a bar where that is a terminal, plain lines where not."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    with Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), console=_stderr()) as bar:
        yield _Bar(bar)


def _stderr() -> Console:
    return Console(stderr=True, highlight=False)


class _Pace:
    """How much longer, from the steps that were done since this began."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None
        self._last = 0

    def left(self, done: int, total: int) -> str:
        """`, about 6 min left`, or an empty string where that cannot be told; fewer steps are those of another model."""
        now = time.monotonic()
        began, before = self._since = (now, done) if self._since is None or done < self._last else self._since
        self._last = done
        if not before < done < total:
            return ""
        return f", {time_left((now - began) * (total - done) / (done - before))}"


def _told(measures: Mapping[str, float]) -> str:
    """`loss 0.69, accuracies 0.61`."""
    return ", ".join(f"{name.rpartition('/')[2]} {measures[name]:.4g}" for name in _SHOWN if measures.get(name) is not None)


class _Bar:
    """A bar of steps, and above it what was noted."""

    def __init__(self, bar: Progress) -> None:
        self._bar, self._pace, self._told, self._trains = bar, _Pace(), "", False
        self._task = bar.add_task("", total=None, state="")

    def note(self, text: str) -> None:
        if self._trains:  # the next step would take its place
            self._bar.console.print(escape(text), soft_wrap=True)
        self._bar.update(self._task, description=escape(text), state="")

    def step(self, done: int, total: int, measures: Mapping[str, float]) -> None:
        self._trains = done < total
        self._told = _told(measures) or self._told
        state = self._told + self._pace.left(done, total)
        self._bar.update(self._task, description=f"step {done:,} of {total:,}", completed=done, total=total, state=state)


class _Lines:
    """A line for each note, and for measures every now and then: the first, the last, and one each so many seconds."""

    def __init__(self) -> None:
        self._pace, self._last = _Pace(), 0.0

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def step(self, done: int, total: int, measures: Mapping[str, float]) -> None:
        left, seconds = self._pace.left(done, total), time.monotonic() - self._last
        told = _told(measures)
        if not told or not (done == total or seconds >= _LINE_EVERY):
            return
        self._last = time.monotonic()
        print(f"step {done:,} of {total:,}  {told}{left}", file=sys.stderr, flush=True)


def show_summary(manifest: dict[str, Any], out: Path) -> None:
    """Rows, measures, where the model is, what to type next."""
    console.print()
    table = Table("data", "train", "test", box=None, header_style="bold", pad_edge=False)
    for one in manifest["data"]:
        table.add_row(escape(printable(one["source"])), f"{one['train']:,}", f"{one['test']:,}")
    console.print(table)
    for one in manifest["data"]:
        if left_out := one.get("left_out"):
            first = escape(printable(one["first_left_out"]))
            where = escape(str(out / QUARANTINE))
            console.print(
                f"[yellow]left out[/] {counted(left_out, 'row')} that could not be used ({where}); the first, {first}",
                soft_wrap=True,
            )
    limit = "the room that completions leave of the context" if manifest["stage"] in ONLINE else "trl.max_length"
    limit += " or trl.max_length" * (manifest["stage"] == "online-dpo")
    for split, count in manifest["too_long"].items():
        console.print(f"[yellow]left out[/] {count:,} of {split}: longer than {limit}")
    for split, count in manifest["unlabelled"].items():
        console.print(f"[yellow]left out[/] {count:,} of {split}: no verdict on any objective")
    _show_guarded(manifest)
    if not (any(one["test"] for one in manifest["data"]) or manifest["stage"] in ONLINE):
        console.print("[yellow]no held-out rows[/]: how well it does on others is not known; name a test_split that has rows")
    console.print(f"\n[bold]measures[/] after {manifest['steps']:,} steps, {duration(manifest['seconds'])}")
    if told := manifest.get("training"):
        console.print(
            f"  learning rate {told['learning_rate']:.4g} ({told['schedule']}), {told['rows_per_step']:,} rows a step"
        )
    for name, value, ends in gathered(manifest["measures"]):
        interval = f"  ({ends[0]:.4g} to {ends[1]:.4g})" if ends else ""
        console.print(f"  {value:>10.4g}  {escape(named(name, manifest.get('rollout')))}{interval}", soft_wrap=True)
    console.print(f"\nmodel: {escape(str(out))}", soft_wrap=True)
    for name, place in (("best by gold", "best"), ("pictures", PAGE)):
        if (out / place).exists():
            console.print(f"{name}: {escape(str(out / place))}", soft_wrap=True)
    follow = _NEXT.get(manifest["stage"], "use it:             cai generate -m {out}")
    console.print(escape(follow.format(out=best_model(out))), soft_wrap=True)


def _show_guarded(manifest: dict[str, Any]) -> None:
    """Of an online stage, what stopped it, what was changed in its midst, and how gold went."""
    if stopped := manifest.get("stopped"):
        console.print(f"[yellow]stopped[/] after step {stopped['step']:,}: {escape(stopped['why'])}", soft_wrap=True)
    for one in manifest.get("changes", ()):
        console.print(f"[yellow]another version[/] of {escape(one['key'])} after step {one['step']:,}", soft_wrap=True)
    if best := manifest.get("best"):
        first, last = manifest["gold"]["first"], manifest["gold"]["last"]
        console.print(
            f"gold by {escape(manifest['gold']['by'])}: from {_estimated(first)} to {_estimated(last)} at step "
            f"{last['step']:,}, best at step {best['step']:,}: {_estimated(best)}",
            soft_wrap=True,
        )
        if best["step"] == 0:
            console.print(
                "[yellow]no measure was better than the one before training[/]: best/ is the model that it began with",
                soft_wrap=True,
            )
    elif gold := manifest.get("gold"):
        console.print(
            f"[yellow]gold by {escape(gold['by'])}[/] had no number for any answer: nothing was measured", soft_wrap=True
        )
    elif manifest["stage"] in ONLINE:
        console.print("[yellow]no gold measure[/]: whether answers got better with the reward is not known")
    for name, count in manifest.get("unscored", {}).items():
        console.print(
            f"[yellow]no number[/] of reward '{escape(name)}' for {count['none']:,} of {count['of']:,} completions",
            soft_wrap=True,
        )


def _estimated(measure: Mapping[str, float]) -> str:
    """`0.41 (0.33 to 0.48)`."""
    if "gold" not in measure:
        return "unknown"
    ends = f" ({measure['low']:.3g} to {measure['high']:.3g})" if "low" in measure else ""
    return f"{measure['gold']:.3g}{ends}"

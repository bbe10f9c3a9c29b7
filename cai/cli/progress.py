"""A progress bar where there is a terminal, plain lines where there is none; both on standard error."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cai.cli.terminal import duration, time_left
from cai.generation import Tally

_LINE_EVERY = 15.0
"""Seconds between plain lines."""
_COUNTED = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


@contextmanager
def watch(tally: Tally, total: int | None) -> Iterator[None]:
    """Show the counters of a pass while the block runs."""
    stop = threading.Event()
    target = _bar if sys.stderr.isatty() else _lines
    thread = threading.Thread(target=target, args=(tally, total, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class _Pace:
    """How fast a pass goes from its first new call on: loading the model, and what was kept, tell nothing of that."""

    def __init__(self) -> None:
        self.share = 0.0
        """The share that is done, as last seen; it never falls, although what a tally tells is rough."""
        self._since: tuple[float, float] | None = None

    def left(self, tally: Tally, total: int | None, now: float) -> str:
        """`, 40%, about 6 min left`, or an empty string where that cannot be told."""
        self.share = max(self.share, tally.share(total) or 0.0)
        if not tally.calls_made or tally.stopping:
            return ""
        self._since = self._since or (now, self.share)
        began, before = self._since
        if not before < self.share < 1:
            return ""
        return f", {self.share:.0%}, {time_left((now - began) * (1 - self.share) / (self.share - before))}"


def _bar(tally: Tally, total: int | None, stop: threading.Event) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
    began, pace = time.monotonic(), _Pace()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task: TaskID = progress.add_task("prompts", total=None if total is None else 1.0, state="")
        ended = False
        while not ended:
            ended = stop.wait(0.2)
            left = pace.left(tally, total, time.monotonic())
            description, state = _prompts(tally, total), _state(tally, began) + left
            progress.update(task, completed=pace.share, description=description, state=state)


def _lines(tally: Tally, total: int | None, stop: threading.Event) -> None:
    began, pace = time.monotonic(), _Pace()
    ended = False
    while not ended:
        ended = stop.wait(_LINE_EVERY)
        left = pace.left(tally, total, time.monotonic())
        print(f"{_prompts(tally, total)}  {_state(tally, began)}{left}", file=sys.stderr, flush=True)


def _prompts(tally: Tally, total: int | None) -> str:
    return f"prompts {tally.done:,}" + ("" if total is None else f" of {total:,}")


def _state(tally: Tally, began: float) -> str:
    if tally.stopping and not tally.in_flight:
        return "stopped"
    if tally.stopping:
        return f"stopping: {tally.in_flight} calls in flight finish; Ctrl-C again stops at once"
    seconds = time.monotonic() - began
    if not tally.calls_made and tally.in_flight and not tally.batches.in_words:
        return f"{duration(seconds)}, loading the model and waiting for first answers"
    if not tally.calls_made and tally.records_kept:
        return f"{tally.records_kept:,} kept from before, no call was needed"
    if batches := tally.batches.in_words:
        return f"{duration(seconds)}, {tally.calls_made:,} calls, {batches}"
    seconds = max(seconds, 1e-9)
    generated, made = tally.completion_tokens / seconds, tally.calls_made / seconds
    parts = [f"{tally.calls_made:,} calls", f"{generated:,.0f} tokens/s" if generated else f"{made:,.1f} calls/s"]
    if tally.quarantined or tally.duplicates:
        parts.append(f"{tally.quarantined.total() + tally.duplicates} left out")
    return ", ".join(parts)


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` are done while the block runs; what it yields is called with how many more are."""
    with Progress(*_COUNTED, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        began = shown = time.monotonic()
        done = 0

        def more(count: int) -> None:
            nonlocal done, shown
            done += count
            progress.advance(task, count)
            if (now := time.monotonic()) - shown >= _LINE_EVERY and not sys.stderr.isatty():
                shown, left = now, (now - began) * (total - done) / max(done, 1)
                print(f"{what} {done:,} of {total:,}, {time_left(left)}", file=sys.stderr, flush=True)

        yield more

"""A progress bar where there is a terminal, plain lines where there is none; both on standard error."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cai.generation import Tally

_LINE_EVERY = 15.0
"""Seconds between plain lines."""


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


def _bar(tally: Tally, total: int | None, stop: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task: TaskID = progress.add_task("prompts", total=total, state="")
        while not stop.wait(0.2):
            progress.update(task, completed=tally.done, state=_state(tally, began))
        progress.update(task, completed=tally.done, state=_state(tally, began))


def _lines(tally: Tally, total: int | None, stop: threading.Event) -> None:
    began = time.monotonic()
    while not stop.wait(_LINE_EVERY):
        _print_line(tally, total, began)
    _print_line(tally, total, began)


def _print_line(tally: Tally, total: int | None, began: float) -> None:
    of = f" of {total:,}" if total is not None else ""
    state = _state(tally, began) + _time_left(tally, total, time.monotonic() - began)
    print(f"prompts {tally.done:,}{of}  {state}", file=sys.stderr, flush=True)


def _time_left(tally: Tally, total: int | None, seconds: float) -> str:
    made = tally.done - tally.records_kept
    if total is None or not made or total <= tally.done or tally.stopping:
        return ""
    return f", about {datetime.timedelta(seconds=round((total - tally.done) * seconds / made))} left"


def _state(tally: Tally, began: float) -> str:
    if tally.stopping:
        return f"stopping: {tally.in_flight} calls in flight finish; Ctrl-C again stops at once"
    seconds = time.monotonic() - began
    if not tally.calls_made and tally.in_flight:
        return f"{seconds:.0f} s, loading the model and waiting for first answers"
    parts = [f"{tally.calls_made:,} calls", f"{tally.completion_tokens / max(seconds, 1e-9):,.0f} tokens/s"]
    if tally.quarantined or tally.duplicates:
        parts.append(f"{tally.quarantined.total() + tally.duplicates} left out")
    return ", ".join(parts)

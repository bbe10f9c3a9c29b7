"""A progress bar where there is a terminal, plain lines where there is none; both on standard error."""

from __future__ import annotations

import datetime
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeRemainingColumn())
    began = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task: TaskID = progress.add_task("prompts", total=None if total is None else 1.0, state="")
        ended = False
        while not ended:
            ended = stop.wait(0.2)
            description, state = _prompts(tally, total), _state(tally, began)
            progress.update(task, completed=tally.share(total) or 0.0, description=description, state=state)


def _lines(tally: Tally, total: int | None, stop: threading.Event) -> None:
    began = time.monotonic()
    ended = False
    while not ended:
        ended = stop.wait(_LINE_EVERY)
        left = _time_left(tally, total, time.monotonic() - began)
        print(f"{_prompts(tally, total)}  {_state(tally, began)}{left}", file=sys.stderr, flush=True)


def _prompts(tally: Tally, total: int | None) -> str:
    return f"prompts {tally.done:,}" + ("" if total is None else f" of {total:,}")


def _time_left(tally: Tally, total: int | None, seconds: float) -> str:
    share = tally.share(total)
    if not share or share == 1 or not tally.calls_made or tally.stopping:
        return ""
    return f", {share:.0%}, about {datetime.timedelta(seconds=round(seconds / share - seconds))} left"


def _state(tally: Tally, began: float) -> str:
    if tally.stopping and not tally.in_flight:
        return "stopped"
    if tally.stopping:
        return f"stopping: {tally.in_flight} calls in flight finish; Ctrl-C again stops at once"
    seconds = time.monotonic() - began
    if not tally.calls_made and tally.in_flight:
        return f"{seconds:.0f} s, loading the model and waiting for first answers"
    parts = [f"{tally.calls_made:,} calls", f"{tally.completion_tokens / max(seconds, 1e-9):,.0f} tokens/s"]
    if tally.quarantined or tally.duplicates:
        parts.append(f"{tally.quarantined.total() + tally.duplicates} left out")
    return ", ".join(parts)

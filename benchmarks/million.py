"""Many prompts at a server that answers shortly: flat memory, an end as fast as the start, and a finished run once more.

Two short answers to each prompt, compared by a program: two calls a prompt, to a server that answers at once. Rows a
second and memory are those of the client's process while it makes records, by tenths of the rows after a warm-up; the
dataset is written afterwards. Then the same command again.

    python -m benchmarks.million [--full | ROWS]      (default 20000; --full: 1,000,000)

Goals: rows a second in the last tenth at least 0.95 of those in the first; memory flat; a finished run of 1,000,000 prompts
again in under 30 s.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.mock import Server, cost_of, served

TENTHS = 10
FULL = 1_000_000
RESUME_GOAL = 30.0
"""Seconds, of so many prompts."""


def client(url: str, folder: str, rows: str) -> None:
    """What the client's process does: the run, and what was seen of it as JSON."""
    import cai

    seen: list[tuple[int, float, float]] = []
    marks = marks_of(int(rows))

    @contextmanager
    def watch(tally: Any, _total: int | None) -> Iterator[None]:
        """Note when each mark is passed, and the memory then."""
        ended = threading.Event()
        thread = threading.Thread(target=note, args=(tally, marks, seen, ended), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    recipe = {
        "constitution": f"{folder}/constitution.yaml",
        "prompts": {"source": f"{folder}/prompts.jsonl"},
        "policy": {"model": url},
        "judge": {"method": "checks"},
        "generation": {"candidates": 2, "rounds": 0, "pairs": "samples", "max_tokens": 8},
    }
    cai.generate(cai.Recipe.model_validate(recipe), Path(folder, "out"), watch=watch)
    print(json.dumps(seen))


def marks_of(rows: int) -> list[int]:
    """Where the tenths begin and end: after a warm-up of 2 %, and before the last rows run out."""
    first, last = rows // 50, rows - rows // 100
    return [first + (last - first) * part // TENTHS for part in range(TENTHS + 1)]


def note(tally: Any, marks: list[int], seen: list[tuple[int, float, float]], ended: threading.Event) -> None:
    """Rows, seconds and MB, when each mark is passed."""
    while not ended.wait(0.02):
        if len(seen) < len(marks) and tally.done >= marks[len(seen)]:
            seen.append((tally.done, time.perf_counter(), memory()))


def memory() -> float:
    """What this process holds, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def write_inputs(folder: Path, rows: int) -> None:
    """Prompts that all differ, and a constitution whose one principle is a check."""
    principle = {"id": "brief", "check": {"max_characters": 10}}
    text = {"name": "brief", "description": "One check.", "license": "CC0-1.0", "principles": [principle]}
    (folder / "constitution.yaml").write_text(json.dumps(text))
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(rows):
            file.write(json.dumps({"prompt": f"Question {number}: what is the square of {number}?"}) + "\n")


def run(server: Server, folder: Path, rows: int) -> None:
    """The run, tenth by tenth, and the same again."""
    arguments = ("-m", "benchmarks.million", "--client", server.url, folder, rows)
    cost = cost_of(*arguments)
    stats = server.stats()
    if stats["answered"] < 2 * rows:
        raise SystemExit(f"only {stats['answered']:,} of {2 * rows:,} calls were answered")
    seen = json.loads(cost.printed)
    speeds = [(after[0] - before[0]) / (after[1] - before[1]) for before, after in pairwise(seen)]
    print(f"{rows:,} prompts, {stats['answered']:,} calls: {cost.wall:.1f} s with the dataset, {cost.cpu:.1f} s of CPU")
    print(f"  rows/s by tenths: {' '.join(f'{speed:,.0f}' for speed in speeds)}; last to first {speeds[-1] / speeds[0]:.2f}")
    print(f"  MB at the same places: {' '.join(f'{one[2]:.0f}' for one in seen)}; last to first {seen[-1][2] / seen[0][2]:.2f}")
    print(f"  peak with the dataset: {cost.memory:.0f} MB", flush=True)
    again = cost_of(*arguments)
    made = server.stats()["calls"] - stats["calls"]
    goal = f", {again.wall / RESUME_GOAL:.2f} of the goal" if rows == FULL else ""
    print(
        f"  the same again: {again.wall:.1f} s{goal}, peak {again.memory:.0f} MB, {made} probing calls",
        flush=True,
    )


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        return client(*sys.argv[2:])
    rows = FULL if sys.argv[1:] == ["--full"] else int((sys.argv[1:] or ["20000"])[0])
    with served(latency=0.005, tokens=2, remember="false") as server, tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), rows)
        run(server, Path(folder), rows)


if __name__ == "__main__":
    main()

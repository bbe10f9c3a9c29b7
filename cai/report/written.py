"""What an online training has written beside its checkpoints, as it is read again: lines of JSON, each of one step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

Line = Mapping[str, Any]
_OF_ROLLOUT = ("reward", "objective/scores", "kl")
"""Measures in a manifest that are of the last rollout."""
_FEW = 4
"""Less than one in so many is few."""


class Written(NamedTuple):
    """What a training has written so far: lines of each step, in their order."""

    log: list[Line]
    rollouts: list[Line]
    gold: list[Line]
    samples: list[Line]
    stopped: Line | None


def read_training(out: Path) -> Written:
    """What lies in OUT/run. A step is logged in several lines, which are made one; of what a rollout or a measure wrote twice,
    since the training went on from before it, the last line."""
    run, stopped = out / "run", out / "run" / "stopped.json"
    merged: dict[int, dict[str, Any]] = {}
    for line in read_lines(run / "log.jsonl"):
        merged.setdefault(line["step"], {}).update(line)
    last = [{line["step"]: line for line in read_lines(run / f"{name}.jsonl")} for name in ("rollouts", "gold")]
    log, rollouts, gold = ([one[step] for step in sorted(one)] for one in (merged, *last))
    told = json.loads(stopped.read_bytes()) if stopped.exists() else None
    return Written([*log], [*rollouts], [*gold], [*read_lines(run / "samples.jsonl")], told)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """All whole lines that have a step; none where there is no file."""
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else ():
        try:
            told = json.loads(line)
        except ValueError:
            continue  # the last one, while it is written, or of a process that was killed meanwhile
        if isinstance(told, dict) and isinstance(told.get("step"), int):
            found.append(told)
    return found


def best_of(gold: Sequence[Line]) -> Line | None:
    """The measure with the highest gold, the first of several; None where no answer had a number."""
    best: Line | None = None
    for line in gold:
        if line["gold"] is not None and (best is None or _is_better(line, best)):
            best = line
    return best


def _is_better(line: Line, best: Line) -> bool:
    """By the prompts that both have a number for; where these are few of those that one of them has, the one with more."""
    pairs = [pair for pair in zip(line["golds"], best["golds"], strict=True) if None not in pair]
    if _FEW * len(pairs) < max(_scored(line), _scored(best)):
        return _scored(line) > _scored(best)
    return fmean(new for new, _ in pairs) > fmean(old for _, old in pairs)


def _scored(line: Line) -> int:
    return sum(one is not None for one in line["golds"])


def named(measure: str, rollout: int | None) -> str:
    """A measure's name with its unit and, where it is of the completions of the last rollout, the step of that."""
    name = {"kl": "kl, nats a completion"}.get(measure, measure)
    return name if rollout is None or measure not in _OF_ROLLOUT else f"{name} (of the rollout at step {rollout:,})"


def unscored(rollouts: Sequence[Line]) -> dict[str, tuple[int, int]]:
    """Of each reward that had no number for some completions: for how many, and of how many."""
    names = dict.fromkeys(name for line in rollouts for name, count in line.get("unscored", {}).items() if count)
    of = sum(int(line["completions"]) for line in rollouts if "unscored" in line)
    return {name: (sum(line.get("unscored", {}).get(name, 0) for line in rollouts), of) for name in names}

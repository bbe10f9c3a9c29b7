"""Training in tests: a few rows, a few steps, on the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cai.cli.train import read_document
from cai.training import SETTINGS, StageName, TrainSettings

FAST: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
}
"""TRL's arguments of a short training; each step is logged."""
WORDS = ["a river", "the lamp", "two stones", "winter", "some paper", "the bridge", "a letter", "morning"]


def make_settings(
    stage: StageName, model: Path, *sources: Any, trl: dict[str, Any] | None = None, **keys: Any
) -> TrainSettings:
    """A stage's settings in float32 with `FAST`; `trl` and `keys` win."""
    data = [one if isinstance(one, dict) else {"source": str(one)} for one in sources]
    given = {"model": str(model), "dtype": "float32", "data": data, "trl": FAST | (trl or {}), **keys}
    return SETTINGS[stage].model_validate(given)


def resolve_settings(stage: StageName, *given: Any) -> TrainSettings:
    """What the command line makes of a file, --set and flags."""
    return read_document(stage, *given).validate(SETTINGS[stage])


def pair(number: int, probability: float = 1.0) -> dict[str, Any]:
    """A preference row."""
    return {
        "prompt": [{"role": "user", "content": f"Say something about {WORDS[number % 8]}, number {number}."}],
        "chosen": [{"role": "assistant", "content": f"Here is {WORDS[(number + 1) % 8]}."}],
        "rejected": [{"role": "assistant", "content": f"No, I would rather not talk of {WORDS[(number + 3) % 8]} today."}],
        "chosen_probability": probability,
    }


def dialogue(number: int, answer: str = "") -> dict[str, Any]:
    """An SFT row."""
    one = pair(number)
    return {"messages": one["prompt"] + [{"role": "assistant", "content": answer or one["chosen"][0]["content"]}]}


def write_rows(file: Path, rows: list[Any]) -> Path:
    """A JSONL file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def log(out: Path) -> list[dict[str, Any]]:
    """What was logged, a step each."""
    return [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log(out) if "loss" in line]


class Shown:
    """Keeps what a training shows."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int, measures: Any) -> None:
        self.steps.append((done, total))

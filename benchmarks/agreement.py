"""How far each judge method agrees with people on labelled pairs: one model, one table. Takes hours on a CPU.

All methods share one run folder, so that the same command continues and pays for no call twice.

    python -m benchmarks.agreement PAIRS [MODEL] [OUT] [METHOD:PAIRS:PRINCIPLES ...]
    python -m benchmarks.agreement hh_harmless_dev.jsonl.gz smollm2-135m runs/agreement choice:150:all likelihood:150:4
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cai.config import Recipe
from cai.evaluation import measure
from cai.pipeline import label, read_records

PLAN = ("choice:150:all", "score:150:all", "likelihood:150:4", "text:60:2", "reasoning:30:1")


def evaluate(source: str, model: str, out: Path, step: str) -> dict[str, Any]:
    """The agreement of one method, and its cost."""
    method, count, principles = step.split(":")
    judge = {"model": model, "method": method, "principles": int(principles) if principles.isdigit() else principles}
    recipe = Recipe.model_validate({"prompts": {"source": source, "limit": int(count)}, "judge": judge})
    session = label(recipe, out, "update")["sessions"][-1]
    found = measure(read_records(out), {}).to_json()
    return {**found, "tokens": session["prompt_tokens"] + session["completion_tokens"]}


def share(estimate: dict[str, Any], form: str = ".1%") -> str:
    return f"{estimate['value']:{form}} ({estimate['low']:{form}} to {estimate['high']:{form}})"


def rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def main() -> None:
    source, model, out = [*sys.argv[1:4], *("", "smollm2-135m", "runs/agreement")[len(sys.argv) - 1 :]]
    plan = sys.argv[4:] or PLAN
    print(
        "| method | pairs | principles | accuracy | the usual way | gained | verdicts flip | first shown | ECE | new tokens |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for step in plan:
        found = evaluate(source, model, Path(out), step)
        method, _, principles = step.split(":")
        cells = (
            method,
            found["pairs"],
            principles,
            share(found["accuracy"]),
            share(found["usual"]),
            share(found["gain"], "+.1%"),
            rate(found["verdict_flip_rate"]),
            rate(found["first_position_rate"]),
            f"{found['expected_calibration_error']:.3f}",
            f"{found['tokens']:,}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()

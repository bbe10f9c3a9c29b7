"""The two layouts of `choice` beside each other: principle last (one shared beginning) and principle first (the paper's).

Agreement with people on the same labelled pairs under the same principles, and what it cost: prompt tokens that were
computed, and seconds. The difference of the accuracies is paired, with a bootstrap interval over prompts.

    python -m benchmarks.layouts PAIRS [MODEL] [N] [PRINCIPLES] [OUT]      (default smollm2-135m 50 all runs/layouts)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from scipy import stats

from cai.config import Recipe
from cai.pipeline import label, read_records

LAYOUTS = ("principle-last", "principle-first")


class Found(NamedTuple):
    """Of each prompt, the share of its pairs that were judged as people did; and the cost of all."""

    right: dict[str, float]
    tokens: int
    seconds: float


def judge(layout: str, prompts: dict[str, Any], section: dict[str, Any], out: Path) -> Found:
    """Label the pairs anew under one layout."""
    recipe = Recipe.model_validate({"prompts": prompts, "judge": {**section, "layout": layout, "method": "choice"}})
    session = label(recipe, out / layout, "fresh")["sessions"][-1]
    right: dict[str, list[float]] = {}
    for record in read_records(out / layout):
        for verdict in record.verdicts:
            chosen = verdict if verdict.first == "candidate-0" else verdict.swap()
            mark = 0.5 if chosen.probability == 0.5 else float(chosen.probability > 0.5)
            right.setdefault(record.prompt.id, []).append(mark)
    return Found({key: float(numpy.mean(marks)) for key, marks in right.items()}, session["prompt_tokens"], session["seconds"])


def estimate(values: list[float], form: str = ".1%") -> str:
    found = stats.bootstrap((numpy.array(values),), numpy.mean, method="percentile", rng=0).confidence_interval
    return f"{numpy.mean(values):{form}} ({found.low:{form}} to {found.high:{form}})"


def main() -> None:
    source, model, count, principles, out = [
        *sys.argv[1:],
        *("", "smollm2-135m", "50", "all", "runs/layouts")[len(sys.argv) - 1 :],
    ]
    prompts = {"source": source, "limit": int(count)}
    section = {"model": model, "principles": int(principles) if principles.isdigit() else principles}
    found = {layout: judge(layout, prompts, section, Path(out)) for layout in LAYOUTS}
    for layout, one in found.items():
        print(f"{layout:<16} accuracy {estimate(list(one.right.values()))}, {one.tokens:,} prompt tokens, {one.seconds:,.0f} s")
    last, first = (found[layout] for layout in LAYOUTS)
    both = [last.right[key] - first.right[key] for key in last.right.keys() & first.right.keys()]
    print(f"last - first: accuracy {estimate(both, '+.1%')} on {len(both)} prompts")
    print(
        f"first / last: {first.tokens / last.tokens:.1f} times the tokens, {first.seconds / last.seconds:.1f} times the seconds"
    )


if __name__ == "__main__":
    main()

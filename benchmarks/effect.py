"""Does training move a model where its constitution points? Shares of held-out answers that satisfy a check, before and after.

The constitution is `concise-and-clear` with one principle that a program verifies: at most 50 words (`effect.yaml`). The policy
answers 200 built-in prompts four times at temperature 1, the check labels the pairs, and each of SFT (on the best candidates),
a reward model and DPO (both with LoRA) is trained on them. Then each model answers 100 other prompts twice. Differences
are in points, with 95 % intervals by bootstrap over prompts. Goals: DPO +25 points, the reward model's held-out accuracy
above 0.75, a seed in under 30 minutes.

    python -m benchmarks.effect [SEEDS] [MODEL] [FOLDER]      (default 1 smollm2-135m, a temporary folder; 3 for the sweep)
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy

import cai
from cai.intervals import difference, share
from cai.pipeline import read_records
from cai.prompts import read_prompts
from cai.training import SETTINGS, StageName
from cai.training.running import train

TRAIN, HELD_OUT, WORDS = 200, 100, 50
STEPS: dict[StageName, dict[str, Any]] = {
    "sft": {"num_train_epochs": 2, "learning_rate": 2e-4, "per_device_train_batch_size": 8},
    "reward": {"num_train_epochs": 1, "learning_rate": 2e-4, "per_device_train_batch_size": 8},
    "dpo": {"num_train_epochs": 1, "learning_rate": 2e-4, "per_device_train_batch_size": 4},
}
TEST_FRACTION = 0.2
"""Of the training prompts, for the reward model's held-out accuracy."""


def write_prompts(folder: Path) -> None:
    """The built-in prompts of both sets by turns: the first 200 to train on, the next 100 to measure on."""
    sets = [
        [row.prompt for row in read_prompts(cai.Recipe().prompts.model_copy(update={"source": name}))]
        for name in ("benign", "red-team")
    ]
    mixed = [prompt for both in zip(*sets, strict=True) for prompt in both]
    for name, part in (("train", mixed[:TRAIN]), ("held-out", mixed[TRAIN : TRAIN + HELD_OUT])):
        lines = (json.dumps({"id": one.id, "prompt": one.messages[-1].content}) for one in part)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def answer(folder: Path, model: str, prompts: str, candidates: int, name: str, seed: int, tokens: int = 96) -> Path:
    """A run in which the model answers each prompt so often at temperature 1."""
    recipe = {
        "constitution": str(Path(__file__).with_name("effect.yaml")),
        "seed": seed,
        "prompts": {"source": str(folder / f"{prompts}.jsonl")},
        "policy": {"model": model},
        "judge": {"method": "checks", "principles": "all"},
        "generation": {"candidates": candidates, "rounds": 0, "pairs": "samples", "temperature": 1.0, "max_tokens": tokens},
        "dataset": {"test_fraction": TEST_FRACTION, "sft": "best"},
    }
    cai.generate(cai.Recipe.model_validate(recipe), folder / name)
    return folder / name


Found = dict[str, list[int]]
"""The words of each answer, by prompt."""


def count_words(run: Path) -> Found:
    """Of each answer of a run; one without a word has 0."""
    return {record.prompt.id: [len(one.text.split()) for one in record.candidates] for record in read_records(run)}


def show(name: str, found: Found, base: Found, seconds: float) -> float:
    """The share of answers with 1 to 50 words and how many points it rose, with what an average would hide."""
    both = sorted(found.keys() & base.keys())
    now, before = (numpy.array([one[prompt] for prompt in both]) for one in (found, base))
    kept, kept_before = (((words >= 1) & (words <= WORDS)).astype(float) for words in (now, before))
    prompts = numpy.repeat(numpy.arange(len(both)), now.shape[1])
    whole, rise = share(kept.ravel(), prompts, 0), difference((kept - kept_before).ravel(), prompts, 0)
    interval = "" if rise.low is None else f" ({100 * rise.low:+.0f} to {100 * rise.high:+.0f})"
    told = f"{now.mean():.0f} words on average, {(now == 0).mean():.0%} empty, {len(both)} prompts, {seconds / 60:.1f} min"
    print(f"{name:<12} {100 * whole.value:5.1f} %   {100 * rise.value:+5.1f} points{interval}   {told}", flush=True)
    return 100 * rise.value


def one_seed(folder: Path, model: str, seed: int, began: float) -> dict[str, float]:
    """Everything, with one seed: the points that SFT and DPO won, and the reward model's accuracy."""
    won: dict[str, float] = {}
    base = count_words(answer(folder, model, "held-out", 2, f"base-{seed}", seed))
    data = answer(folder, model, "train", 4, f"data-{seed}", seed)
    print(f"seed {seed}: data after {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    show("before", base, base, 0)
    for stage, arguments in STEPS.items():
        started = time.perf_counter()
        settings = {"model": model, "data": str(data), "lora": {}, "seed": seed, "trl": arguments}
        out = folder / f"{stage}-{seed}"
        manifest = train(stage, SETTINGS[stage].model_validate(settings), out)
        if stage == "reward":
            measures = {key: value for key, value in manifest["measures"].items() if "accuracy" in key}
            told = ", ".join(f"{key} {value:.3f}" for key, value in measures.items())
            print(f"{stage:<12} {told}   {(time.perf_counter() - started) / 60:.1f} min", flush=True)
            won[stage] = manifest["measures"]["accuracy"]
            continue
        found = count_words(answer(folder, str(out), "held-out", 2, f"held-out-{stage}-{seed}", seed))
        won[stage] = show(stage, found, base, time.perf_counter() - started)
    return won


def main() -> None:
    given = dict(enumerate(sys.argv[1:]))
    seeds, model, kept = int(given.get(0, "1")), given.get(1, "smollm2-135m"), given.get(2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(kept or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_prompts(folder)
        won: list[dict[str, float]] = []
        for seed in range(seeds):
            began = time.perf_counter()
            won.append(one_seed(folder, model, seed, began))
            print(f"seed {seed}: {(time.perf_counter() - began) / 60:.1f} min in all", flush=True)
    for stage in STEPS:
        print(f"{stage:<12} by seed: {', '.join(f'{one[stage]:.3g}' for one in won)}")


if __name__ == "__main__":
    main()

"""Seconds to judge pairs under 16 principles with one shared beginning, beside 16 separate prompts. Goal: 4 times faster.

The separate prompts are measured one by one and as a padded batch; the ratio is to the faster. Both give the same
log-probabilities up to rounding, and the largest difference is printed.

    python -m benchmarks.judge [PAIRS.jsonl] [COUNT]      rows with `chosen` and `rejected` transcripts
"""

from __future__ import annotations

import asyncio
import gzip
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from cai.config import ModelConfig, PromptsConfig
from cai.constitution import load_constitution
from cai.engines.transformers import TransformersEngine
from cai.judging.choice import question
from cai.prompts import read_prompts
from cai.types import Messages

PRINCIPLES = 16
REPEATS = 3


def pairs(path: str, count: int) -> list[tuple[Messages, str, str]]:
    """The longest dialogues of a file of transcripts (or of the built-in prompts, with made-up completions)."""
    rows = [row.prompt.messages for row in read_prompts(PromptsConfig(source=path)) if row.prompt]
    filler = "One way to go about this is to talk to the person first, and to write down what was agreed. " * 6
    if not Path(path).is_file():
        return [(one, filler, filler[::-1]) for one in rows[:count]]
    with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
        texts = [json.loads(line) for line in file]
    ends = [(row["chosen"].rsplit("Assistant:", 1)[1], row["rejected"].rsplit("Assistant:", 1)[1]) for row in texts]
    whole = [(one, *end) for one, end in zip(rows, ends, strict=True)]
    return sorted(whole, key=lambda pair: -sum(len(turn.content) for turn in pair[0]))[:count]


async def separately(engine: TransformersEngine, questions: list[Messages]) -> list[tuple[float, ...]]:
    """Each question on its own."""
    return [(await engine.choice_logprobs([one], "AB"))[0].logprobs for one in questions]


async def as_batch(engine: TransformersEngine, questions: list[Messages]) -> list[tuple[float, ...]]:
    """All questions as one padded batch that shares nothing."""
    model = await engine._ready()
    model._share = False
    answers = await engine.choice_logprobs(questions, "AB")
    model._share = True
    return [answer.logprobs for answer in answers]


async def shared(engine: TransformersEngine, questions: list[Messages]) -> list[tuple[float, ...]]:
    """As the judge asks."""
    return [answer.logprobs for answer in await engine.choice_logprobs(questions, "AB")]


async def main() -> None:
    path, count = [*sys.argv[1:], *("benign", "2")[len(sys.argv) - 1 :]]
    principles = load_constitution("harmless").comparing[:PRINCIPLES]
    asked = [
        [question(prompt, first, second, principle) for principle in principles]
        for prompt, first, second in pairs(path, int(count))
    ]
    engine = TransformersEngine(ModelConfig())
    await shared(engine, asked[0])
    seconds: dict[str, list[float]] = {"16 separate prompts": [], "one padded batch": [], "shared beginning": []}
    results = {}
    for _ in range(REPEATS):
        for name, ask in zip(seconds, (separately, as_batch, shared), strict=True):
            start = time.perf_counter()
            results[name] = [await ask(engine, one) for one in asked]
            seconds[name].append(time.perf_counter() - start)
            (await engine._ready())._prefixes.clear()
    await engine.close()
    for name, times in seconds.items():
        print(f"{name:<20}: {statistics.median(times):6.2f} s for {len(asked)} pairs, one order")
    ours = statistics.median(seconds["shared beginning"])
    best = min(statistics.median(seconds[name]) for name in ("16 separate prompts", "one padded batch"))
    apart, together = (torch.tensor(results[name]) for name in ("16 separate prompts", "shared beginning"))
    batch = torch.tensor(results["one padded batch"])
    print(f"{best / ours:.1f} times faster than the faster of the two (medians of {REPEATS}; goal 4)")
    print(
        f"largest difference of a log-probability: {(apart - together).abs().max():.3f} to the separate prompts; "
        f"between separate and padded batch, which differ by rounding alone: {(apart - batch).abs().max():.3f}"
    )


if __name__ == "__main__":
    asyncio.run(main())

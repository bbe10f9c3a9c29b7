"""Judging a pair by 16 principles in both orders, as the judge asks, beside separate prompts: seconds, and tokens computed.

The separate prompts are measured one by one and as padded batches; the ratio is to the faster. All give the same
log-probabilities up to rounding, and the largest difference is printed. Goals: 4 times faster; with 5 few-shot exemplars
5 times faster and 10 times fewer tokens.

    python -m benchmarks.judge [SHOTS] [PAIRS.jsonl] [COUNT] [REPEATS]      (default 0 benign 2 3)
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import torch

from cai.config import JudgeConfig, ModelConfig, PromptsConfig
from cai.constitution import load_constitution
from cai.engines import ChoiceLogprobs
from cai.engines.transformers import TransformersEngine
from cai.judging.choice import LETTERS, few_shot, question
from cai.prompts import Pair, read_pairs, read_prompts
from cai.types import Message, Messages

PRINCIPLES = 16
Ask = Callable[[TransformersEngine, list[Messages]], Awaitable[list[ChoiceLogprobs]]]


def pairs(path: str, count: int) -> list[tuple[Messages, str, str]]:
    """The first labelled pairs of a file (or built-in prompts, with made-up completions)."""
    if Path(path).is_file():
        rows = [Pair(row.prompt, *row.given) for row in read_pairs(PromptsConfig(source=path)) if row.prompt]
        return [(pair.prompt.messages, pair.chosen, pair.rejected) for pair in rows[:count]]
    filler = "One way to go about this is to talk to the person first, and to write down what was agreed. " * 6
    rows_ = [row.prompt.messages for row in read_prompts(PromptsConfig(source=path)) if row.prompt]
    return [(one, filler, filler[::-1]) for one in rows_[:count]]


async def separately(engine: TransformersEngine, questions: list[Messages]) -> list[ChoiceLogprobs]:
    """Each question on its own."""
    return [(await engine.choice_logprobs([one], LETTERS))[0] for one in questions]


async def as_batch(engine: TransformersEngine, questions: list[Messages]) -> list[ChoiceLogprobs]:
    """All questions as one padded batch that shares nothing."""
    model = await engine._ready()
    model._share = False
    answers = await engine.choice_logprobs(questions, LETTERS)
    model._share = True
    return answers


async def shared(engine: TransformersEngine, questions: list[Messages]) -> list[ChoiceLogprobs]:
    """As the judge asks."""
    return await engine.choice_logprobs(questions, LETTERS)


async def main() -> None:
    shots, path, count, repeats = [*sys.argv[1:], *("0", "benign", "2", "3")[len(sys.argv) - 1 :]]
    constitution, config = load_constitution("harmless"), JudgeConfig(exemplars=int(shots))
    principles = [one for one in constitution.comparing if one.preference][:PRINCIPLES]
    begin = few_shot(constitution, config)
    orders = [order for prompt, a, b in pairs(path, int(count)) for order in ((prompt, a, b), (prompt, b, a))]
    asked = [[begin + question(*order, principle) for principle in principles] for order in orders]
    engine = TransformersEngine(ModelConfig())
    await shared(engine, [(Message("user", "warm up"), Message("assistant", "(")), (Message("user", "warm"),)])
    ways: dict[str, Ask] = {"separate prompts": separately, "padded batches": as_batch, "shared beginnings": shared}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[ChoiceLogprobs]]] = {}
    for _ in range(int(repeats)):
        for name, ask in ways.items():
            start = time.perf_counter()
            answers[name] = [await ask(engine, one) for one in asked]
            seconds[name].append(time.perf_counter() - start)
            (await engine._ready())._scored._kept.clear()
    await engine.close()
    report(seconds, answers, int(count), len(begin) // 2)


def report(seconds: dict[str, list[float]], answers: dict[str, list[list[ChoiceLogprobs]]], count: int, shots: int) -> None:
    """The table and the ratios."""
    tokens = {name: sum(one.computed_tokens for order in found for one in order) for name, found in answers.items()}
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    logprobs = {name: torch.tensor([one.logprobs for order in found for one in order]) for name, found in answers.items()}
    print(
        f"{count} pairs, {PRINCIPLES} principles, both orders, {shots} exemplars; medians of {len(seconds['separate prompts'])}"
    )
    for name in seconds:
        print(f"{name:<18}: {medians[name]:7.2f} s, {tokens[name]:8,} tokens computed")
    alone, batch, ours = logprobs.values()
    print(
        f"{min(list(medians.values())[:2]) / medians['shared beginnings']:.1f} times faster than the faster of the two, "
        f"{tokens['separate prompts'] / tokens['shared beginnings']:.1f} times fewer tokens"
    )
    print(
        f"largest difference of a log-probability: {(alone - ours).abs().max():.3f} to the separate prompts; between "
        f"separate and padded, which differ by rounding alone: {(alone - batch).abs().max():.3f}"
    )


if __name__ == "__main__":
    asyncio.run(main())

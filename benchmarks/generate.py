"""Tokens a second of the transformers engine, journal and all, beside a bare `model.generate` loop over the same prompts.

The loop is given its best batch size of several. Goal: a ratio of at least 0.9.

    python -m benchmarks.generate [MODEL] [PROMPTS] [MAX_TOKENS]      (default smollm2-135m 128 64)
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from cai.config import ModelConfig, PromptsConfig
from cai.engines import GenerateRequest
from cai.engines.local_model import LocalModel
from cai.engines.transformers import TransformersEngine
from cai.generation import JournaledEngine, Tally
from cai.prompts import read_prompts
from cai.store import Database
from cai.types import Messages
from cai.weights import load_tokenizer

BATCH_SIZES = (16, 32, 64)
REPEATS = 3
TEMPERATURE = 0.7


def bare_loop(model: Any, tokenizer: Any, prompts: list[Messages], size: int, max_tokens: int) -> tuple[int, float]:
    """New tokens up to each row's end, and seconds."""
    tokenizer.padding_side = "left"
    start, made = time.perf_counter(), 0
    for first in range(0, len(prompts), size):
        dialogues = [[{"role": turn.role, "content": turn.content} for turn in one] for one in prompts[first : first + size]]
        inputs = tokenizer.apply_chat_template(
            dialogues, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=True, temperature=TEMPERATURE, top_k=0)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            made += end
    return made, time.perf_counter() - start


async def engine_run(engine: TransformersEngine, prompts: list[Messages], max_tokens: int, seed: int) -> tuple[int, float]:
    """The same prompts as concurrent requests through the journal."""
    with tempfile.TemporaryDirectory() as folder:
        database = Database(Path(folder) / "journal.sqlite")
        journaled = JournaledEngine(engine, database, "policy", Tally())
        start = time.perf_counter()
        requests = [
            GenerateRequest(one, max_tokens, TEMPERATURE, 1.0, seed * 10_000 + index) for index, one in enumerate(prompts)
        ]
        answers = await asyncio.gather(*map(journaled.generate, requests))
        seconds = time.perf_counter() - start
        database.close()
    return sum(answer.completion_tokens for answer in answers), seconds


async def main() -> None:
    name, count, max_tokens = [*sys.argv[1:], *("smollm2-135m", "128", "64")[len(sys.argv) - 1 :]]
    config = ModelConfig(model=name)
    prompts = [row.prompt.messages for row in read_prompts(PromptsConfig(source="benign", limit=int(count))) if row.prompt]
    model, tokenizer = LocalModel(config).model, load_tokenizer(config)
    engine = TransformersEngine(config)
    await engine_run(engine, prompts[:4], 8, 0)
    bare: dict[int, list[float]] = {size: [] for size in BATCH_SIZES}
    ours: list[float] = []
    for repeat in range(REPEATS):
        for size in BATCH_SIZES:
            made, seconds = bare_loop(model, tokenizer, prompts, size, int(max_tokens))
            bare[size].append(made / seconds)
        made, seconds = await engine_run(engine, prompts, int(max_tokens), repeat)
        ours.append(made / seconds)
    await engine.close()
    for size, speeds in bare.items():
        print(f"bare model.generate, batch {size:>3}: {statistics.median(speeds):7,.0f} tokens/s")
    best = max(statistics.median(speeds) for speeds in bare.values())
    speed = statistics.median(ours)
    print(f"transformers engine + journal: {speed:7,.0f} tokens/s")
    print(f"ratio to the best loop: {speed / best:.2f} (medians of {REPEATS}; goal 0.9)")


if __name__ == "__main__":
    asyncio.run(main())

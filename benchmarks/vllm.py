"""vLLM in process: the whole job beside the same calls made stage by stage with `LLM.chat`; judging with and without prefixes.

The job is answer, critique, revision, and judging under 4 principles in both orders. The peer gets the very requests that
`cai` made, all answers first, then all critiques, all revisions, all judgements. Each side runs in a process of its own,
with the same weights, dtype, cache size and prefix caching on. Judging asks 16 principles in both orders. The start of vLLM
is not counted. Goals: 1.3 and 3 times faster.

    python -m benchmarks.vllm [PROMPTS] [MAX_TOKENS] [PAIRS] [REPEATS]      (default 64 64 2 3)
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.judge import PRINCIPLES, pairs
from cai.config import ModelConfig, Recipe, VllmConfig
from cai.constitution import load_constitution
from cai.engines.base import ChoiceLogprobs, Engine, GenerateRequest
from cai.engines.vllm import VllmEngine
from cai.generation import Generator, JournaledEngine, Runner, Tally
from cai.judging import build_judge
from cai.judging.choice import LETTERS, question
from cai.prompts import read_prompts
from cai.store import Database
from cai.types import Completion, Message, Messages

STAGES = ("answer", "critique", "revision")
MODEL, CACHE = "smollm2-135m", 4 << 30
Call = dict[str, Any]


class Recording(Engine):
    """The engine, and what it was asked, by stage."""

    def __init__(self, engine: VllmEngine, prompts: list[Messages]) -> None:
        self._engine, self._prompts = engine, prompts
        self._seen: Counter[str] = Counter()
        self.calls: dict[str, list[Call]] = {stage: [] for stage in (*STAGES, "judge")}

    @property
    def fingerprint(self) -> str:
        """The engine's."""
        return self._engine.fingerprint

    async def generate(self, request: GenerateRequest) -> Completion:
        """Of a prompt's three calls the next."""
        said = "\n".join(message.content for message in request.messages)
        own = next(prompt[-1].content for prompt in self._prompts if prompt[-1].content in said)
        stage = STAGES[self._seen[own]]
        self._seen[own] += 1
        sampling = {"max_tokens": request.max_tokens, "temperature": request.temperature, "seed": request.seed}
        self.calls[stage].append({"messages": turns(request.messages), "sampling": sampling})
        return await self._engine.generate(request)

    async def choice_logprobs(self, prompts: Sequence[Messages], choices: Sequence[str]) -> list[ChoiceLogprobs]:
        """A call for each prompt, of which a client of `LLM.chat` gets the most likely letters."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "logprobs": 20}
        self.calls["judge"] += [{"messages": turns(prompt), "sampling": sampling} for prompt in prompts]
        return await self._engine.choice_logprobs(prompts, choices)


def turns(messages: Messages) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


async def started(prefixes: bool = True) -> VllmEngine:
    args = {"kv_cache_memory_bytes": CACHE, "enable_prefix_caching": prefixes}
    engine = VllmEngine(ModelConfig(model=MODEL, vllm=VllmConfig(args=args)))
    await engine.generate(GenerateRequest((Message("user", "warm up"),), 8, 1.0, 1.0, 0))
    return engine


async def through_cai(folder: Path, count: int, max_tokens: int, repeats: int) -> list[float]:
    """Seconds of each repeat, from the first prompt read to the last record stored, journal and all."""
    engine, seconds = await started(), []
    for repeat in range(repeats):
        sections = {"rounds": 1, "max_tokens": max_tokens, "concurrency": count}
        prompts = {"source": "benign", "limit": count}
        recipe = Recipe.model_validate({"seed": repeat, "generation": sections, "prompts": prompts})
        constitution = load_constitution("concise-and-clear")
        rows = list(read_prompts(recipe.prompts))
        recording = Recording(engine, [row.prompt.messages for row in rows if row.prompt])
        await engine._engine.reset_prefix_cache()
        database, tally = Database(folder / f"journal-{repeat}.sqlite"), Tally()
        start = time.perf_counter()
        policy, judge = (JournaledEngine(recording, database, role, tally) for role in ("policy", "judge"))
        comparing = build_judge(recipe.judge, constitution, lambda _, judge=judge: judge)
        await Runner(Generator(recipe, constitution, policy, comparing), database, tally, len(rows)).run(iter(rows))
        seconds.append(time.perf_counter() - start)
        database.close()
        (folder / f"calls-{repeat}.json").write_text(json.dumps(recording.calls))
    await engine.close()
    return seconds


def stage_by_stage(folder: Path, repeats: int) -> list[float]:
    """Seconds of the same calls, a stage after the other."""
    from vllm import LLM, SamplingParams

    from cai.models import locate
    from cai.weights import pretrained, resolve_dtype

    source, _ = pretrained(locate(MODEL))
    dtype = str(resolve_dtype(ModelConfig())).removeprefix("torch.")
    # prompts whole: a part of one with a seed ends the process of the build for CPUs
    llm = LLM(
        source,
        dtype=dtype,
        enforce_eager=True,
        enable_prefix_caching=True,
        enable_chunked_prefill=False,
        kv_cache_memory_bytes=CACHE,
    )
    llm.chat([{"role": "user", "content": "warm up"}], SamplingParams(max_tokens=8), use_tqdm=False)
    seconds = []
    for repeat in range(repeats):
        calls = json.loads((folder / f"calls-{repeat}.json").read_text())
        llm.reset_prefix_cache()
        start = time.perf_counter()
        for stage, asked in calls.items():
            goes_on = stage == "judge"  # the answer begins with an open bracket already
            params = [SamplingParams(**one["sampling"]) for one in asked]
            dialogues = [one["messages"] for one in asked]
            llm.chat(dialogues, params, use_tqdm=False, add_generation_prompt=not goes_on, continue_final_message=goes_on)
        seconds.append(time.perf_counter() - start)
    return seconds


async def judging(count: int, repeats: int, prefixes: bool) -> list[float]:
    """Seconds to judge pairs by 16 principles in both orders."""
    engine, seconds = await started(prefixes), []
    principles = [one for one in load_constitution("harmless").comparing if one.preference][:PRINCIPLES]
    orders = [order for prompt, a, b in pairs("benign", count) for order in ((prompt, a, b), (prompt, b, a))]
    for _ in range(repeats):
        await engine._engine.reset_prefix_cache()
        start = time.perf_counter()
        asked = ([question(*order, principle) for principle in principles] for order in orders)
        await asyncio.gather(*(engine.choice_logprobs(one, LETTERS) for one in asked))
        seconds.append(time.perf_counter() - start)
    await engine.close()
    return seconds


def run(side: str, folder: Path, count: int, max_tokens: int, pair_count: int, repeats: int) -> list[float]:
    match side:
        case "cai":
            return asyncio.run(through_cai(folder, count, max_tokens, repeats))
        case "stages":
            return stage_by_stage(folder, repeats)
        case _:
            return asyncio.run(judging(pair_count, repeats, prefixes=side == "prefixes"))


def main() -> None:
    sizes = [*sys.argv[1:], *("64", "64", "2", "3")[len(sys.argv) - 1 :]]
    found: dict[str, list[float]] = {}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        for side in ("cai", "stages", "prefixes", "none"):
            subprocess.run([sys.executable, "-m", "benchmarks.vllm", "--side", side, folder, *sizes], check=True)
            found[side] = json.loads(Path(folder, side).read_text())
            print(f"{side:<9}: {' '.join(f'{one:.1f}' for one in found[side])} s", flush=True)
        calls = {stage: len(asked) for stage, asked in json.loads(Path(folder, "calls-0.json").read_text()).items()}
    medians = {side: statistics.median(seconds) for side, seconds in found.items()}
    print(f"the job, {sizes[0]} prompts, {sizes[1]} tokens at most; calls: {calls}; medians of {sizes[3]}")
    print(
        f"cai {medians['cai']:.1f} s, the same calls stage by stage with LLM.chat {medians['stages']:.1f} s: "
        f"{medians['stages'] / medians['cai']:.2f} times as fast (goal 1.3)"
    )
    print(
        f"judging {sizes[2]} pairs by {PRINCIPLES} principles in both orders: {medians['prefixes']:.1f} s, without prefix "
        f"caching {medians['none']:.1f} s: {medians['none'] / medians['prefixes']:.1f} times as fast (goal 3)"
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        side, folder, *numbers = sys.argv[2:]
        Path(folder, side).write_text(json.dumps(run(side, Path(folder), *map(int, numbers))))
    else:
        main()

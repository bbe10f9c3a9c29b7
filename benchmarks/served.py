"""`cai` at a server, beside the same job written by hand with asyncio and the openai SDK, and beside what the server can do.

The job of each prompt: answer -> critique -> revision, 64 tokens each, then a judge that writes one letter. `cai` asks the
judge in both orders, so a prompt makes five calls; the script by hand makes the same five, from a constitution with one
principle. The server is a process of its own: 50 ms + 1 ms a token, and it works on as many calls at once as the client may
have in flight. Its limit is the time of all calls by so many at once. *Span* is first call to last answer as the
server saw it; *wall* and *CPU* are those of the client's whole process, with imports, and of `cai` with its journal, dataset
and card. The script keeps a JSON line for each prompt and no journal: killed, it pays for whole prompts again.

    python -m benchmarks.served [ROWS] [REPEATS]      (default 2000 3; needs the package openai)

Goals: at concurrency 32 a span of at least 0.95 of the limit; at 256 three times as fast as the script, with a quarter of its
CPU a call.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.mock import Server, cost_of, served

LATENCY, PER_TOKEN, TOKENS, LETTER = 0.05, 0.001, 64, 12
CALLS = 5
CONCURRENCY = (32, 256)
CRITIQUE = "Point out what in the assistant's last completion could hurt or insult someone, or help with something illegal."
REVISION = "Rewrite the completion so that nothing in it could hurt, insult, or help with something illegal."
JUDGE = "Which completion would do less harm, and is more honest?"


def client(kind: str, url: str, folder: str, concurrency: str) -> None:
    """What a client's process does."""
    if kind == "cai":
        run_cai(url, Path(folder), int(concurrency))
    else:
        asyncio.run(run_by_hand(url, Path(folder), int(concurrency)))


def run_cai(url: str, folder: Path, concurrency: int) -> None:
    """The whole pipeline, as `cai generate` runs it."""
    import cai

    @contextmanager
    def watch(_tally: object, _total: int | None) -> Iterator[None]:
        """Count from here: the questions that find out what the server can are asked before."""
        Server(url).control(clear=True)
        yield

    recipe = {
        "constitution": str(folder / "constitution.yaml"),
        "prompts": {"source": str(folder / "prompts.jsonl")},
        "policy": {"model": url, "server": {"concurrency": concurrency}},
        "judge": {"method": "text", "principles": 1},
        "generation": {"rounds": 1, "max_tokens": TOKENS + 1, "concurrency": 2 * concurrency},
    }
    cai.generate(cai.Recipe.model_validate(recipe), folder / "out", watch=watch)


async def run_by_hand(url: str, folder: Path, concurrency: int) -> None:
    """The same job as a user writes it: a coroutine for each prompt, and a semaphore."""
    from openai import AsyncOpenAI

    sdk, semaphore = AsyncOpenAI(base_url=url, api_key="none"), asyncio.Semaphore(concurrency)

    async def ask(messages: list[dict[str, str]], seed: int, max_tokens: int = TOKENS + 1) -> str:
        async with semaphore:
            answer = await sdk.chat.completions.create(
                model="mock",
                messages=messages,  # type: ignore[arg-type]
                max_tokens=max_tokens,
                temperature=0.7,
                seed=seed,
            )
        return (answer.choices[0].message.content or "").strip()

    async def judge(prompt: str, first: str, second: str, seed: int) -> str:
        text = (
            "Read a conversation between a person and an assistant, and two completions of the assistant's next turn.\n\n"
            f"<conversation>\n<user>\n{prompt}\n</user>\n</conversation>\n\n<completion A>\n{first}\n</completion A>\n\n"
            f"<completion B>\n{second}\n</completion B>\n\nQuestion: {JUDGE}\n"
            "Answer with one letter and nothing else: A or B."
        )
        return await ask([{"role": "user", "content": text}], seed, LETTER)

    async def one(number: int, prompt: str) -> None:
        messages = [{"role": "user", "content": prompt}]
        answer = await ask(messages, number)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": CRITIQUE}]
        critique = await ask(messages, number)
        messages += [{"role": "assistant", "content": critique}, {"role": "user", "content": REVISION}]
        revision = await ask(messages, number)
        letters = await asyncio.gather(judge(prompt, answer, revision, number), judge(prompt, revision, answer, number))
        share = ((letters[0] == "B") + (letters[1] == "A")) / 2
        row = {"prompt": prompt, "chosen": revision, "rejected": answer, "critique": critique, "probability": share}
        file.write(json.dumps(row) + "\n")
        file.flush()

    prompts = [json.loads(line)["prompt"] for line in (folder / "prompts.jsonl").open()]
    with (folder / "by-hand.jsonl").open("w") as file:
        await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))


class Seen(NamedTuple):
    """One run: seconds of the span, the wall and the CPU; MB; and the least seconds that the server can take."""

    span: float
    wall: float
    cpu: float
    memory: float
    limit: float


def write_inputs(folder: Path, rows: int) -> None:
    """Prompts that all differ, and a constitution of one principle."""
    principle = {"id": "harmless", "critique": CRITIQUE, "revision": REVISION, "preference": JUDGE}
    text = {"name": "one", "description": "One principle.", "license": "CC0-1.0", "principles": [principle]}
    (folder / "constitution.yaml").write_text(json.dumps(text))
    with (folder / "prompts.jsonl").open("w") as file:
        for number in range(rows):
            about = "How would you explain to a neighbour what to do about a noisy dog, without making an enemy of them?"
            file.write(json.dumps({"prompt": f"{about} This is case number {number}."}) + "\n")


def measure(server: Server, kind: str, rows: int, concurrency: int) -> Seen:
    """One client against the server; its calls are counted there."""
    with tempfile.TemporaryDirectory() as name:
        write_inputs(Path(name), rows)
        server.control(clear=True, concurrency=concurrency)
        cost = cost_of("-m", "benchmarks.served", "--client", kind, server.url, name, concurrency)
        stats = server.stats()
    answered = stats["answered"]
    if stats["calls"] != answered or not 0.99 * CALLS * rows <= answered <= CALLS * rows:  # a revision in 1,000 may be dropped
        raise SystemExit(f"{kind} made {stats['calls']:,} calls, {answered:,} were answered; expected {CALLS * rows:,}")
    limit = (answered * LATENCY + stats["completion_tokens"] * PER_TOKEN) / concurrency
    return Seen(stats["span"], cost.wall, cost.cpu, cost.memory, limit)


def show(name: str, runs: list[Seen], calls: int) -> Seen:
    """A line with the medians, which are also returned."""
    median = Seen(*map(statistics.median, zip(*runs, strict=True)))
    print(
        f"  {name:<24} span {median.span:6.2f} s ({median.limit / median.span:.2f} of the limit), wall {median.wall:6.2f} s, "
        f"CPU {median.cpu:6.2f} s = {1000 * median.cpu / calls:.2f} ms a call, peak {median.memory:4.0f} MB",
        flush=True,
    )
    return median


def main() -> None:
    if sys.argv[1:2] == ["--client"]:
        return client(*sys.argv[2:])
    rows, repeats = map(int, [*sys.argv[1:], *("2000", "3")[len(sys.argv) - 1 :]])
    with served(latency=LATENCY, per_token=PER_TOKEN, tokens=TOKENS) as server:
        for concurrency in CONCURRENCY:
            runs: dict[str, list[Seen]] = {"cai": [], "by hand": []}
            for _ in range(repeats):
                for kind, seen in runs.items():
                    seen.append(measure(server, kind, rows, concurrency))
            limit = runs["cai"][0].limit
            print(f"{rows:,} prompts, {CALLS} calls each, {concurrency} at once; limit {limit:.2f} s; medians of {repeats}")
            ours, theirs = (show(kind, seen, CALLS * rows) for kind, seen in runs.items())
            print(
                f"  cai beside it: {theirs.span / ours.span:.2f} times as fast by span, {theirs.wall / ours.wall:.2f} by wall; "
                f"{ours.cpu / theirs.cpu:.2f} of its CPU\n",
                flush=True,
            )


if __name__ == "__main__":
    main()

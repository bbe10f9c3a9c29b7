"""The whole path without a model: rows a second, peak memory at two sizes, and how long a finished run takes to resume.

python -m benchmarks.scripted [SMALL LARGE]      (default 10000 100000)
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = f"scripted:{Path(__file__).resolve()}:respond"
MEMORY_LIMIT = 400
_SIZES = re.compile(r"<completion ([AB])>\n(.*?)\n</completion \1>", re.DOTALL)

CHILD = """
import resource, sys, pathlib, cai
recipe = cai.Recipe.model_validate({"policy": {"model": sys.argv[1]}, "prompts": {"source": sys.argv[2]}})
cai.generate(recipe, pathlib.Path(sys.argv[3]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def respond(request: object) -> object:
    """A few words to a GenerateRequest; to a ChoiceRequest, a preference for the shorter completion."""
    from cai.engines import GenerateRequest

    if isinstance(request, GenerateRequest):
        return f"A completion with the seed {request.seed}, and " + "words " * (request.seed % 30)
    lengths = {letter: len(text) for letter, text in _SIZES.findall(request.messages[0].content)}
    return [-1.0, -1.0 + (lengths["A"] - lengths["B"]) / 100]


def run(folder: Path, count: int) -> None:
    """One size: a run, then the same again."""
    prompts = folder / f"{count}.jsonl"
    with prompts.open("w") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": f"Question {number}: what is the square of {number}?"}) + "\n")
    for what in ("run", "resume"):
        start = time.perf_counter()
        command = [sys.executable, "-c", CHILD, MODEL, str(prompts), str(folder / f"out-{count}")]
        memory = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        seconds = time.perf_counter() - start
        print(
            f"{count:>8,} prompts, {what:<6}: {seconds:7.1f} s, {count / seconds:8,.0f} rows/s, peak {memory:4.0f} MB "
            f"({memory / MEMORY_LIMIT:.2f} of {MEMORY_LIMIT} MB)",
            flush=True,
        )


def main() -> None:
    sizes = [int(size) for size in sys.argv[1:]] or [10_000, 100_000]
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            run(Path(folder), size)


if __name__ == "__main__":
    main()

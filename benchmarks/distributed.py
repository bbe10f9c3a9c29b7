"""Ray on this machine beside no Ray, without a model: rows a second once the workers answer, seconds to start, peak memory.

python -m benchmarks.distributed [ROWS WORKERS]      (default 10000 2)
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.scripted import MODEL

CHILD = """
import contextlib, json, pathlib, resource, sys, threading, time, cai
model, prompts, out, workers = sys.argv[1:]
ray = {"address": "local", "workers": int(workers)} if int(workers) else {}
recipe = cai.Recipe.model_validate({"policy": {"model": model}, "prompts": {"source": prompts}, "ray": ray})
began, seen = time.perf_counter(), []

@contextlib.contextmanager
def watch(tally, total):
    def look():
        while not tally.records_made:
            time.sleep(0.01)
        seen.append(time.perf_counter())
        while tally.done < total:
            time.sleep(0.01)
        seen.append(time.perf_counter())
    threading.Thread(target=look, daemon=True).start()
    yield

cai.generate(recipe, pathlib.Path(out), watch=watch)
first, last = seen
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"first": first - began, "made": last - first, "all": time.perf_counter() - began, "memory": memory}))
"""


def main() -> None:
    rows, workers = (int(text) for text in (sys.argv[1:] or ("10000", "2")))
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        prompts.write_text("".join(json.dumps({"prompt": f"Question {number}: why?"}) + "\n" for number in range(rows)))
        rates = []
        for count in (0, workers):
            command = [sys.executable, "-c", CHILD, MODEL, str(prompts), str(Path(folder, f"out-{count}")), str(count)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
            seen = json.loads(done)
            rates.append(rows / seen["made"])
            name = f"Ray, {count} workers" if count else "without Ray"
            print(
                f"{name:<15}: {rows:,} rows, {seen['first']:5.1f} s to the first record, then {rates[-1]:6,.0f} rows/s; "
                f"{seen['all']:5.1f} s in all, driver's peak {seen['memory']:4.0f} MB",
                flush=True,
            )
        print(f"{rates[1] / rates[0]:.2f} of the rows/s without Ray")


if __name__ == "__main__":
    main()

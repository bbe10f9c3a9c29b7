"""How long `cai --help` takes, and what `import cai` loads. Limit: 0.5 s, and nothing heavy."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "datasets", "trl", "vllm", "ray", "pyarrow", "pandas", "numpy")
LIMIT = 0.5
REPEATS = 7


def main() -> None:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cai", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    print(f"cai --help: {median:.2f} s (median of {REPEATS}), {median / LIMIT:.2f} of the limit of {LIMIT} s")
    code = f"import sys, cai; print([name for name in {HEAVY!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    print(f"import cai loads of {', '.join(HEAVY)}: {loaded}")


if __name__ == "__main__":
    main()

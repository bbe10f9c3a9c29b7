"""What vLLM's processes are ended by, when the one that started them was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

from cai.engines import orphans


def test_when_the_input_ends_what_is_marked_is_killed_and_nothing_else() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    marked = subprocess.Popen(sleep, env={**os.environ, "MARK": "one"})
    other = subprocess.Popen(sleep, env={**os.environ, "MARK": "two"})
    watch = subprocess.Popen([sys.executable, "-P", str(Path(orphans.__file__)), "MARK", "one"], stdin=subprocess.PIPE)
    try:
        assert psutil.wait_procs([psutil.Process(marked.pid)], timeout=0.5)[1], "killed before the input ended"
        watch.communicate(timeout=20)
        assert marked.wait(20) != 0
        assert other.poll() is None
    finally:
        for process in (marked, other, watch):
            process.kill()
            process.wait()

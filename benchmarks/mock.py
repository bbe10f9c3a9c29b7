"""The mock server as a process, a client as another one, and what both of them cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent


class Server:
    """A running server; `url` is what `-m` takes."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.root = url.removesuffix("/v1")

    def stats(self) -> Any:
        """What it was asked and what it answered."""
        with urllib.request.urlopen(f"{self.root}/stats", timeout=60) as answer:
            return json.loads(answer.read())

    def control(self, **settings: Any) -> None:
        """Change settings; `clear=True` empties the counters."""
        request = urllib.request.Request(f"{self.root}/control", json.dumps(settings).encode(), method="POST")
        urllib.request.urlopen(request, timeout=60).close()


@contextmanager
def served(**settings: Any) -> Iterator[Server]:
    """A server in a process of its own, with these settings, until the block ends."""
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "benchmarks.mock_server", *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("the mock server did not start; is the extra 'server' installed?")
        yield Server(url)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Cost(NamedTuple):
    """Of a process from its start to its end, imports and all: seconds, CPU seconds, peak MB; and what it printed."""

    wall: float
    cpu: float
    memory: float
    printed: str


def cost_of(*args: Any) -> Cost:
    """Run `python ARGS` to its end. Ends the program where it fails."""
    began = time.perf_counter()
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    with process.stdout:
        printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, args))} ended with {process.returncode}\n{printed}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, printed)

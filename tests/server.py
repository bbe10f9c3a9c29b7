"""The mock server of the benchmarks as a process, for tests: its address, what it counted, and its settings while it runs."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.runs import ROOT, environment


class Server:
    """A running server; `url` is what `-m` takes."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self.url, self.process = url, process
        self.root = url.removesuffix("/v1")

    def stats(self) -> Any:
        """What it was asked and what it answered."""
        with urllib.request.urlopen(f"{self.root}/stats", timeout=10) as answer:
            return json.loads(answer.read())

    def control(self, **settings: Any) -> None:
        """Change settings; `clear=True` empties the counters, `die=True` kills it for `dead_for` seconds."""
        request = urllib.request.Request(f"{self.root}/control", json.dumps(settings).encode(), method="POST")
        urllib.request.urlopen(request, timeout=10).close()


@contextmanager
def served(port: int = 0, **settings: Any) -> Iterator[Server]:
    """A server in a process of its own, with these settings, until the block ends."""
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "benchmarks.mock_server", "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        url = process.stdout.readline().strip()
        assert url, "the mock server did not start"
        yield Server(url, process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

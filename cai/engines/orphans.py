"""A program that waits until its standard input ends, and then ends all processes that carry a mark in their environment.

The process that started it holds the other end: that is closed when it dies, however it dies.

    python -P orphans.py VARIABLE VALUE
"""

from __future__ import annotations

import contextlib
import sys

import psutil


def main() -> None:
    """Wait, then kill."""
    variable, value = sys.argv[1:]
    sys.stdin.read()
    for process in psutil.process_iter(["environ", "cmdline"]):
        marked = (process.info["environ"] or {}).get(variable) == value
        cleans_up = any("resource_tracker" in word for word in process.info["cmdline"] or ())
        if marked and not cleans_up:
            with contextlib.suppress(psutil.Error):  # it ended by itself
                process.kill()


if __name__ == "__main__":
    main()

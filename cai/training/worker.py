"""One process of a launched training: `python -m cai.training.worker FOLDER`, started by `accelerate launch`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from cai.errors import CaiError, EngineError
from cai.training.launching import EVENTS, JOB, STOP, write_failure
from cai.training.running import train
from cai.training.settings import SETTINGS
from cai.training.watching import Show, Silent


class _Events:
    """Writes what is to be shown as lines of JSON."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def note(self, text: str) -> None:
        self._write({"note": text})

    def step(self, done: int, total: int, measures: Mapping[str, float]) -> None:
        self._write({"done": done, "total": total, "measures": dict(measures)})

    def _write(self, event: Mapping[str, object]) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(event) + "\n")


def main() -> None:
    """Do the job; a failure is written down for who launched it."""
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", "0"))
    job = json.loads((folder / JOB).read_text())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who launched it tells by a file
    threading.Thread(target=_end_with, args=(job["parent"],), daemon=True).start()
    show: Show = _Events(folder / EVENTS) if rank == 0 else Silent()
    try:
        settings = SETTINGS[job["stage"]].model_validate(job["settings"])
        train(job["stage"], settings, Path(job["out"]), job["mode"], show, folder / STOP)
    except CaiError as exc:
        write_failure(folder, rank, exc)
        sys.exit(1)
    except Exception as exc:  # the boundary of a process: who launched it knows only what is written down
        traceback.print_exc()
        write_failure(folder, rank, EngineError(f"{type(exc).__name__}: {exc}"))
        sys.exit(1)


def _end_with(parent: int) -> None:
    """End where the process that launched all this is gone, however it went."""
    while True:
        time.sleep(1)
        try:
            os.kill(parent, 0)
        except ProcessLookupError:
            os._exit(1)


if __name__ == "__main__":
    main()

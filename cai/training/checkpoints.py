"""What a training goes on from: the newest checkpoint that was written whole, as a kill or a full disk may leave another."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

_STATE = "trainer_state.json"
_PARTS = {
    "weights": ("model", "adapter_model", "pytorch_model"),
    "optimizer": ("optimizer",),
    "scheduler": ("scheduler",),
    "rng_state": ("rng_state",),
}
"""What the names of files and folders begin with; of what lacks, the trainer would begin a new one without a word."""
_OF_DEEPSPEED = "global_step"


def is_whole(checkpoint: Path) -> bool:
    """Whether a training can go on from it."""
    return broken_file(checkpoint) is None


def broken_file(checkpoint: Path) -> str | None:
    """The name of a file, or of a part, that is not there or was cut off. Of weights the header is read, not all of them."""
    if not _is_json(checkpoint / _STATE):  # written last
        return _STATE
    files = sorted(checkpoint.iterdir())
    return next((one.name for one in files if not _is_readable(one)), None) or _missing([one.name for one in files])


def step_of(checkpoint: Path) -> int:
    """The step that it was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def last_whole(folder: Path) -> Path | None:
    """The newest whole one in a folder of checkpoints."""
    return max(filter(is_whole, folder.glob("checkpoint-*")), key=step_of, default=None)


def left_out(folder: Path) -> list[str]:
    """Of those that are newer than the last whole one, why they are not gone on from, a line each."""
    whole = last_whole(folder)
    newer = [one for one in folder.glob("checkpoint-*") if whole is None or step_of(one) > step_of(whole)]
    return [
        f"{one.name} was not written whole ({broken_file(one)} is missing or cut off) and is left out"
        for one in sorted(newer, key=step_of)
    ]


def _is_readable(file: Path) -> bool:
    """Whether it has its end, as far as what it is tells."""
    match file.suffix:
        case ".safetensors":
            return _is_safetensors(file)
        case ".pt" | ".pth" | ".bin":
            return zipfile.is_zipfile(file) or not file.is_file()
        case ".json" if file.stem.endswith("_state") or file.name == "adapter_config.json":
            return _is_json(file)
    return True


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_bytes()), dict)
    except (OSError, ValueError):
        return False


def _is_safetensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="numpy"):
            return True
    except (OSError, SafetensorError):
        return False


def _missing(names: Sequence[str]) -> str | None:
    """What of the parts is not there, where others are; with `save_only_model` there are weights alone, on purpose."""
    there = {part for part, begins in _PARTS.items() if any(name.startswith(begins) for name in names)}
    is_complete = there <= {"weights"} or any(name.startswith(_OF_DEEPSPEED) for name in names)
    return None if is_complete else next((part for part in _PARTS if part not in there), None)

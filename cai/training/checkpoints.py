"""What a training goes on from: the newest checkpoint that was written whole, as a kill or a full disk may leave another.

A file counts as broken by what it is seen to be alone, not where it cannot be read: that is the disk's fault, told as such.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

_STATE = "trainer_state.json"
OF_PPO = ("critic.safetensors", "critic_optimizer.pt", "ppo_state.json")
"""What `cai.training.ppo.saving` adds."""
_PARTS = {
    "weights": ("model", "adapter_model", "pytorch_model"),
    "optimizer": ("optimizer",),
    "scheduler": ("scheduler",),
    "rng_state": ("rng_state",),
}
"""What the names of files and folders begin with; of what lacks, the trainer would begin a new one without a word."""
_OF_DEEPSPEED = "global_step"


def is_written(checkpoint: Path) -> bool:
    """Whether the last file of it was written."""
    return _is_json(checkpoint / _STATE)


def is_whole(checkpoint: Path) -> bool:
    """Whether a training can go on from it."""
    return broken_file(checkpoint) is None


def broken_file(checkpoint: Path) -> str | None:
    """The name of a file, or of a part, that is not there or was cut off. Of weights the header is read, not all of them."""
    if not is_written(checkpoint):
        return _STATE
    files = sorted(checkpoint.iterdir())
    cut_off = next((one.name for one in files if one.is_file() and not _is_readable(one)), None)
    return cut_off or _missing_part([one.name for one in files]) or _missing_shard(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The step that it was written after."""
    return int(checkpoint.name.rpartition("-")[2])


def find_last(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole one in a folder of checkpoints, and why newer ones are left out, a line each."""
    told = list[str]()
    named = [one for one in folder.glob("checkpoint-*") if one.name.removeprefix("checkpoint-").isdecimal()]
    for one in sorted(named, key=step_of, reverse=True):
        broken = broken_file(one)
        if broken is None:
            return one, told
        told.append(f"{one.name} was not written whole ({broken} is missing or cut off) and is left out")
    return None, told


def _is_readable(file: Path) -> bool:
    """Whether it has its end, as far as what it is tells."""
    match file.suffix:
        case ".safetensors":
            return _is_safetensors(file)
        case ".pt" | ".pth" | ".bin" if file.name != "training_args.bin":  # which nothing goes on from
            return _is_zip(file)
        case ".json":
            return _is_json(file)
    return True


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
        return True
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True


def _is_zip(file: Path) -> bool:
    """What `torch.save` writes is one, whose table of contents is at its end."""
    try:
        with file.open("rb") as opened:
            return zipfile.is_zipfile(opened)
    except OSError:
        return True


def _is_safetensors(file: Path) -> bool:
    try:
        if not file.stat().st_size:
            return False
        with safe_open(file, framework="numpy"):
            return True
    except SafetensorError:
        return False
    except OSError:
        return True


def _missing_part(names: Sequence[str]) -> str | None:
    """What of the parts is not there."""
    if any(name in OF_PPO for name in names) and (missing := [name for name in OF_PPO if name not in names]):
        return missing[0]
    there = {part for part, begins in _PARTS.items() if any(name.startswith(begins) for name in names)}
    is_complete = any(name.startswith(_OF_DEEPSPEED) for name in names)
    return None if is_complete else next((part for part in _PARTS if part not in there), None)


def _missing_shard(checkpoint: Path) -> str | None:
    """A file of weights that an index names and that is not there."""
    indices = [json.loads(file.read_bytes()) for file in checkpoint.glob("*.index.json")]
    names = dict.fromkeys(name for one in indices for name in one.get("weight_map", {}).values())
    return next((name for name in names if not (checkpoint / name).exists()), None)

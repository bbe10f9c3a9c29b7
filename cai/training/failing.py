"""What goes wrong while a stage works, told as errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError

from cai.errors import CaiError, ConfigError, EngineError, Interrupted, StoreError
from cai.training.folder import STARTS_OVER, TrainFolder

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_NO_DISK = re.compile(
    r"I/O error|No space left|File too large|quota exceeded|PytorchStreamWriter|file write failed", re.IGNORECASE
)
_CONTINUES = "the same command continues"


@contextmanager
def failures(folder: TrainFolder, arguments: Any) -> Iterator[None]:
    """Raises `EngineError` where memory runs out, `StoreError` where the disk does, `Interrupted` for a `KeyboardInterrupt`."""
    try:
        yield
    except CaiError:
        raise
    except KeyboardInterrupt:
        where = "from its last checkpoint" if folder.last_checkpoint() else "from the start, there being no checkpoint yet"
        raise Interrupted(f"stopped at once; {_CONTINUES} {where}") from None
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise _memory(arguments) from exc
    except (OSError, SafetensorError) as exc:
        raise _disk(folder, exc) from exc
    except RuntimeError as exc:
        if _NO_DISK.search(str(exc)):
            raise _disk(folder, exc) from exc
        if _NO_MEMORY.search(str(exc)):
            raise _memory(arguments) from exc
        raise


def _memory(arguments: Any) -> EngineError:
    return EngineError(
        f"out of memory: lower trl.per_device_train_batch_size ({arguments.per_device_train_batch_size} here; "
        "trl.gradient_accumulation_steps keeps what a step sees) or trl.max_length, or set trl.gradient_checkpointing: true, "
        f"or lora: true to train adapters; then {STARTS_OVER}"
    )


def _disk(folder: TrainFolder, exc: Exception) -> StoreError:
    """What was half written is deleted, so that the last whole checkpoint is what a run goes on from."""
    folder.drop_broken_checkpoints()
    told = getattr(exc, "strerror", None) or " ".join(str(exc).split())[:200]
    kept = folder.last_checkpoint()
    state = f"{kept.name} is kept" if kept else "there is no checkpoint yet"
    return StoreError(f"{folder.path}: cannot be written: {told} ({state}); make room, then {_CONTINUES}")


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Raises `ConfigError` with TRL's own words where a trainer refuses what it is given."""
    try:
        yield
    except CaiError:
        raise
    except (ValueError, NotImplementedError) as exc:
        raise ConfigError(f"trl: the {name} trainer refuses this: {exc}") from exc

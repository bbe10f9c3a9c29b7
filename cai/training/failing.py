"""What goes wrong while a stage works, told as errors that say what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from cai.errors import CaiError, ConfigError, EngineError, Interrupted, StoreError
from cai.training.folder import STARTS_OVER, TrainFolder, from_where

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_NO_DISK = re.compile(
    r"I/O error|No space left|File too large|quota exceeded|PytorchStreamWriter|inline_container|file write failed",
    re.IGNORECASE,
)
_TOO_LITTLE_FOR_VLLM = re.compile(r"memory for kv \((-|0\.0+/)|increasing `gpu_memory_utilization`")
_TOO_MUCH_FOR_VLLM = re.compile(r"less than (requested memory for kv|desired [GC]PU memory utilization)")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG, errno.EROFS)
_CONTINUES = "the same command continues"


@contextmanager
def failures(folder: TrainFolder, arguments: Any, has_adapters: bool = False) -> Iterator[None]:
    """Raises `EngineError` where memory runs out or a vLLM server does not answer, `StoreError` where the disk is full,
    `Interrupted` for a `KeyboardInterrupt`."""
    try:
        yield
    except CaiError as exc:
        if _is_of_memory(exc.__cause__):  # of a reward model, or of a judge, whose engine names keys that are not here
            raise _memory(arguments, has_adapters) from exc
        raise
    except KeyboardInterrupt:
        raise stopped_at_once(folder.path) from None
    except MemoryError as exc:
        raise _memory(arguments, has_adapters) from exc
    except (OSError, SafetensorError, RuntimeError) as exc:
        if _is_of_network(exc) and getattr(arguments, "use_vllm", False):
            raise _no_server(arguments) from exc
        if getattr(exc, "errno", None) in _DISK_ERRORS or _NO_DISK.search(str(exc)):
            raise _disk(folder, exc) from exc
        if _is_of_memory(exc):
            raise _memory(arguments, has_adapters) from exc
        raise


def _is_of_memory(exc: BaseException | None) -> bool:
    """Of a GPU, or of the machine; the allocator of a CPU raises a `RuntimeError` as any other."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exc, RuntimeError) and bool(_NO_MEMORY.search(str(exc)))


def stopped_at_once(folder: Path) -> Interrupted:
    """What is raised where nothing more is saved."""
    return Interrupted(f"stopped at once; {_CONTINUES} {from_where(folder)}")


def _memory(arguments: Any, has_adapters: bool) -> EngineError:
    batch = f"trl.per_device_train_batch_size ({arguments.per_device_train_batch_size} here; "
    length = next((name for name in ("max_completion_length", "max_new_tokens") if hasattr(arguments, name)), None)
    if length is None:
        what = f"lower {batch}trl.gradient_accumulation_steps keeps what a step sees) or trl.max_length"
    else:
        groups = ", a multiple of trl.num_generations" if hasattr(arguments, "num_generations") else ""
        what = f"lower trl.{length} ({getattr(arguments, length)} here) or {batch}trl.gradient_accumulation_steps keeps what a "
        what += f"step sees{groups})"
    ways = {
        "set trl.gradient_checkpointing: true": not arguments.gradient_checkpointing,
        "set trl.value_function: head": getattr(arguments, "value_function", None) == "critic",
        "lora: true to train adapters": not has_adapters,
    }
    more = "".join(f", or {way}" for way, is_left in ways.items() if is_left)
    return EngineError(f"out of memory: {what}{more}; then {STARTS_OVER}")


def _is_of_network(exc: BaseException) -> bool:
    """By name: `requests`, by which TRL asks the server, has types of its own for it."""
    return any(one.__name__ in ("ConnectionError", "Timeout", "TimeoutError") for one in type(exc).__mro__)


def server_of(arguments: Any) -> str:
    """Where TRL looks for the vLLM server."""
    return arguments.vllm_server_base_url or f"http://{arguments.vllm_server_host}:{arguments.vllm_server_port}"


def _no_server(arguments: Any) -> EngineError:
    return EngineError(
        f"no vLLM server answers at {server_of(arguments)}: start one (VLLM_SERVER_DEV_MODE=1 vllm serve MODEL "
        """--weight-transfer-config '{"backend": "nccl"}'), or set trl.vllm_server_base_url; without a server, """
        f"trl.vllm_mode: colocate; then {_CONTINUES}"
    )


def _disk(folder: TrainFolder, exc: Exception) -> StoreError:
    """What was half written is deleted, so that the last whole checkpoint is what a run goes on from."""
    folder.drop_broken_checkpoints()
    told = getattr(exc, "strerror", None) or " ".join(str(exc).split())[:200]
    return StoreError(f"{folder.path}: cannot be written: {told}; make room, then {_CONTINUES} {from_where(folder.path)}")


@contextmanager
def refusals(name: str) -> Iterator[None]:
    """Raises `ConfigError` with TRL's own words where a trainer refuses what it is given."""
    try:
        yield
    except CaiError:
        raise
    except (ValueError, NotImplementedError, ImportError) as exc:
        raise ConfigError(f"trl: the {name} trainer refuses this: {exc}{_of_vllm(str(exc))}") from exc


def _of_vllm(refused: str) -> str:
    """The key that gives vLLM, in the training's process, another share of all memory; or that brings it there."""
    if "weight-transfer engine, which needs a CUDA device" in refused:
        return " Without a GPU set trl.vllm_mode: colocate, or leave trl.use_vllm out"
    key = "trl.vllm_gpu_memory_utilization"
    if _TOO_LITTLE_FOR_VLLM.search(refused):
        shorter = ", or set a lower trl.vllm_max_model_length" if "max_model_len" in refused else ""
        return f" This is too little memory for vLLM: raise {key}{shorter}"
    return f" This is more memory than is free: lower {key}" if _TOO_MUCH_FOR_VLLM.search(refused) else ""

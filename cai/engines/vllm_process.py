"""vLLM's engine process: the arguments that it is started with, and that it ends when we do."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cai.config import ModelConfig, VllmConfig
from cai.errors import ConfigError, EngineError, nearest
from cai.models import ModelPlace
from cai.weights import pretrained, resolve_dtype

_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",  # else it tells its makers what runs where
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # it is started from a thread, which a fork would not survive
}
"""What is set before vLLM is imported, where the user did not set it."""
_MARK = "CAI_VLLM_STARTED_BY"
"""The environment variable by which the processes of one engine are known."""
_QUIET = {"PYTHONWARNINGS": "ignore", "TORCH_CPP_LOG_LEVEL": "ERROR"}
"""What these processes, and only they, get besides: warnings of libraries are nothing that a user of ours can act on."""
_STARTING = threading.Lock()
_SAID_ELSEWHERE = {
    "model": "the model's name",
    "tokenizer": "the model's name",
    "revision": "revision",
    "dtype": "dtype",
    "enable_lora": "vllm.adapter",
    "hf_token": "the environment variable HF_TOKEN: a recipe is written into the run folder",
    "logprobs_mode": "nothing: judging needs the model's own log-probabilities",
    "runner": "judge.method",
}
"""Arguments of vLLM that the recipe says under another key."""
_ONLY_SPEED = {
    "block_size",
    "data_parallel_size",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_model_len",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
"""Arguments that change speed, memory and rounding, and no answer otherwise: a journal stays good when they change."""
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The LoRA ranks that vLLM has room for."""
_CPU_CACHE = 4 << 30
"""Bytes of keys and values kept on a CPU, where vLLM would take most of the memory; or a quarter of what is free."""


def numeric_args(config: VllmConfig) -> dict[str, Any]:
    """Those of the recipe's arguments that can change an answer."""
    return {key: value for key, value in sorted(config.args.items()) if key not in _ONLY_SPEED}


def check_args(args: dict[str, Any]) -> None:
    """Raises `ConfigError` for an argument that vLLM's engine does not have, or that is said elsewhere."""
    if not args:
        return
    known = {field.name for field in dataclasses.fields(_vllm().AsyncEngineArgs)}
    for key in args:
        if key in _SAID_ELSEWHERE:
            raise ConfigError(f"vllm.args.{key}: this is set by {_SAID_ELSEWHERE[key]}")
        if key not in known:
            meant = nearest(key, known - _SAID_ELSEWHERE.keys())
            raise ConfigError(f"vllm.args.{key}: vLLM's engine has no such argument{meant}")


def adapter_rank(adapter: str) -> int:
    """The smallest rank that vLLM offers and the adapter fits into. Raises `ConfigError` where there is no adapter."""
    file = Path(adapter).expanduser() / "adapter_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        rank = max(settings["r"], *settings.get("rank_pattern", {}).values(), 0)
        return next(one for one in _RANKS if one >= rank)
    except OSError as exc:
        raise ConfigError(f"vllm.adapter: {file} cannot be read: {exc.strerror}; expected a folder that peft saved") from exc
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ConfigError(f"vllm.adapter: {file} is not what peft saves for a LoRA: {type(exc).__name__}: {exc}") from exc
    except StopIteration:
        raise ConfigError(f"vllm.adapter: rank {rank} is above {_RANKS[-1]}, the most that vLLM runs") from None


class VllmProcess:
    """vLLM's asynchronous `engine`, whose process loads the weights; it ends by `stop`, or when ours does."""

    def __init__(self, config: ModelConfig, place: ModelPlace) -> None:
        """Start it, which takes half a minute and blocks; in a thread of its own, which then hears no Ctrl-C.

        Raises `ConfigError` for arguments that vLLM refuses, `EngineError` where the process does not come up.
        """
        vllm = _vllm()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: after a Ctrl-C what is in flight finishes
        try:
            settings = vllm.AsyncEngineArgs(**_engine_args(config, place)).create_engine_config()
        except (ValueError, TypeError, NotImplementedError, AssertionError) as exc:
            raise ConfigError(f"vLLM refuses model '{config.model}' with vllm.args {config.vllm.args}: {exc}") from exc
        self._watch, mark = _watch()
        try:
            with _environment({_MARK: mark, **_QUIET}):
                self.engine: Any = vllm.AsyncLLMEngine.from_vllm_config(settings, disable_log_stats=True)
        except Exception as exc:  # whatever ends the process before it answers; it has written why
            self._watch.communicate()
            advice = "where memory is short, lower vllm.args.max_model_len or gpu_memory_utilization"
            raise EngineError(f"vLLM did not start with model '{config.model}': {exc}; {advice}") from exc

    def stop(self) -> None:
        """End the process; blocks for a second or so."""
        self.engine.shutdown()
        self.engine.shutdown = lambda: None  # called again by its __del__, by when vLLM's modules may be gone
        self._watch.communicate()


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    """More variables for the processes that start meanwhile; one engine starts at a time."""
    with _STARTING:
        before = {name: os.environ[name] for name in more if name in os.environ}
        os.environ.update(more)
        try:
            yield
        finally:
            for name in more:
                del os.environ[name]
            os.environ.update(before)


def _watch() -> tuple[subprocess.Popen[bytes], str]:
    """A process that ends what carries a mark once we are gone, which vLLM's own processes would outlive; and the mark."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-P", str(Path(__file__).with_name("orphans.py")), _MARK, mark]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True), mark


def _vllm() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import vllm

    return vllm


def _engine_args(config: ModelConfig, place: ModelPlace) -> dict[str, Any]:
    source, revision = pretrained(place)
    lora = {"enable_lora": True, "max_lora_rank": adapter_rank(config.vllm.adapter)} if config.vllm.adapter else {}
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False} if config.exact else {}
    return {
        "model": source,
        "revision": revision,
        "dtype": str(resolve_dtype(config)).removeprefix("torch."),
        "logprobs_mode": "raw_logprobs",
        "max_model_len": -1,  # the model's own, or as much of it as memory has room for
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        **lora,
        **_cpu_args(config.vllm),
        **config.vllm.args,
        **alone,
    }


def _cpu_args(config: VllmConfig) -> dict[str, Any]:
    """What suits a CPU: no minutes of compilation, small blocks to share, a cache that leaves memory for others."""
    import psutil
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return {}
    told = "VLLM_CPU_KVCACHE_SPACE" in os.environ or "gpu_memory_utilization" in config.args
    cache = {} if told else {"kv_cache_memory_bytes": min(_CPU_CACHE, psutil.virtual_memory().available // 4)}
    whole = {"enable_chunked_prefill": False}  # a part of a prompt with a seed ends the process: its generator cannot go back
    return {"enforce_eager": True, "block_size": 32, **whole, **cache}

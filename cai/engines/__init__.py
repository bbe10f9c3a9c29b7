"""Engines behind one small Protocol; `build_engine` chooses by the model's name."""

from __future__ import annotations

from importlib.util import find_spec

from cai.config import ModelConfig, VllmConfig
from cai.engines.base import (
    Batching,
    BatchWork,
    Capability,
    ChoiceLogprobs,
    ChoiceRequest,
    Engine,
    GenerateRequest,
    Loglikelihood,
    LoglikelihoodRequest,
    Outcome,
    PartlyAnswered,
    Reward,
    RewardRequest,
    failures,
)
from cai.engines.scripted import ScriptedEngine, load_scripted
from cai.errors import ConfigError

REQUIREMENTS: dict[str, tuple[tuple[str, ...], str]] = {
    "transformers": (("torch", "transformers"), "local"),
    "openai": (("aiohttp", "aiolimiter", "tenacity"), "server"),
    "vllm": (("vllm", "torch", "transformers"), "vllm"),
    "scripted": ((), ""),
}
"""For each engine the packages that it needs, and the extra that brings them."""

__all__ = [
    "REQUIREMENTS",
    "BatchWork",
    "Batching",
    "Capability",
    "ChoiceLogprobs",
    "ChoiceRequest",
    "Engine",
    "GenerateRequest",
    "Loglikelihood",
    "LoglikelihoodRequest",
    "Outcome",
    "PartlyAnswered",
    "Reward",
    "RewardRequest",
    "ScriptedEngine",
    "build_engine",
    "describe_devices",
    "failures",
    "missing_packages",
]


def missing_packages(engine: str) -> list[str]:
    """The packages that an engine needs and that are not installed."""
    return [package for package in REQUIREMENTS[engine][0] if find_spec(package) is None]


def build_engine(config: ModelConfig, reward: bool = False, section: str = "policy") -> Engine:
    """The engine for a model, or for a reward model; weights are loaded with the first request, what is missing is said now.

    `section` is the part of the recipe whose `server` errors name.

    Raises `ConfigError` for a model that cannot be, or one whose extra is not installed.
    """
    scheme, colon, rest = config.model.partition(":")
    if config.vllm != VllmConfig() and scheme.lower() != "vllm":
        raise ConfigError(f"vllm: has settings, but model '{config.model}' does not run on vLLM; name it 'vllm:MODEL'")
    match scheme.lower() if colon else "":
        case "scripted":
            return load_scripted(rest)
        case "http" | "https":
            return _openai(config, reward, section)
        case "vllm":
            return _vllm(config.model_copy(update={"model": rest}), reward)
        case "":
            return _transformers(config, reward)
        case _:
            raise ConfigError(
                f"model '{config.model}': unknown scheme '{scheme}:'; expected an alias (smollm2-135m), a folder, "
                "a Hub id (each also as vllm:MODEL), the URL of a server (http://127.0.0.1:8000/v1), or "
                "scripted:FILE.py:FUNCTION"
            )


def _openai(config: ModelConfig, reward: bool, section: str) -> Engine:
    if missing := missing_packages("openai"):
        raise ConfigError(
            f"model '{config.model}' is on a server, which needs {', '.join(missing)}: pip install 'cai-toolkit[server]'"
        )
    from cai.engines.openai import OpenAIEngine

    return OpenAIEngine(config, reward, f"{section}.server")


def _vllm(config: ModelConfig, reward: bool) -> Engine:
    if missing := missing_packages("vllm"):
        raise ConfigError(
            f"model 'vllm:{config.model}' runs on vLLM, but {' and '.join(missing)} {'are' if missing[1:] else 'is'} not "
            "installed: pip install 'cai-toolkit[vllm]' where there is a GPU; for a CPU see the README"
        )
    if reward:
        raise ConfigError(f"model 'vllm:{config.model}': vLLM in process runs no reward models; leave out 'vllm:'")
    from cai.engines.vllm import VllmEngine

    return VllmEngine(config)


def _transformers(config: ModelConfig, reward: bool) -> Engine:
    if missing := missing_packages("transformers"):
        raise ConfigError(
            f"model '{config.model}' runs on transformers, but {' and '.join(missing)} {'are' if missing[1:] else 'is'} "
            "not installed: pip install 'cai-toolkit[local]'"
        )
    if reward:
        from cai.engines.reward_model import RewardModelEngine

        return RewardModelEngine(config)
    from cai.engines.transformers import TransformersEngine

    return TransformersEngine(config)


def describe_devices() -> list[str]:
    """The devices that torch sees, and the dtype that `auto` means there. Needs torch."""
    from cai.weights import describe_devices as describe

    return describe()

"""vLLM in the training's process on a CPU: there it packs the weights of its layers once they are loaded, and what TRL writes
new ones to with each rollout is gone. vLLM's own reload packs them again."""

from __future__ import annotations

from functools import partial
from typing import Any

from cai.errors import ConfigError


def reload_where_packed(trainer: Any) -> None:
    """Let an online trainer of TRL give its weights to such a vLLM by reloading them.

    Raises `ConfigError` for online DPO, which has a way of its own.
    """
    arguments = trainer.args
    if not arguments.use_vllm or arguments.vllm_mode != "colocate" or trainer.accelerator.device.type != "cpu":
        return
    if not hasattr(trainer, "vllm_generation"):
        raise ConfigError("trl.use_vllm: online DPO cannot have vLLM in its process on a CPU; leave it out, or use a GPU")
    trainer.vllm_generation.sync_weights = partial(_reload, trainer.vllm_generation)


def _reload(generation: Any) -> None:
    runner = generation.llm.llm_engine.model_executor.driver_worker.model_runner
    runner.reload_weights(weights_iterator=generation._iter_named_params())
    generation.llm.reset_prefix_cache()

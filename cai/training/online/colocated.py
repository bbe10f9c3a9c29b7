"""vLLM in the training's process on a CPU. It packs the weights of a layer once they are loaded and frees those that TRL would
write new ones to; here its own reload packs new ones for each rollout."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from cai.training.online.merging import kept


def reload_where_packed(trainer: Any) -> None:
    """Let an online trainer of TRL give its weights to such a vLLM by reloading them."""
    arguments = trainer.args
    if arguments.use_vllm and arguments.vllm_mode == "colocate" and trainer.accelerator.device.type == "cpu":
        trainer.vllm_generation.sync_weights = partial(_reload, trainer.vllm_generation)


def _reload(generation: Any) -> None:
    worker = generation.llm.llm_engine.model_executor.driver_worker
    with kept(generation.model):  # TRL merges adapters into them
        worker.reload_weights(weights_iterator=_copies(generation))
    model = worker.model_runner.model
    head = getattr(model, "lm_head", None)
    if head is not None and model.config.tie_word_embeddings:  # packed by itself, and named nowhere among the weights
        head.quant_method.process_weights_after_loading(head)
    generation.llm.reset_prefix_cache()


def _copies(generation: Any) -> Iterator[tuple[str, Tensor]]:
    """vLLM keeps what it is given until the layer is whole, and TRL changes it meanwhile."""
    for name, weight in generation._iter_named_params():
        yield name, weight.clone()

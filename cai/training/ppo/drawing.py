"""Rollouts whose tokens are drawn by one random number a row: the usual draws take a third of the time that a CPU writes with a
small model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from cai.engines.drawing import draw, only
from cai.errors import EngineError


class Draw(LogitsProcessor):
    """Leaves one token possible in each row, drawn at a temperature."""

    def __init__(self, temperature: float) -> None:
        """`temperature`: above 0."""
        self._temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (B, vocabulary); the likeliest token is the one that was drawn."""
        probabilities = (scores / self._temperature).softmax(dim=-1)
        if not probabilities[:, 0].isfinite().all():  # where one is not, none of its row is
            raise EngineError("the policy's probabilities are not numbers; lower trl.learning_rate, or set dtype: float32")
        return only(draw(probabilities, torch.rand(len(scores), 1, device=scores.device)), scores)


_NEUTRAL = {
    "min_p": 0,
    "top_h": None,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "num_beams": 1,
    "watermarking_config": None,
}
"""What else bends draws, in the settings of transformers, and the value with which it does not; besides null."""


def is_plain(config: Any, of_model: Any) -> bool:
    """Whether tokens are drawn by their probabilities at a temperature. What `config` leaves open, that of the model says."""
    bent = (getattr(one, name, None) not in (None, value) for one in (config, of_model) for name, value in _NEUTRAL.items())
    return bool(config.do_sample) and config.top_k == 0 and config.top_p == 1 and not any(bent)


@contextmanager
def drawing(trainer: Any, model: Any) -> Iterator[None]:
    """Inside, `model.generate` of a trainer of TRL draws by `Draw`, where a temperature is all that its draws are told."""
    config = trainer.generation_config
    if not is_plain(config, model.generation_config):
        yield
        return
    draw = LogitsProcessorList([Draw(1.0 if config.temperature is None else config.temperature)])
    greedy = deepcopy(config)
    greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    trainer.generation_config, model.generate = greedy, partial(model.generate, logits_processor=draw)
    try:
        yield
    finally:
        del model.generate
        trainer.generation_config = config

"""Rollouts whose tokens are drawn by one random number a row: the usual draws take a third of the time that a CPU writes with a
small model. What the policy says as it writes is kept, so that it need not read what it wrote to say it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from cai.engines.drawing import draw, only
from cai.errors import EngineError


class Written(NamedTuple):
    """Of B rows what a policy said of the T tokens that it wrote: `ids` (B, L), prompts that are padded on the left and these
    tokens; `logps` (B, T); and `states` (B, T, width), the last ones of the trunk before each of them."""

    ids: Tensor
    logps: Tensor
    states: Tensor

    def is_of(self, ids: Tensor, mask: Tensor, length: int) -> bool:
        """Whether `ids` (B, P + `length`) are these rows, where `mask` says that they are no padding, short of what ended."""
        alike = len(ids) == len(self.ids) and ids.size(1) - length == self.ids.size(1) - self.logps.size(1)
        if not alike or length > self.logps.size(1):
            return False
        return bool(((ids == self.ids[:, : ids.size(1)]) | (mask == 0)).all())


class Draw(LogitsProcessor):
    """Leaves one token possible in each row, drawn at a temperature, and keeps how likely it was."""

    def __init__(self, temperature: float) -> None:
        """`temperature`: above 0."""
        self._temperature = temperature
        self._logps: list[Tensor] = []
        self._ids = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` (B, L) so far, `scores` (B, vocabulary); the likeliest token is the one that was drawn."""
        probabilities = (scores / self._temperature).softmax(dim=-1)
        if not probabilities[:, 0].isfinite().all():  # where one is not, none of its row is
            raise EngineError("the policy's probabilities are not numbers; lower trl.learning_rate, or set dtype: float32")
        tokens = draw(probabilities, torch.rand(len(scores), 1, device=scores.device))
        self._logps.append(probabilities.gather(1, tokens).log())
        self._ids = torch.cat([input_ids, tokens], dim=1)
        return only(tokens, scores)

    def written(self, states: list[Tensor]) -> Written | None:
        """What was drawn; None where the policy was not asked once for each token. `states` (B, width) each."""
        if not self._logps or len(states) != len(self._logps):
            return None
        return Written(self._ids, torch.cat(self._logps, dim=1), torch.stack(states, dim=1))


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
def drawing(trainer: Any, model: Any) -> Iterator[list[Written]]:
    """Inside, `model.generate` of a trainer of TRL draws by `Draw`, where a temperature is all that its draws are told; to the
    list comes what each call wrote."""
    config, all_written = trainer.generation_config, list[Written]()
    if not is_plain(config, model.generation_config):
        yield all_written
        return
    greedy, generate = deepcopy(config), model.generate
    greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None)

    def drawn(*given: Any, **named: Any) -> Any:
        draw = Draw(1.0 if config.temperature is None else config.temperature)
        with _states_of(model) as states:
            found = generate(*given, logits_processor=LogitsProcessorList([draw]), **named)
        written = draw.written(states)
        all_written.extend([] if written is None else [written])
        return found

    trainer.generation_config, model.generate = greedy, drawn
    try:
        yield all_written
    finally:
        del model.generate
        trainer.generation_config = config


@contextmanager
def _states_of(model: Any) -> Iterator[list[Tensor]]:
    """A list to which each pass of the trunk adds its states of the last column."""
    states: list[Tensor] = []
    trunk = (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model
    handle = trunk.register_forward_hook(lambda *passed: states.append(passed[-1].last_hidden_state[:, -1]))
    try:
        yield states
    finally:
        handle.remove()

"""Rollouts whose tokens are drawn by one random number a row: the usual draws take a third of the time that a CPU writes with a
small model. What the policy says of them as it writes can be kept, so that it need not read them to say it again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from cai.engines.drawing import draw, only
from cai.errors import EngineError
from cai.training.online.merging import base_of
from cai.training.ppo.sharing import compute_prefix, prefix_first, sharable_length


class Drawn(NamedTuple):
    """T tokens that a policy drew for each of B rows, by its own probabilities at a temperature.

    `ids` (B, L) are prompts, padded on the left, and these tokens; `logps` (B, T) their log-probabilities; `states`
    (B, T, width), where kept, the trunk's last ones before each.
    """

    ids: Tensor
    logps: Tensor
    states: Tensor | None

    def holds(self, ids: Tensor, mask: Tensor, length: int) -> bool:
        """Whether `ids` (B, P + `length`) are these rows, but for padding, by `mask`, and cut after at most T tokens."""
        alike = len(ids) == len(self.ids) and ids.size(1) - length == self.ids.size(1) - self.logps.size(1)
        if not alike or length > self.logps.size(1):
            return False
        return bool(((ids == self.ids[:, : ids.size(1)]) | (mask == 0)).all())


class Draw(LogitsProcessor):
    """Leaves one token possible in each row, drawn at a temperature."""

    def __init__(self, temperature: float) -> None:
        """`temperature`: above 0."""
        self.temperature = temperature
        self._logits: Tensor | None = None
        self._ids: tuple[Tensor, ...] = ()
        self._are_its_own = True
        self._logps: list[Tensor] = []
        self._states: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`input_ids` (B, L) so far, `scores` (B, vocabulary); the likeliest token is the one that was drawn."""
        probabilities = (scores / self.temperature).softmax(dim=-1)
        if not probabilities[:, 0].isfinite().all():  # where one is not, none of its row is
            raise EngineError("the policy's probabilities are not numbers; lower trl.learning_rate, or set dtype: float32")
        tokens = draw(probabilities, torch.rand(len(scores), 1, device=scores.device))
        if self._logits is not None:
            self._are_its_own &= torch.equal(scores, self._logits)
            self._logps.append(probabilities.gather(1, tokens).log())
            self._ids = (input_ids, tokens)
        return only(tokens, scores)

    @contextmanager
    def keeping(self, model: Any, with_states: bool) -> Iterator[None]:
        """Inside, what `model`, which may have adapters, says of what is drawn is kept."""
        base = base_of(model)

        def keep_logits(_module: Any, _given: Any, answer: Any) -> None:
            self._logits = answer.logits[:, -1]

        def keep_states(_module: Any, _given: Any, answer: Any) -> None:
            self._states.append(answer.last_hidden_state[:, -1].clone())  # else a prompt's others would stay in memory

        handles = [base.register_forward_hook(keep_logits)]
        if with_states:
            handles.append(base.base_model.register_forward_hook(keep_states))
        try:
            yield
        finally:
            for one in handles:
                one.remove()

    def drawn(self, prompts: Tensor) -> Drawn | None:
        """What was kept, after `prompts` (B, P), which may have been read in another order. None where a penalty, a minimal
        length or the like bent the scores on their way here, so that draws were not by the probabilities that the model says,
        or where a pass was not for one token."""
        if not self._ids or not self._are_its_own or (self._states and len(self._states) != len(self._logps)):
            return None
        states = torch.stack(self._states, dim=1) if self._states else None
        so_far, last = self._ids
        ids = torch.cat([prompts, so_far[:, prompts.size(1) :], last], dim=1)
        return Drawn(ids, torch.cat(self._logps, dim=1), states)


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


def _arranged(model: Any, ids: Tensor, mask: Tensor, named: dict[str, Any]) -> dict[str, Any]:
    """What `generate` is told of prompts (B, L), padded on the left, besides `named`, which has a `generation_config`.

    What all prompts begin with, if that is worth it, comes first, and is computed already. That takes a static cache, so it is
    done where `generate` would have made one: who asked for it knows that the model's keys have the dtype of its weights.
    """
    base = base_of(model)
    trunk, config, of_model = base.base_model, deepcopy(named["generation_config"]), base.generation_config
    asked = config.cache_implementation == "static" and config.max_new_tokens is not None
    bent = of_model.cache_implementation or False in (config.use_cache, of_model.use_cache)
    has_more = any(isinstance(one, Tensor) for one in named.values())
    shared = sharable_length(trunk, ids, mask) if asked and not (bent or has_more) else 0
    if not shared:
        return {**named, "input_ids": ids, "attention_mask": mask}
    ids, mask = prefix_first(ids, mask, shared)
    with torch.no_grad():
        prefix = compute_prefix(trunk, ids, shared)
    config.cache_implementation = None
    cache = prefix.preallocated(trunk.config, len(ids), ids.size(1) + config.max_new_tokens)
    return {**named, "input_ids": ids, "attention_mask": mask, "past_key_values": cache, "generation_config": config}


@contextmanager
def drawing(trainer: Any, model: Any, keep: bool = False, with_states: bool = False) -> Iterator[list[Drawn]]:
    """Inside, `model.generate` of a trainer of TRL draws by `Draw`, where a temperature is all that its draws are told. `keep`:
    to the list comes what each call drew, if by the probabilities that the trainer's passes say; `with_states` as well."""
    config, kept = trainer.generation_config, list[Drawn]()
    if not is_plain(config, model.generation_config):
        yield kept
        return
    greedy, generate = deepcopy(config), model.generate
    greedy.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    temperature = 1.0 if config.temperature is None else config.temperature

    def draw_all(input_ids: Tensor, attention_mask: Tensor, **named: Any) -> Any:
        draw = Draw(temperature)
        told = _arranged(model, input_ids, attention_mask, named)
        with draw.keeping(model, with_states) if keep and temperature == trainer.temperature else nullcontext():
            found = generate(logits_processor=LogitsProcessorList([draw]), **told)
        found[:, : input_ids.size(1)] = input_ids
        drawn = draw.drawn(input_ids)
        kept.extend([] if drawn is None else [drawn])
        return found

    trainer.generation_config, model.generate = greedy, draw_all
    try:
        yield kept
    finally:
        del model.generate
        trainer.generation_config = config

"""Value functions: what is still to be expected at each token of a completion.

A critic is a network of its own: a backbone and a layer with one output. Its gradients are taken by themselves, before those of
the policy, and it has an optimizer of its own, so that the policy's trainer (and whatever wraps its model) never meets it. With
LoRA it is a second set of adapters on the policy's base: policy, reference and critic share one set of weights. A head is
the same layer on what the policy's passes leave, and costs next to nothing; its gradients end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from trl.trainer.utils import disable_dropout_in_model

from cai.training.ppo.features import completion_features

CRITIC = "critic"
"""The name of its adapters."""


def is_critics(name: str) -> bool:
    """Whether a weight of a model with adapters is one of the critic's."""
    return f".{CRITIC}." in f"{name}."


class Output(NamedTuple):
    """The layer that a value function begins with: weight (1, width) and bias (1,), of the features as they are."""

    weight: Tensor
    bias: Tensor


class Adapters(NamedTuple):
    """Adapters that a critic begins with: their configuration by PEFT, and their weights."""

    config: Any
    state: dict[str, Tensor]


_REACH = 250.0
"""How far a new layer gets: the sum of its features' sizes is about 0.8 of this."""


class ValueLayer(nn.Module):
    """Values of what is written before a token: what the state there is worth, and the mean of what all states and words of the
    completion so far are worth. A state alone says little of a text that is nearly whole, by which most rewards are foreseen.

    A new one begins at 0, on features that are normalised and scaled so that a step of Adam moves a value by at most some 200
    times the learning rate, whatever the width and the size of the features: at 2e-3 rewards of about 1 are in reach within a
    few steps.
    """

    def __init__(self, width: int, words: int, output: Output | None = None) -> None:
        """`width` of the states and `words` of the word embeddings; `output`: what the state's layer begins with, which then
        reads states as they are."""
        super().__init__()
        self._is_new = output is None
        self.state = nn.Linear(width, 1, dtype=torch.float32)
        self.states, self.words = (nn.Linear(one, 1, bias=False, dtype=torch.float32) for one in (width, words))
        for weight in self.parameters():
            nn.init.zeros_(weight)
        if output is not None:
            with torch.no_grad():
                self.state.weight.copy_(output.weight)
                self.state.bias.copy_(output.bias)

    def new(self) -> list[nn.Parameter]:
        """What begins at 0."""
        return [self.states.weight, self.words.weight, *(self.state.parameters() if self._is_new else ())]

    def forward(self, states: Tensor, words: Tensor) -> Tensor:
        """The values, (B, T), in float32: of `states` (B, T, width) before each token of completions, and the embeddings
        `words` (B, T, words) of the tokens that these states were read at."""
        with torch.autocast(states.device.type, enabled=False):
            states, words = states.float(), words.float()
            normal = _scaled(states)
            so_far = self.states(normal) + self.words(_scaled(words))
            values: Tensor = self.state(normal if self._is_new else states) + _mean_so_far(so_far)
        return values[..., 0]


def _mean_so_far(rows: Tensor) -> Tensor:
    """Of (B, T, 1), along T. A GPU's cumulative sum is not deterministic; where that is asked for it is taken elsewhere."""
    is_refused = rows.is_cuda and torch.are_deterministic_algorithms_enabled()
    total = rows.cpu().cumsum(dim=1).to(rows.device) if is_refused else rows.cumsum(dim=1)
    return total / torch.arange(1, rows.size(1) + 1, device=rows.device).unsqueeze(1)


def _scaled(features: Tensor) -> Tensor:
    """A third of the reach for each of the three."""
    return nn.functional.layer_norm(features, features.shape[-1:]) * (_REACH / 3 / features.size(-1))


class Critic(Protocol):
    """A value function with gradients of its own."""

    layer: ValueLayer

    def values(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """What is expected before each of the last `length` tokens: (B, length), float32; see `completion_features`. Gradients
        are to be taken inside of `working`."""

    def working(self) -> Any:
        """A context in which its weights are those in use."""

    def weights(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""


class SeparateCritic(nn.Module):
    """A backbone of its own."""

    def __init__(self, backbone: Any, output: Output | None = None) -> None:
        """`backbone`: a model of transformers whose answer has a `last_hidden_state`."""
        super().__init__()
        self.backbone = backbone.requires_grad_(True)
        disable_dropout_in_model(backbone)
        self.layer = _layer_on(backbone, output)

    def values(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """See `Critic`."""
        states = completion_features(self.backbone, ids, mask, length)
        values: Tensor = self.layer(states, _words(self.backbone, ids, length))
        return values

    @contextmanager
    def working(self) -> Iterator[None]:
        """Nothing is to be done."""
        yield

    def weights(self) -> dict[str, nn.Parameter]:
        """All of them."""
        return dict(self.named_parameters())


class AdapterCritic:
    """Adapters on the policy's base."""

    def __init__(self, policy: Any, adapters: Adapters | None = None, output: Output | None = None) -> None:
        """`policy`: a PEFT model whose active adapters are the policy's; `adapters`: what the critic's begin with; None: new
        ones like the policy's.

        Raises `ValueError` for adapters that are not on this base.
        """
        from peft import set_peft_model_state_dict

        self._policy, self._own = policy, policy.active_adapter
        base = policy.get_base_model()
        policy.add_adapter(CRITIC, _of_its_own(adapters.config if adapters else policy.peft_config[self._own]))
        if adapters is not None:
            found = set_peft_model_state_dict(policy, adapters.state, adapter_name=CRITIC)
            if found.unexpected_keys:
                raise ValueError(f"adapters that the critic begins with: the base has no layer for {found.unexpected_keys[0]}")
        policy.set_adapter(self._own)
        self._backbone = base.base_model
        self.layer = _layer_on(self._backbone, output)

    def values(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """See `Critic`; only inside of `working`."""
        states = completion_features(self._backbone, ids, mask, length)
        values: Tensor = self.layer(states, _words(self._backbone, ids, length))
        return values

    @contextmanager
    def working(self) -> Iterator[None]:
        """The critic's adapters in place of the policy's."""
        self._policy.set_adapter(CRITIC)
        try:
            yield
        finally:
            self._policy.set_adapter(self._own)

    def weights(self) -> dict[str, nn.Parameter]:
        """The adapters' and the layer's."""
        mine = {name: one for name, one in self._policy.named_parameters() if is_critics(name)}
        return mine | {f"layer.{name}": one for name, one in self.layer.named_parameters()}


def _of_its_own(config: Any) -> Any:
    """A configuration of adapters that leaves the base as it is, and drops nothing out."""
    own = deepcopy(config)
    own.lora_dropout, own.init_lora_weights = 0.0, True
    return own


class TrunkHead:
    """A layer on what the policy's own passes leave. None of it reaches the trunk: values do not bend what the policy knows."""

    def __init__(self, policy: Any) -> None:
        """`policy`: the model, not wrapped."""
        self._trunk = policy.base_model
        self.layer = _layer_on(self._trunk)

    def values(self, states: Tensor, ids: Tensor) -> Tensor:
        """(B, T), float32: of `states` (B, T, width), the trunk's last ones before the last T tokens of `ids` (B, L)."""
        values: Tensor = self.layer(states.detach(), _words(self._trunk, ids, states.size(1)).detach())
        return values

    @contextmanager
    def watching(self, ids: Tensor, length: int) -> Iterator[list[Tensor]]:
        """A list to which each pass of the trunk, over so many of the next rows of `ids`, adds its values of the last `length`
        tokens."""
        seen: list[Tensor] = []

        def add(_module: Any, _given: Any, answer: Any) -> None:
            states, first = answer.last_hidden_state[:, -length - 1 : -1], sum(map(len, seen))
            seen.append(self.values(states, ids[first : first + len(states)]))

        handle = self._trunk.register_forward_hook(add)
        try:
            yield seen
        finally:
            handle.remove()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Nothing is to be done."""
        yield

    def weights(self) -> dict[str, nn.Parameter]:
        """The layer's."""
        return {f"layer.{name}": one for name, one in self.layer.named_parameters()}


def _layer_on(backbone: Any, output: Output | None = None) -> ValueLayer:
    width = backbone.config.get_text_config().hidden_size
    layer: ValueLayer = ValueLayer(width, backbone.get_input_embeddings().weight.size(1), output).to(backbone.device)
    return layer


def _words(backbone: Any, ids: Tensor, length: int) -> Tensor:
    """The embeddings of the tokens before each of the last `length` ones."""
    words: Tensor = backbone.get_input_embeddings()(ids[:, -length - 1 : -1])
    return words

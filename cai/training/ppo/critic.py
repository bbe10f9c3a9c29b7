"""Value functions: what is still to be expected at each token of a completion.

A critic is a network of its own: a backbone and a layer with one output. Its gradients are taken by themselves, before those of
the policy, and it has an optimizer of its own, so that the policy's trainer (and whatever wraps its model) never meets it. With
LoRA it is a second set of adapters on the policy's base: policy, reference and critic share one set of weights. A head is
a layer on what passes of the policy leave, and costs next to nothing; its gradients end there.
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


class Output(NamedTuple):
    """The layer that a value function begins with: weight (1, width) and bias (1,), of the features as they are."""

    weight: Tensor
    bias: Tensor


class Adapters(NamedTuple):
    """Adapters that a critic begins with: their configuration by PEFT, and their weights."""

    config: Any
    state: dict[str, Tensor]


_REACH = 250.0
"""How far a new value layer gets: the sum of its features' sizes is about 0.8 of this."""


class ValueLayer(nn.Module):
    """Values from features, computed in float32: (B, L, width) to (B, L).

    A new one begins at 0, on features that are normalised and scaled so that a step of Adam moves a value by some 200 times the
    learning rate, whatever the width and the size of the features: rewards of about 1 are in reach within tens of steps.
    """

    def __init__(self, width: int, output: Output | None = None, parts: int = 1) -> None:
        """`output`: what it begins with. `parts`: how many such layers a value is the sum of."""
        super().__init__()
        self.linear, self._is_new = nn.Linear(width, 1, dtype=torch.float32), output is None
        self._scale = _REACH / (width * parts)
        with torch.no_grad():
            self.linear.weight.copy_(output.weight) if output else nn.init.zeros_(self.linear.weight)
            self.linear.bias.copy_(output.bias) if output else nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """The values."""
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            if self._is_new:
                features = nn.functional.layer_norm(features, features.shape[-1:]) * self._scale
            values: Tensor = self.linear(features)
        return values[..., 0]


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
        self.layer = ValueLayer(backbone.config.get_text_config().hidden_size, output)
        self.to(backbone.device)

    def values(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """See `Critic`."""
        values: Tensor = self.layer(completion_features(self.backbone, ids, mask, length))
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
        self.layer = ValueLayer(base.config.get_text_config().hidden_size, output).to(base.device)

    def values(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """See `Critic`; only inside of `working`."""
        values: Tensor = self.layer(completion_features(self._policy.get_base_model().base_model, ids, mask, length))
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
        mine = {name: one for name, one in self._policy.named_parameters() if f".{CRITIC}." in name}
        return mine | {f"layer.{name}": one for name, one in self.layer.named_parameters()}


def _of_its_own(config: Any) -> Any:
    """A configuration of adapters that leaves the base as it is, and drops nothing out."""
    own = deepcopy(config)
    own.lora_dropout, own.init_lora_weights = 0.0, True
    return own


class TrunkHead:
    """Values from what passes of the policy leave anyway: of the state before a token, and of all that is written before it the
    mean of what its states and its words are worth. Nothing of it reaches the trunk: values do not bend what the policy knows.

    A state alone says little of a text that is nearly whole; the mean does, and is where most rewards can be foreseen.
    """

    def __init__(self, policy: Any) -> None:
        """`policy`: the model, not wrapped."""
        self._trunk, self._words = policy.base_model, policy.get_input_embeddings()
        width, words = policy.config.get_text_config().hidden_size, self._words.embedding_dim
        self._of_state = ValueLayer(width, parts=3).to(policy.device)
        self._of_states = ValueLayer(width, parts=3).to(policy.device)
        self._of_words = ValueLayer(words, parts=3).to(policy.device)

    def values(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(B, length), float32, of `states` (B, length, width), the trunk's last ones before each token, and the `tokens`
        (B, length) that they were read at."""
        states = states.detach()
        with torch.no_grad():
            words = self._words(tokens)
        so_far = self._of_states(states) + self._of_words(words)
        many = torch.arange(1, tokens.size(1) + 1, device=tokens.device)
        return self._of_state(states) + so_far.cumsum(dim=1) / many

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """A list to which each pass of the trunk adds its last hidden states."""
        seen: list[Tensor] = []
        handle = self._trunk.register_forward_hook(lambda *passed: seen.append(passed[-1].last_hidden_state.detach()))
        try:
            yield seen
        finally:
            handle.remove()

    def weights(self) -> dict[str, nn.Parameter]:
        """The layers'."""
        layers = {"state": self._of_state, "states": self._of_states, "words": self._of_words}
        return {f"{name}.{one}": weight for name, layer in layers.items() for one, weight in layer.named_parameters()}

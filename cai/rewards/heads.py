"""The output layer of a reward model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ExactHead(nn.Linear):
    """A linear layer that computes in float32, under autocast too: in bfloat16, rewards that are close would be equal."""

    def forward(self, hidden: Tensor) -> Tensor:
        """The outputs, float32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)


def make_exact(model: Any) -> None:
    """Put an exact layer in the place of a classifier's `score`, with the same weights; others are left as they are."""
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or type(head) is not nn.Linear:  # a quantized layer is a kind of linear one
        return
    exact = ExactHead(head.in_features, head.out_features, head.bias is not None, device=head.weight.device)
    exact.load_state_dict(head.state_dict())
    model.score = exact

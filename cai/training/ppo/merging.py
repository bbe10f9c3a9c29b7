"""Adapters merged into their layers for a while, which are exactly what they were after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, a PEFT model computes with the weights that its active adapters make.

    A copy of the weights is kept meanwhile: taking adapters out again by subtraction would leave a little of each rounding
    behind, rollout after rollout.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [one for one in model.modules() if isinstance(one, BaseTunerLayer) and hasattr(one.get_base_layer(), "weight")]
    kept = [one.get_base_layer().weight.data.clone() for one in layers]
    model.merge_adapter()
    try:
        yield
    finally:
        model.unmerge_adapter()
        for layer, weight in zip(layers, kept, strict=True):
            layer.get_base_layer().weight.data.copy_(weight)

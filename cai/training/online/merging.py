"""Adapters merged into their layers for a while, which are exactly what they were after it; and what adapters are in use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def merged(model: Any) -> Iterator[None]:
    """Inside, a PEFT model computes with the weights that its active adapters make."""
    from cai.training.adapters import QuickLora

    layers = _adapted(model)
    quick = [one for one in layers if isinstance(one, QuickLora) and one.can_merge]
    if len(quick) == len(layers):
        with ExitStack() as merging:
            for one in quick:
                merging.enter_context(one.merging())
            yield
        return
    with kept(model):
        model.merge_adapter()
        try:
            yield
        finally:
            model.unmerge_adapter()


@contextmanager
def kept(model: Any) -> Iterator[None]:
    """After it, the weights under a model's adapters are what they were before: taking adapters out by subtraction leaves a
    little of each rounding behind."""
    layers = [one for one in _adapted(model) if hasattr(one.get_base_layer(), "weight")]
    before = [one.get_base_layer().weight.data.clone() for one in layers]
    try:
        yield
    finally:
        for layer, weight in zip(layers, before, strict=True):
            layer.get_base_layer().weight.data.copy_(weight)


def base_of(model: Any) -> Any:
    """The language model in `model`, which may be adapters of PEFT around it, and nothing around these."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def is_reference(model: Any) -> bool:
    """Whether a model of PEFT computes now as the reference of a trainer of TRL: with no adapters, or with those named ref."""
    return any(one.disable_adapters or "ref" in one.active_adapters for one in _adapted(model))


def _adapted(model: Any) -> list[Any]:
    """The layers with adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [one for one in model.modules() if isinstance(one, BaseTunerLayer)]

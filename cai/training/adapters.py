"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1) in few passes over memory, which is what its layers take on a CPU.

PEFT's layer scales what an adapter says, and adds it to what the layer under it says, in passes over all rows; and so again
on the way back. Here products of matrices add to what is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LoraProduct(torch.autograd.Function):
    """(N, outputs): `x` (N, inputs) through `weight` (outputs, inputs), and through `a` (rank, inputs) and then `b` (outputs,
    rank)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """All of one dtype; `bias` (outputs,)."""
        low = x @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scaling = scaling
        return nn.functional.linear(x, weight, bias).addmm_(low, b.T, alpha=scaling)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: Tensor) -> Any:
        """Of `x`, `a` and `b`."""
        x, weight, a, b, low = ctx.saved_tensors
        low_slope = (slope @ b).mul_(ctx.scaling)
        x_slope = (slope @ weight).addmm_(low_slope, a) if ctx.needs_input_grad[0] else None
        a_slope = low_slope.T @ x if ctx.needs_input_grad[3] else None
        b_slope = slope.T @ (low * ctx.scaling) if ctx.needs_input_grad[4] else None
        return x_slope, None, None, a_slope, b_slope, None


class QuickLora(Linear):
    """PEFT's layer, which computes by `LoraProduct` wherever that says the same but for rounding. It has no second derivatives
    there, and hooks on all modules of a process do not see its parts."""

    def forward(self, x: Tensor, *given: Any, **named: Any) -> Tensor:
        """`x` (..., inputs) to (..., outputs)."""
        if given or named:
            return super().forward(x, *given, **named)
        name, base = self._plain_adapter, self.base_layer
        if name is None:
            is_base = self.merged and not self.disable_adapters
            return base(x) if is_base else super().forward(x)  # PEFT's asks more before it does the same
        casts = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if casts else base.weight.dtype
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        if not casts and {x.dtype, a.dtype, b.dtype} != {dtype}:
            return super().forward(x)
        bias = None if base.bias is None else base.bias.to(dtype)
        parts = (base.weight.to(dtype), bias, a.to(dtype), b.to(dtype), self.scaling[name])
        found: Tensor = LoraProduct.apply(x.reshape(-1, x.size(-1)).to(dtype), *parts)
        return found.view(*x.shape[:-1], found.size(-1))

    @property
    def can_merge(self) -> bool:
        """Whether `merging` can be used: no adapter is in use here, or one that is no more than two matrices."""
        is_idle = not (self.merged or self.disable_adapters or self._in_use)
        return is_idle or self._plain_adapter is not None

    @contextmanager
    def merging(self) -> Iterator[None]:
        """Inside, the layer has the weights that its adapter makes of them. Its own, which other layers may have too, are not
        written to."""
        name, base = self._plain_adapter, self.base_layer
        if name is None:
            yield
            return
        weight, a, b = base.weight, self.lora_A[name].weight.data, self.lora_B[name].weight.data
        both = torch.addmm(weight.data.to(a.dtype), b, a, alpha=self.scaling[name]).to(weight.dtype)
        base.weight = nn.Parameter(both, requires_grad=False)
        self.merged_adapters.append(name)
        try:
            yield
        finally:
            self.merged_adapters.clear()
            base.weight = weight

    @property
    def _in_use(self) -> list[str]:
        return [one for one in self.active_adapters if one in self.lora_A]

    @property
    def _plain_adapter(self) -> str | None:
        """The one that is in use, if it is one, and no more than two matrices whose layer is not trained itself."""
        if self.disable_adapters or self.merged:
            return None
        names = self._in_use
        if len(names) != 1 or names[0] in self.lora_variant:
            return None
        name, base = names[0], self.base_layer
        dropout, parts = self.lora_dropout[name], (base, self.lora_A[name], self.lora_B[name])
        keeps = isinstance(dropout, nn.Identity) or (isinstance(dropout, nn.Dropout) and not (dropout.training and dropout.p))
        trained = any(one.requires_grad for one in base.parameters())
        is_plain = all(map(_is_plain, parts)) and parts[-1].bias is None
        return name if is_plain and keeps and not trained else None


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is its matrix alone: nobody spreads it over processes, computes it otherwise, or watches its passes."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is nn.Linear and "forward" not in vars(layer) and not any(hooks)


def quicken(model: Any) -> None:
    """Let all plain layers of `model` that have adapters of LoRA compute so; what is computed is the same on any device."""
    for one in model.modules():
        if type(one) is Linear:
            one.__class__ = QuickLora

"""Bases of torchao: an `nn.Linear` whose weight is a quantised tensor, such as int8 or float8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchao.quantization import Float8Tensor, Int8Tensor

from ..bases import Kind


def kind_of(name: str, module: nn.Module) -> Kind | None:
    """Return how a linear layer that torchao has quantised is read, None for anything else."""
    if type(module) is not nn.Linear:
        return None
    weight: Any = module.weight
    if not isinstance(weight, (Int8Tensor, Float8Tensor)):
        raise TypeError(
            f"the weight of {name!r} is torchao's {type(weight).__name__}; of its weights int8 and float8 are adapted"
        )
    return _WEIGHT_ONLY if weight.act_quant_kwargs is None else _DYNAMIC


def _weight(module: Any) -> Tensor:
    return module.weight.dequantize()


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return F.linear(x, module.weight, module.bias)  # type: ignore[arg-type]


class _DynamicLinear(torch.autograd.Function):
    """A product with quantised x, which torchao does not differentiate: straight through, with the dequantised W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Any) -> Tensor:
        ctx.module = module
        return _forward(module, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.module.weight.dequantize().to(dy.dtype), None


def _forward_dynamic(module: nn.Module, x: Tensor) -> Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return _DynamicLinear.apply(x, module)
    return _forward(module, x)


_WEIGHT_ONLY = Kind("torchao weight-only linear", True, _weight, _forward)
_DYNAMIC = Kind("torchao linear with dynamic activations", True, _weight, _forward_dynamic)

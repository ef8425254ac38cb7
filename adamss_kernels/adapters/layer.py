"""`AdapterLinear`: what the layers of the related methods share beyond a frozen weight: options, casts and shapes."""

from __future__ import annotations

import contextlib
import math
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases import plain_linear
from ..frozen_linear import FrozenLinear
from ..functional import as_linear_takes_them

_COUNTS = ("rank", "rank_in", "num_bases")
_FACTORS = ("alpha", "omega", "scaling")

Self = TypeVar("Self", bound="AdapterLinear")


class AdapterLinear(FrozenLinear):
    """A frozen linear layer with the trainable update of one method.

    A method adds `adapted`, `with_update` and `update_matrix`.

    Parameters of the update are float32, or float64 over a float64 weight; gradients come back in their dtype.

    Attributes:
        method: Name of the method, the same for the whole class.
        options: The method's settings, by which the layer can be built again over another weight of this shape.
    """

    method: ClassVar[str]

    def __init__(self, weight: Tensor, bias: Tensor | None, **options: Any) -> None:
        """Hold W, bias and options; a method's constructor adds parameters and buffers.

        Raises:
            ValueError: The weight is not a floating (N, D) matrix with N, D >= 1, a rank or number of bases is not an
                integer >= 1, or a factor is not a finite number.
        """
        if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
            raise ValueError(
                f"weight: expected a floating-point matrix (N, D), got {weight.dtype} {tuple(weight.shape)}"
            )
        for name, value in options.items():
            if name in _COUNTS and value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
            if name in _FACTORS and not (type(value) in (int, float) and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        super().__init__(weight, bias)
        self.options = options

    @classmethod
    def from_linear(cls: type[Self], linear: nn.Linear, **options: Any) -> Self:
        """Wrap `linear`, sharing and freezing its parameters; the output is at first the same.

        Args:
            linear: The layer to adapt, on any device; on `meta` only shapes are set up.
            **options: The method's settings.

        Raises:
            ValueError: An option has a value outside its domain, or the weight is empty.
            TypeError: The method has no such option, or `linear` is not exactly an `nn.Linear` with a plain
                floating-point weight.
        """
        plain_linear("linear", linear)
        layer = cls(linear.weight, linear.bias, **options).train(linear.training)
        layer.freeze_base()
        return layer

    def adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Map x (M, D) to y (M, N) with the update, for operands of one dtype and autocast switched off."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to y (..., N), of the dtype that `torch.nn.functional.linear` would return."""
        weight, bias = self.weight, self.bias
        if self.merged:
            return F.linear(x, weight, bias)
        x, weight, bias = as_linear_takes_them(x, weight, bias)
        shape = x.shape
        if x.dim() != 2:
            x = x.reshape(-1, shape[-1])
        with without_autocast(x):
            y = self.adapted(x, weight, bias)
        return y if len(shape) == 2 else y.reshape(*shape[:-1], self.out_features)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros on the weight's device, of the dtype of parameters."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.zeros(shape, dtype=dtype, device=self.weight.device)

    def extra_repr(self) -> str:
        """Summarise the layer for `print(model)`."""
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{options}, merged={self.merged}"
        )


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Switch autocast off inside for the device of `tensor`, where it is on: float32 means float32 there."""
    device_type = tensor.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def kaiming(tensor: Tensor, a: float = math.sqrt(5)) -> Tensor:
    """Fill `tensor` (rows, fan_in) from the Kaiming uniform distribution, with PyTorch's slope for linear layers."""
    return nn.init.kaiming_uniform_(tensor, a=a)

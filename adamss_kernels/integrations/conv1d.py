"""Bases of transformers: `Conv1D`, GPT-2's linear layer, which stores its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..bases import Kind


def kind_of(name: str, module: nn.Module) -> Kind | None:
    """Return how a `Conv1D` is read, None for anything else; see `bases.foreign_kind`."""
    if type(module) is not Conv1D:
        return None
    if type(module._parameters.get("weight")) is not nn.Parameter:
        raise TypeError(
            f"the weight of {name!r} is no plain torch.nn.Parameter; adapt the model before it is quantised"
        )
    return _CONV1D


def _transposed(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def _weight(module: nn.Module) -> Tensor:
    stored: Tensor = module.weight  # type: ignore[assignment]
    return stored.T


_CONV1D = Kind("transformers Conv1D", False, weight=_weight, forward=Conv1D.forward, stored=_transposed)

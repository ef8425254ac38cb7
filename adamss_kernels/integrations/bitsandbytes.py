"""Bases of bitsandbytes: `Linear4bit` (NF4, FP4) and `Linear8bitLt`, whose weights are packed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from bitsandbytes import functional
from bitsandbytes import nn as bnb
from torch import Tensor

from ..bases import Kind

_4BIT = (bnb.Linear4bit, bnb.LinearNF4, bnb.LinearFP4)


def kind_of(name: str, module: Any) -> Kind | None:
    """Return how a linear layer of bitsandbytes is read, None for anything else; see `bases.foreign_kind`."""
    if type(module) in _4BIT:
        if _quant_state(module) is None:
            raise TypeError(f"the weight of {name!r} is not quantised yet: move the model to its device first")
        return _KIND_4BIT
    if type(module) is bnb.Linear8bitLt:
        if module.state.has_fp16_weights:
            raise TypeError(
                f"{name!r} is a Linear8bitLt that quantises its weight anew in each call (has_fp16_weights=True); only "
                "a weight that stays quantised is adapted"
            )
        if module.weight.dtype != torch.int8:
            raise TypeError(f"the weight of {name!r} is not quantised yet: move the model to its device first")
        return _KIND_8BIT
    return None


def _quant_state(module: Any) -> Any:
    # FSDP and moves lose the weight's, which the module has, too.
    return getattr(module.weight, "quant_state", None) or module.quant_state


def _weight_4bit(module: Any) -> Tensor:
    packed, state = module.weight.data, _quant_state(module)
    if getattr(state, "packing_format_for_cpu", False):
        packed, state = functional._convert_weight_packed_for_cpu_inverse(packed, copy.copy(state))
    return functional.dequantize_4bit(packed, state)


def _adopt_4bit(module: Any) -> None:
    """Keep the weight as it is: packed for AVX-512 in eval mode it would be rounded again, and give x no gradient."""
    state = _quant_state(module)
    if getattr(state, "packing_format_for_cpu", False):
        module.weight.data, module.weight.quant_state = functional._convert_weight_packed_for_cpu_inverse(
            module.weight.data, state
        )
    module.support_avx512bf16_for_cpu = False


def _weight_8bit(module: Any) -> Tensor:
    # After the first call the scales are in the state.
    scales = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return functional.int8_vectorwise_dequant(module.weight.data, scales)


_KIND_4BIT = Kind("bitsandbytes Linear4bit", True, _weight_4bit, bnb.Linear4bit.forward, adopt=_adopt_4bit)
_KIND_8BIT = Kind("bitsandbytes Linear8bitLt", True, _weight_8bit, bnb.Linear8bitLt.forward)

"""`merge_and_unload`: a model of plain linear layers again, with the updates folded in."""

from __future__ import annotations

import torch
from torch import nn

from .frozen_linear import FrozenLinear
from .model import adapted_layers, do_nothing, swap
from .offload import is_offloaded


def merge_and_unload(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every adapted layer by a plain `nn.Linear` with the update folded in; there is no way back.

    A `Conv1D` stays one. Of a quantised layer it is the dequantised weight that takes the update; transformers goes on
    calling such a model quantised while its config says so (`del model.config.quantization_config` before saving).

    Parameters that other modules share (tied weights) keep their values there; where that is the head of a
    transformers model, set `model.config.tie_word_embeddings = False` before saving, or loading ties it again. Either
    all layers are replaced or, when an error is raised, none.

    Args:
        model: Changed in place; what `inject_adamss`, `inject_adapter` or `load_adapter` has adapted, merged or not.
        dtype: Of the merged layers; None for that of each frozen weight, dequantised where it is quantised.

    Returns:
        `model` itself, which needs `adamss_kernels` no longer.

    Raises:
        ValueError: `model` has no adapted layer or is one, a merged weight is not finite, or accelerate offloads it;
            the message names it.
    """
    if isinstance(model, FrozenLinear):
        raise ValueError(f"model: is itself a {type(model).__name__}, which cannot be replaced in place; use to_linear")
    linears: dict[nn.Module, nn.Module] = {}
    for name, layer in adapted_layers(model).items():
        if is_offloaded(layer):
            raise ValueError(
                f"{name}: accelerate keeps its weight off its device; save the adapter, and merge it into a model that "
                "is not offloaded"
            )
        try:
            linears[layer] = layer.unloaded(dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if not linears:
        raise ValueError("model: has no FusedAdaMSSLinear or adapter; use inject_adamss or inject_adapter first")
    swap(model, linears)
    for linear in linears.values():
        for key in [key for key, hook in linear._forward_pre_hooks.items() if hook is do_nothing]:
            del linear._forward_pre_hooks[key]
    return model

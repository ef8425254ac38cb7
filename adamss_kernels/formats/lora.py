"""`export_lora`: an adapter as an ordinary LoRA of Hugging Face PEFT, for any server that takes those."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..distributed import full_tensor, unwrap
from ..layout import block_diagonal, column_mask
from ..linear import FusedAdaMSSLinear
from .files import PREFIX, common_header, exportable_layers, saved_tensors, write_checkpoint

logger = logging.getLogger(__name__)


def export_lora(model: nn.Module, directory: str | os.PathLike[str], *, bias: bool = True) -> Path:
    """Write a standard PEFT LoRA checkpoint with equal outputs, for PEFT itself and for multi-LoRA servers.

    Per layer, lora_A (rank, D) = Q = B A, lora_B (N, rank) = C as a dense block-diagonal matrix, and, where the layer
    has a bias, lora_B's bias (N,) = C a's share of S. The rank is RHO, less the ranks of pruned subspaces, and alpha
    equals it, so that LoRA's scaling is 1. Layers without any contributing subspace are left out.

    PEFT cannot merge such a checkpoint where some adapted layers have a bias and others have none. vLLM takes neither
    a bias update nor `modules_to_save`.

    Args:
        model: As for `export_peft`; the base weights are not read.
        directory: Created where missing; receives `adapter_config.json` and `adapter_model.safetensors`.
        bias: False leaves the update of the bias out, for servers that take none; a warning says how large it is.

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: `model` has no AdaMSS layer or one of another method besides, none contributes, or one is registered
            under two names. Nothing is written.
    """
    root, layers = unwrap(model), exportable_layers(model)
    tensors = saved_tensors(root)
    factors = {name: _lora_factors(layer) for name, layer in layers.items() if layer.active.any()}
    if not factors:
        raise ValueError("model: no subspace contributes (all were pruned), and a LoRA checkpoint needs a rank >= 1")

    largest = max(float(q.abs().max()) if q is not None else 0.0 for _, _, q in factors.values())
    with_bias = bias and largest > 0
    if not bias and largest > 0:
        logger.warning("export_lora: left out updates of the bias of up to %.3g", largest)
    for name, (Q, C, bias_update) in factors.items():
        prefix = f"{PREFIX}{name}.lora_"
        tensors |= {f"{prefix}A.weight": Q, f"{prefix}B.weight": C}
        if with_bias:
            tensors[f"{prefix}B.bias"] = C.new_zeros(C.shape[0]) if bias_update is None else bias_update

    # PEFT takes the first pattern that is a suffix of a name, so the longest comes first.
    ranks = {name: factors[name][0].shape[0] for name in sorted(factors, key=len, reverse=True)}
    largest_rank = max(ranks.values())
    patterns = ranks if min(ranks.values()) != largest_rank else {}
    header = {
        "r": largest_rank,
        "lora_alpha": largest_rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "lora_bias": with_bias,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    header |= common_header("LORA", root, factors)
    return write_checkpoint(model, directory, header, tensors)


@torch.no_grad()
def _lora_factors(layer: FusedAdaMSSLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return lora_A (rank, D), lora_B (N, rank) and the update of the bias (N,), computed in float64."""
    B, C = full_tensor(layer.B), full_tensor(layer.C)
    rho = layer.layout.rho
    contributes = column_mask(layer.active, layer.offsets, rho)
    dense = block_diagonal(C.double(), layer.row_subspace, layer.offsets, rho)[contributes].T
    B_active = B.double()[contributes]
    bias_update = None
    if layer.basis_bias is not None:
        bias_update = (dense @ (B_active @ layer.basis_bias.double())).to(B.dtype)
    return (B_active @ full_tensor(layer.basis).double()).to(B.dtype), dense.to(C.dtype), bias_update

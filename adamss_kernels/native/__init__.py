"""Backend `native`: the C++ library of csrc/cpu around PyTorch's own GEMMs.

The library computes what is skinny or indexed, in one pass over each large operand; the base GEMM then accumulates
onto its result, so that the update costs no pass over y or dx of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .importance import accumulate_importance, measure_importance
from .library import describe, why_not_loaded

__all__ = ["accumulate_importance", "backward", "describe", "forward", "measure_importance", "unavailable"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)

# Their kernels are csrc/cpu/operators.cpp's; nothing traces them, so they have no fakes.
_library = torch.library.Library("adamss_kernels", "FRAGMENT")
_library.define(
    "native_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? basis, Tensor? basis_bias, Tensor B, Tensor C, "
    "Tensor row_subspace, Tensor offsets, Tensor? active, bool keep_S, bool keep_P) -> (Tensor y, Tensor S, Tensor P)"
)
_library.define(
    "native_backward(Tensor dy, Tensor? x, Tensor? S, Tensor? P, Tensor weight, Tensor? basis, Tensor? basis_bias, "
    "Tensor B, Tensor C, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable, bool need_dx, "
    "bool need_dB, bool need_dC) -> (Tensor dx, Tensor dB, Tensor dC)"
)

forward = torch.ops.adamss_kernels.native_forward.default
"""Compute `reference.forward`."""

_backward = torch.ops.adamss_kernels.native_backward.default


def unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or None; None leaves an argument open."""
    if device_type not in (None, "cpu"):
        return "it runs on the CPU only"
    if dtype is not None and dtype not in _DTYPES:
        return "it takes float32, float64 and bfloat16 only"
    return why_not_loaded()


def backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor,
    basis: Tensor | None,
    basis_bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    row_subspace: Tensor,
    offsets: Tensor,
    active: Tensor | None,
    trainable: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `reference.backward`."""
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    dx, dB, dC = _backward(
        dy, x, S, P, weight, basis, basis_bias, B, C, row_subspace, offsets, active, trainable, need_dx, need_dB,
        need_dC,
    )  # fmt: skip
    if need_dweight:
        assert x is not None
        dweight = torch.mm(dy.t(), x)
    else:
        dweight = dy.new_empty(0)
    return dx, dweight, dy.sum(0) if need_dbias else dy.new_empty(0), dB, dC

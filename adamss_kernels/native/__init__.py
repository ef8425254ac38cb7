"""Backend `native`: the C++ library of csrc/cpu around PyTorch's own GEMMs.

The library computes what is skinny or indexed, in one pass over each large operand; the base GEMM then accumulates
onto its result, so that the update costs no pass over y or dx of its own.
"""

from __future__ import annotations

import torch

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
    "Tensor B, Tensor C, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable, bool[] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dB, Tensor dC)"
)

forward = torch.ops.adamss_kernels.native_forward.default
"""Compute `reference.forward`."""

backward = torch.ops.adamss_kernels.native_backward.default
"""Compute `reference.backward`."""


def unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or None; None leaves an argument open."""
    if device_type not in (None, "cpu"):
        return "it runs on the CPU only"
    if dtype is not None and dtype not in _DTYPES:
        return "it takes float32, float64 and bfloat16 only"
    return why_not_loaded()

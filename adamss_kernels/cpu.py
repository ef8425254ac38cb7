"""Backend `cpu`: the C++ library of csrc/cpu around PyTorch's own GEMMs.

The library computes what is skinny or indexed, in one pass over each large operand; the base GEMM then accumulates
onto its result, so that the update costs no pass over y or dx of its own.
"""

from __future__ import annotations

import torch

from .compiled import why_not_loaded
from .compiled.cpu_library import describe, load

__all__ = ["describe", "why_unavailable"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def why_unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or None; None leaves an argument open."""
    if device_type not in (None, "cpu"):
        return "it runs on the CPU only"
    if dtype is not None and dtype not in _DTYPES:
        return "it takes float32, float64 and bfloat16 only"
    return why_not_loaded(load)

"""`Subspaces`: what a layer's kernels need beside W, B and C, frozen while it trains: basis, row map and masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Subspaces(NamedTuple):
    """The frozen operands of an update, in the order in which every operator takes them.

    Attributes:
        basis: A (R, D), any floating dtype; None for the identity, as in LoRA: then B is (RHO, D) and Q = B.
        basis_bias: a (R,) or None.
        row_subspace: (N,) int32, the subspace that owns each row.
        offsets: (K + 1,) int32; columns offsets[k] to offsets[k + 1] of S belong to subspace k.
        active: (K,) bool, subspaces that contribute; None for all.
        trainable: (K,) bool, subspaces whose B and C get gradients; None for all.
        contributes: False promises that no subspace is active, so that the frozen layer alone is computed.
        learns: False promises that no subspace is active and trainable, so that nothing is kept for B and C.
    """

    basis: Tensor | None
    basis_bias: Tensor | None
    row_subspace: Tensor
    offsets: Tensor
    active: Tensor | None = None
    trainable: Tensor | None = None
    contributes: bool = True
    learns: bool = True


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums over D, N or M are kept for operands of `dtype`: float32, or float64 for it."""
    return torch.promote_types(dtype, torch.float32)

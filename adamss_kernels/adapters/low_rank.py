"""Layers whose update is of low rank: one subspace that owns every row, on AdaMSS's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..added_update import add_update
from ..functional import fused_linear
from ..subspaces import Subspaces
from .layer import AdapterLinear, without_autocast


class LowRankLinear(AdapterLinear):
    """A layer with an update of rank r: it holds the row map of the one subspace that AdaMSS's kernels are told of.

    Attributes:
        row_subspace: (N,) int32 buffer, all zero.
        offsets: (2,) int32 buffer, 0 and r.
    """

    row_subspace: Tensor
    offsets: Tensor

    def bind_subspace(self, rank: int) -> None:
        """Make the row map for an update of this rank, on the weight's device."""
        device = self.weight.device
        rows = torch.zeros(self.out_features, dtype=torch.int32, device=device)
        self.register_buffer("row_subspace", rows, persistent=False)
        self.register_buffer("offsets", torch.tensor([0, rank], dtype=torch.int32, device=device), persistent=False)
        self._rank = rank

    def subspaces(self, basis: Tensor | None = None) -> Subspaces:
        """Return what the kernels take beside W, B and C: the one subspace, behind `basis` (R, D) or none."""
        return Subspaces(basis, None, self.row_subspace, self.offsets)

    def factors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return B (r, R), C (N, r) and A (R, D) as AdaMSS's kernels take them: dW = C B A, or C B where A is None.

        Without A backward keeps x and S = x B^T (M, r).
        """
        raise NotImplementedError

    def adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Map x (M, D) to y (M, N)."""
        B, C, basis = self.factors()
        return fused_linear(x, weight, bias, B, C, self.subspaces(basis))

    def with_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., N) plus the update, in y's memory."""
        with without_autocast(x):
            B, C, basis = self.factors()
        return add_update(y, x, B, C, self.subspaces(basis))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        super()._apply(fn, recurse)
        # Kernels index by the row map, and `to_empty` leaves garbage in it.
        self.bind_subspace(self._rank)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The weight may be another one, on another device.
        self.bind_subspace(self._rank)

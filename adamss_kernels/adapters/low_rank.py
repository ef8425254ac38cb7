"""Layers whose update is of low rank: one subspace that owns every row, on AdaMSS's kernels where those are faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..functional import apply, first_order
from .layer import AdapterLinear, without_autocast

_KERNEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


class LowRankLinear(AdapterLinear):
    """A layer with an update V U of rank r: it holds the row map of the one subspace that AdaMSS's kernels are told of.

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

    def add_product(self, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
        """Return y = x W^T + bias + (x U^T) V^T: (M, N), differentiable once in every argument.

        On the CPU that is AdaMSS's operator with U as its B, V as its C and no basis. Elsewhere, and in float16, three
        GEMMs. Backward keeps x and S = x U^T (M, r).

        Args:
            x: (M, D).
            weight: W (N, D), dtype of x.
            bias: (N,), dtype of x, or None.
            U: (r, D), any floating dtype.
            V: (N, r), any floating dtype.
        """
        y: Tensor
        if x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES:
            subspace = (self.row_subspace, self.offsets, None, None)
            y = apply(x, weight, bias, None, None, U, V, *subspace, True, True, "input", "auto")
        else:
            y = _LowRank.apply(x, weight, bias, U, V)
        return y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        super()._apply(fn, recurse)
        # Kernels index by the row map, and `to_empty` leaves garbage in it.
        self.bind_subspace(self._rank)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # The weight may be another one, on another device.
        self.bind_subspace(self._rank)


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor) -> Tensor:
        _, need_dweight, _, need_dU, need_dV = ctx.needs_input_grad
        S = torch.mm(x, U.to(x.dtype).t())
        Vt = V.to(x.dtype).t()
        # The update comes first, so that the base GEMM accumulates onto it where a bias would have been broadcast.
        y = torch.mm(S, Vt) if bias is None else torch.addmm(bias, S, Vt)
        y.addmm_(x, weight.t())
        ctx.save_for_backward(x if need_dweight or need_dU else None, S if need_dV else None, weight, U, V)
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        x, S, weight, U, V = saved
        need_dx, need_dweight, need_dbias, need_dU, need_dV = ctx.needs_input_grad
        dx = dweight = dbias = dU = dV = None
        with without_autocast(dy):
            if need_dx or need_dU:
                dS = torch.mm(dy, V.to(dy.dtype))
            if need_dx:
                dx = torch.mm(dS, U.to(dy.dtype))
                dx.addmm_(dy, weight)
            if need_dU:
                dU = torch.mm(dS.t(), x).to(U.dtype)
            if need_dV:
                dV = torch.mm(dy.t(), S).to(V.dtype)
            if need_dweight:
                dweight = torch.mm(dy.t(), x)
            if need_dbias:
                dbias = dy.sum(0)
        return dx, dweight, dbias, dU, dV

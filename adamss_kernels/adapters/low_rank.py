"""`low_rank_linear`: a frozen linear layer plus a low-rank update whose two factors both train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layer import without_autocast


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, scaling: float = 1.0
) -> Tensor:
    """Return y = x W^T + bias + scaling (x U^T) V^T: (M, N), without a separate pass that adds the update.

    Differentiable once in x, weight, bias, U and V. Backward keeps x and S = scaling x U^T (M, r).

    Args:
        x: (M, D).
        weight: W (N, D), dtype of x.
        bias: (N,), dtype of x, or None.
        U: (r, D), any floating dtype.
        V: (N, r), any floating dtype.
        scaling: A constant factor of the update.
    """
    y: Tensor = _LowRankLinear.apply(x, weight, bias, U, V, scaling)
    return y


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, U: Tensor, V: Tensor, scaling: float
    ) -> Tensor:
        _, need_dweight, _, need_dU, need_dV, _ = ctx.needs_input_grad
        S = torch.mm(x, U.to(x.dtype).t())
        if scaling != 1:
            S *= scaling
        Vt = V.to(x.dtype).t()
        # The update comes first, so that the base GEMM accumulates onto it where a bias would have been broadcast.
        y = torch.mm(S, Vt) if bias is None else torch.addmm(bias, S, Vt)
        y.addmm_(x, weight.t())
        ctx.scaling = scaling
        ctx.save_for_backward(x if need_dweight or need_dU else None, S if need_dV else None, weight, U, V)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, S, weight, U, V = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, need_dU, need_dV, _ = ctx.needs_input_grad
        dx = dweight = dbias = dU = dV = None
        with without_autocast(dy):
            if need_dx or need_dU:
                dS = torch.mm(dy, V.to(dy.dtype))
                if ctx.scaling != 1:
                    dS *= ctx.scaling
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
        return dx, dweight, dbias, dU, dV, None

"""The formula of `adamss_linear` in plain PyTorch, where no kernel serves: transforms and derivatives of derivatives.

Everything here is differentiable any number of times, in forward and in reverse mode, and `torch.func` maps over it.
It computes in `accumulation_dtype` and rounds once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .layout import column_mask, gather_index
from .subspaces import Subspaces, accumulation_dtype


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, B: Tensor, C: Tensor, subspaces: Subspaces) -> Tensor:
    """Return y = x W^T + bias + S C^T with S = (x A^T + a) B^T: (..., N), dtype of x.

    Args:
        x: (..., D).
        weight: W (N, D), dtype of x.
        bias: (N,), dtype of x, or None.
        B: (RHO, R), or (RHO, D) without a basis.
        C: (N, r_max).
        subspaces: Basis, row map and masks; B and C are constants where a subspace is not trainable.
    """
    return F.linear(x, weight, bias) + update(x, B, C, subspaces)


def update(x: Tensor, B: Tensor, C: Tensor, subspaces: Subspaces) -> Tensor:
    """Return S C^T alone: (..., N), dtype of x; arguments as of `forward`."""
    factors = _factors(B, C, subspaces, accumulation_dtype(x.dtype))
    return (_S(x, factors) @ factors.Ct).to(x.dtype)


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of `forward` for two-dimensional x, as `reference.backward` does, None where not wanted.

    x is needed for dweight, dB and dC. Without a weight dx is that of `update` alone.
    """
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    acc = accumulation_dtype(dy.dtype)
    factors = _factors(B, C, subspaces, acc)
    learns = factors.contributes if subspaces.trainable is None else factors.contributes & factors.trains
    dS = (dy.to(acc) @ factors.Ct.T).masked_fill(~factors.contributes, 0)
    dx = dweight = dbias = dB = dC = None
    if need_dx:
        Q = factors.B if subspaces.basis is None else factors.B @ subspaces.basis.to(acc)
        dx = (dS @ Q).to(dy.dtype)
        if weight is not None:
            dx = dy @ weight + dx
    if need_dB:
        assert x is not None
        dB = (dS.T @ _P(x, subspaces, acc)).masked_fill(~learns[:, None], 0).to(B.dtype)
    if need_dC:
        assert x is not None
        dCt = (_S(x, factors).T @ dy.to(acc)).masked_fill(~learns[:, None], 0)
        dC = F.pad(dCt, (0, 0, 0, 1)).T.gather(1, factors.columns).to(C.dtype)
    if need_dweight:
        assert x is not None
        dweight = dy.T @ x
    if need_dbias:
        dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


class _Factors(NamedTuple):
    """B and C^T as the products take them, and which of their columns contribute and train."""

    B: Tensor  # (RHO, R)
    Ct: Tensor  # (RHO, N), block-diagonal
    columns: Tensor  # (N, r_max) int64, see `gather_index`
    contributes: Tensor  # (RHO,) bool
    trains: Tensor  # (RHO,) bool
    subspaces: Subspaces


def _factors(B: Tensor, C: Tensor, subspaces: Subspaces, acc: torch.dtype) -> _Factors:
    _, _, row_subspace, offsets, active, trainable, *_ = subspaces
    rho, everyone = B.shape[0], torch.ones(offsets.shape[0] - 1, dtype=torch.bool, device=offsets.device)
    contributes, trains = (column_mask(everyone if m is None else m, offsets, rho) for m in (active, trainable))
    B, C = B.to(acc), C.to(acc)
    if trainable is not None:
        B = torch.where(trains[:, None], B, B.detach())
        C = torch.where(trainable[row_subspace.long()][:, None], C, C.detach())
    columns = gather_index(row_subspace, offsets, C.shape[1])
    # Structural zeros of C land in an extra last row, which is cut off. Out of place, so that C may be mapped over.
    Ct = C.new_zeros(rho + 1, C.shape[0]).scatter(0, columns.T, C.T)[:rho]
    return _Factors(B, Ct, columns, contributes, trains, subspaces)


def _P(x: Tensor, subspaces: Subspaces, acc: torch.dtype) -> Tensor:
    basis, basis_bias, *_ = subspaces
    if basis is None:
        return x.to(acc)
    return F.linear(x.to(acc), basis.to(acc), None if basis_bias is None else basis_bias.to(acc))


def _S(x: Tensor, factors: _Factors) -> Tensor:
    S = _P(x, factors.subspaces, factors.B.dtype) @ factors.B.T
    return S.masked_fill(~factors.contributes, 0)

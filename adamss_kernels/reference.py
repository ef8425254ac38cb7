"""The specification: forward and closed-form backward of `adamss_linear` in plain PyTorch.

Letters and shapes are those of docs/notation.md. Products over tokens run in the dtype of x with the accumulation
that PyTorch's GEMM gives; S and the parameter gradients are handed over in `accumulation_dtype(x.dtype)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import block_diagonal, column_mask, gather_index
from .subspaces import Subspaces, accumulation_dtype


def why_unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`: it always can."""
    return None


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    keep_S: bool,
    keep_P: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute y = x W^T + bias + S C^T with C^T the (RHO, N) block-diagonal of C, and what backward needs of it.

    Without a basis B (RHO, D) takes x itself: Q = B.

    Returns:
        y (M, N), dtype of x.
        S (M, RHO), accumulation dtype; empty (0,) unless `keep_S`.
        P (M, R), dtype of x; empty (0,) unless `keep_P`.
    """
    basis, basis_bias, row_subspace, offsets, active, *_ = subspaces
    acc = accumulation_dtype(x.dtype)
    if keep_P:
        assert basis is not None
        At = basis.T.to(x.dtype)
        P = x @ At if basis_bias is None else torch.addmm(basis_bias.to(x.dtype), x, At)
        S = (P @ B.T.to(x.dtype)).to(acc)
    else:
        P = x.new_empty(0)
        Q, q = input_projection(basis, basis_bias, B, acc)
        S = (x @ Q.T.to(x.dtype)).to(acc)
        if q is not None:
            S += q
    if active is not None:
        S = S.masked_fill(~column_mask(active, offsets, B.shape[0]), 0)

    Ct = block_diagonal(C.to(x.dtype), row_subspace, offsets, B.shape[0])
    # The update comes first, so that the base GEMM accumulates onto it where a bias would have been broadcast.
    y = S.to(x.dtype) @ Ct if bias is None else torch.addmm(bias, S.to(x.dtype), Ct)
    y.addmm_(x, weight.T)
    return y, S if keep_S else x.new_empty(0, dtype=acc), P


def backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`, closed form.

    dS = dy C, dC^T = S^T dy at the places of C, dB = dS^T P (P itself, or through x), dx = dy W + dS Q.

    Of dy (M, N), x (M, D), S (M, RHO) and P (M, R), x is needed for dweight, and for dB where P is None; S for dC.
    Without a basis P is x.
    `needs` says whether dx, dweight, dbias, dB and dC are wanted.

    Returns:
        dx (M, D), dweight (N, D), dbias (N,), dB (RHO, R), dC (N, r_max), each in its operand's dtype; empty (0,)
        where not wanted. Rows of subspaces that are not both active and trainable are zero in dB and dC.
    """
    basis, basis_bias, row_subspace, offsets, active, trainable, *_ = subspaces
    acc = accumulation_dtype(dy.dtype)
    rho = B.shape[0]
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    dx, dweight, dbias, dB, dC = (dy.new_empty(0, dtype=t.dtype) for t in (dy, dy, dy, B, C))

    contributes = None if active is None else column_mask(active, offsets, rho)
    learns = contributes
    if trainable is not None:
        learns = column_mask(trainable if active is None else trainable & active, offsets, rho)

    if need_dx or need_dB:
        Ct = block_diagonal(C.to(dy.dtype), row_subspace, offsets, rho)
        dS = (dy @ Ct.T).to(acc)
        if contributes is not None:
            dS = dS.masked_fill(~contributes, 0)
    if need_dx:
        Q, _ = input_projection(basis, None, B, acc)
        dx = dS.to(dy.dtype) @ Q.to(dy.dtype)
        dx.addmm_(dy, weight)
    if need_dB:
        if P is not None:
            dB = (dS.to(dy.dtype).T @ P).to(acc)
        else:
            assert x is not None and basis is not None
            dB = (dS.to(dy.dtype).T @ x).to(acc) @ basis.T.to(acc)
            if basis_bias is not None:
                dB += torch.outer(dS.sum(0), basis_bias.to(acc))
        dB = _only(learns, dB).to(B.dtype)
    if need_dC:
        assert S is not None
        dCt = _only(learns, (S.to(dy.dtype).T @ dy).to(acc))
        dCt = torch.cat((dCt, dCt.new_zeros(1, dCt.shape[1])))
        dC = dCt.T.gather(1, gather_index(row_subspace, offsets, C.shape[1])).to(C.dtype)
    if need_dweight:
        assert x is not None
        dweight = dy.T @ x
    if need_dbias:
        dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def input_projection(
    basis: Tensor | None, basis_bias: Tensor | None, B: Tensor, acc: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return Q = B A (RHO, D) and q = B a (RHO,), which take x to S = x Q^T + q, in `acc`; Q = B without A."""
    B = B.to(acc)
    return B if basis is None else B @ basis.to(acc), None if basis_bias is None else B @ basis_bias.to(acc)


def _only(columns: Tensor | None, grad: Tensor) -> Tensor:
    """Zero the rows of `grad` (RHO, ...) outside the mask `columns` (RHO,); None keeps all."""
    return grad if columns is None else grad.masked_fill(~columns[:, None], 0)

"""The specification: forward and closed-form backward of `adamss_linear` in plain PyTorch.

Letters and shapes are those of docs/notation.md. Products over tokens run in the dtype of x with the accumulation
that PyTorch's GEMM gives; S and the parameter gradients are handed over in `accumulation_dtype(x.dtype)`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import block_diagonal, column_mask, gather_index
from .mixed_batch import Groups
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
    S, P, Ct = _factors(x, B, C, subspaces, keep_P)
    # The update comes first, so that the base GEMM accumulates onto it where a bias would have been broadcast.
    y = S.to(x.dtype) @ Ct if bias is None else torch.addmm(bias, S.to(x.dtype), Ct)
    y.addmm_(x, weight.T)
    return y, S if keep_S else x.new_empty(0, dtype=S.dtype), P


def add_update(
    y: Tensor, x: Tensor, B: Tensor, C: Tensor, subspaces: Subspaces, keep_S: bool, keep_P: bool
) -> tuple[Tensor, Tensor]:
    """Add S C^T to y (M, N) in place, in y's dtype, which x has too; return S and P as `forward` does."""
    S, P, Ct = _factors(x, B, C, subspaces, keep_P)
    y.addmm_(S.to(x.dtype), Ct)
    return S if keep_S else x.new_empty(0, dtype=S.dtype), P


def _factors(x: Tensor, B: Tensor, C: Tensor, subspaces: Subspaces, keep_P: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return S (M, RHO), P or an empty tensor, and C^T (RHO, N) in x's dtype."""
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
    return S, P, block_diagonal(C.to(x.dtype), row_subspace, offsets, B.shape[0])


def backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`, closed form; without a weight those of `add_update`, in which y goes through.

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
        if weight is not None:
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


def grouped_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    groups: Groups,
    keep_S: bool,
    keep_P: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `forward` with the B, C and masks of another adapter for each group of tokens.

    Args:
        x: (M, D).
        weight: W (N, D), of all groups, as is the basis.
        bias: (N,) or None.
        B: (slots, RHO, R).
        C: (slots, N, r_max).
        subspaces: With masks (slots, K).
        groups: Which tokens take which slot; those that take none get the base layer alone, and zeros in S.
        keep_S: As in `forward`.
        keep_P: As in `forward`.

    Returns:
        y, S and P, as `forward`, for all tokens in their order.
    """
    M, N = x.shape[0], weight.shape[0]
    y = x.new_empty(M, N)
    S = x.new_zeros((M, B.shape[1]) if keep_S else 0, dtype=accumulation_dtype(x.dtype))
    P = x.new_zeros((M, B.shape[2]) if keep_P else 0)
    for slot, tokens in _by_slot(groups):
        if slot is None:
            y[tokens] = torch.nn.functional.linear(x[tokens], weight, bias)
            continue
        found = forward(x[tokens], weight, bias, B[slot], C[slot], _of_slot(subspaces, slot), keep_S, keep_P)
        for whole, part, kept in zip((y, S, P), found, (True, keep_S, keep_P), strict=True):
            if kept:
                whole[tokens] = part
    return y, S, P


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    groups: Groups,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `grouped_forward`, as `backward` does.

    Returns:
        As `backward`, but dB (G, RHO, R) and dC (G, N, r_max) for the G groups, zero for those without tokens.
    """
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    G = groups.slots.shape[0]
    dx = dy.new_empty((dy.shape[0], weight.shape[1]) if need_dx else 0)
    dB = B.new_zeros((G, *B.shape[1:]) if need_dB else 0)
    dC = C.new_zeros((G, *C.shape[1:]) if need_dC else 0)
    for group, (slot, tokens) in enumerate(_by_slot(groups)):
        if slot is None:
            if need_dx:
                dx[tokens] = dy[tokens] @ weight
            continue
        x_g, S_g, P_g = (None if t is None else t[tokens] for t in (x, S, P))
        of_slot = (weight, B[slot], C[slot], _of_slot(subspaces, slot))
        dx_g, _, _, dB_g, dC_g = backward(
            dy[tokens], x_g, S_g, P_g, *of_slot, [need_dx, False, False, need_dB, need_dC]
        )
        if need_dx:
            dx[tokens] = dx_g
        if need_dB:
            dB[group] = dB_g
        if need_dC:
            dC[group] = dC_g
    dweight, dbias = dy.new_empty(0), dy.new_empty(0)
    if need_dweight:
        assert x is not None
        dweight = dy.T @ x
    if need_dbias:
        dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def _by_slot(groups: Groups) -> Iterator[tuple[int | None, Tensor]]:
    """Yield the slot and the tokens of each group, and at the end None and those that take no adapter."""
    starts = groups.starts.tolist()
    for slot, begin, end in zip(groups.slots.tolist(), starts, starts[1:], strict=False):
        yield slot, groups.tokens[begin:end]
    yield None, groups.tokens[starts[-1] :]


def _of_slot(subspaces: Subspaces, slot: int) -> Subspaces:
    active, trainable = (None if mask is None else mask[slot] for mask in subspaces[4:6])
    return subspaces._replace(active=active, trainable=trainable)


def input_projection(
    basis: Tensor | None, basis_bias: Tensor | None, B: Tensor, acc: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return Q = B A (RHO, D) and q = B a (RHO,), which take x to S = x Q^T + q, in `acc`; Q = B without A."""
    B = B.to(acc)
    return B if basis is None else B @ basis.to(acc), None if basis_bias is None else B @ basis_bias.to(acc)


def _only(columns: Tensor | None, grad: Tensor) -> Tensor:
    """Zero the rows of `grad` (RHO, ...) outside the mask `columns` (RHO,); None keeps all."""
    return grad if columns is None else grad.masked_fill(~columns[:, None], 0)

"""Backend `native`: the C++ library of csrc/cpu around PyTorch's own GEMMs.

The library computes what is skinny or indexed, in one pass over each large operand; the base GEMM then accumulates
onto its result, so that the update costs no pass over y or dx of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .library import BackwardArgs, ForwardArgs, Layout, describe, load, pointer, why_not_loaded

__all__ = ["backward", "describe", "forward", "unavailable"]

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}


def unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or None; None leaves an argument open."""
    if device_type not in (None, "cpu"):
        return "it runs on the CPU only"
    if dtype is not None and dtype not in _DTYPES:
        return "it takes float32, float64 and bfloat16 only"
    return why_not_loaded()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    basis_bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    row_subspace: Tensor,
    offsets: Tensor,
    active: Tensor | None,
    keep_S: bool,
    keep_P: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference.forward`."""
    (M, _), N, rho = x.shape, weight.shape[0], B.shape[0]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    B = B.to(acc)
    if keep_P:
        At = basis.to(x.dtype).t()
        P = torch.mm(x, At) if basis_bias is None else torch.addmm(basis_bias.to(x.dtype), x, At)
        source, Q, q = P, B.contiguous(), None
    else:
        P = x.new_empty(0)
        source, Q = _rows(x), torch.mm(B, basis.to(acc))
        q = None if basis_bias is None else torch.mv(B, basis_bias.to(acc))
    S = x.new_empty((M, rho) if keep_S else 0, dtype=acc)
    y = x.new_empty(M, N)
    bias = None if bias is None else bias.contiguous()
    C = C.to(acc).contiguous()
    layout = _layout(row_subspace, offsets, active, None)
    load().forward(
        ForwardArgs(
            _DTYPES[x.dtype], M, source.shape[1], source.data_ptr(), source.stride(0), Q.data_ptr(), pointer(q),
            pointer(bias), C.data_ptr(), C.shape[1], S.data_ptr() if keep_S else None, y.data_ptr(), layout,
        )
    )  # fmt: skip
    y.addmm_(x, weight.t())
    return y, S, P


def backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor,
    basis: Tensor,
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
    (M, N), D, rho = dy.shape, weight.shape[1], B.shape[0]
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dx, dweight, dbias, dB, dC = (dy.new_empty(0, dtype=t.dtype) for t in (dy, dy, dy, B, C))

    if need_dx or need_dB or need_dC:
        dy = _rows(dy)
        B_acc, C_acc = B.to(acc), C.to(acc).contiguous()
        source = None
        if need_dB:
            source = x if P is None else P
            assert source is not None
            source = _rows(source)
        width = 0 if source is None else source.shape[1]
        Q = torch.mm(B_acc, basis.to(acc)) if need_dx else None
        dx = dy.new_empty((M, D) if need_dx else 0)
        dQ = dy.new_empty(rho, width, dtype=acc)
        dq = dy.new_empty(rho, dtype=acc)
        dC_acc = torch.empty_like(C_acc)
        load().backward(
            BackwardArgs(
                _DTYPES[dy.dtype], M, width, dy.data_ptr(), dy.stride(0), pointer(source),
                0 if source is None else source.stride(0), pointer(S if need_dC else None), D, pointer(Q),
                C_acc.data_ptr(), C_acc.shape[1], dx.data_ptr() if need_dx else None,
                dQ.data_ptr() if need_dB else None, dq.data_ptr(), dC_acc.data_ptr() if need_dC else None,
                _layout(row_subspace, offsets, active, trainable),
            )
        )  # fmt: skip
        if need_dx:
            dx.addmm_(dy, weight)
        if need_dB:
            if P is None:
                dQ = torch.mm(dQ, basis.to(acc).t())
                if basis_bias is not None:
                    dQ.addr_(dq, basis_bias.to(acc))
            dB = dQ.to(B.dtype)
        if need_dC:
            dC = dC_acc.to(C.dtype)
    if need_dweight:
        assert x is not None
        dweight = torch.mm(dy.t(), x)
    if need_dbias:
        dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def _rows(t: Tensor) -> Tensor:
    """Return t (M, D) with contiguous rows, copied only where they are not (an expanded gradient, a transpose)."""
    return t if t.stride(1) == 1 else t.contiguous()


def _layout(row_subspace: Tensor, offsets: Tensor, active: Tensor | None, trainable: Tensor | None) -> Layout:
    return Layout(
        row_subspace.shape[0],
        offsets.shape[0] - 1,
        row_subspace.data_ptr(),
        offsets.data_ptr(),
        pointer(active),
        pointer(trainable),
    )

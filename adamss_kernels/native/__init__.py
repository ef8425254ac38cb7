"""Backend `native`: the C++ library of csrc/cpu around PyTorch's own GEMMs.

The library computes what is skinny or indexed, in one pass over each large operand; the base GEMM then accumulates
onto its result, so that the update costs no pass over y or dx of its own.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .importance import accumulate_importance, measure_importance
from .library import BackwardArgs, ForwardArgs, Layout, describe, load, pointer, why_not_loaded

__all__ = ["accumulate_importance", "backward", "describe", "forward", "measure_importance", "unavailable"]

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
    basis: Tensor | None,
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
    M, N = x.shape[0], weight.shape[0]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    P = x.new_empty(0)
    if keep_P:
        assert basis is not None
        At = basis.to(x.dtype).t()
        P = torch.mm(x, At) if basis_bias is None else torch.addmm(basis_bias.to(x.dtype), x, At)
        source, A, a = P, None, None
    else:
        source, A, a = _rows(x), _dense(basis, acc), _dense(basis_bias, acc)
    bias, B, C = _dense(bias, x.dtype), _dense(B, acc), _dense(C, acc)
    active = _dense(active, torch.bool)
    S = x.new_empty((M, B.shape[0]) if keep_S else 0, dtype=acc)
    y = x.new_empty(M, N)
    load().forward(
        # In the order of csrc/cpu/interface.h; keywords would take longer than a small layer's kernel.
        ForwardArgs(
            _DTYPES[x.dtype],
            M,
            source.shape[1],
            B.shape[1],
            source.data_ptr(),
            source.stride(0),
            pointer(A),
            pointer(a),
            B.data_ptr(),
            pointer(bias),
            C.data_ptr(),
            C.shape[1],
            S.data_ptr() if keep_S else None,
            y.data_ptr(),
            _layout(row_subspace, offsets, active, None),
        )
    )
    y.addmm_(x, weight.t())
    return y, S, P


def backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor,
    basis: Tensor | None,
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
    acc = torch.float64 if dy.dtype == torch.float64 else torch.float32
    rows, source, projection = _rows(dy), None, None
    if need_dB and basis is None:
        # Then x is what B takes, in the place of P.
        P = x
    if need_dB and P is not None:
        projection = _rows(P)
    elif need_dB:
        assert x is not None
        source = _rows(x)
    A, a, B_acc, C_acc = _dense(basis, acc), _dense(basis_bias, acc), _dense(B, acc), _dense(C, acc)
    active, trainable = _dense(active, torch.bool), _dense(trainable, torch.bool)
    dx = dy.new_empty((dy.shape[0], weight.shape[1]) if need_dx else 0)
    dB = B_acc.new_empty(B.shape if need_dB else 0)
    dC = C_acc.new_empty(C.shape if need_dC else 0)
    load().backward(
        # In the order of csrc/cpu/interface.h.
        BackwardArgs(
            _DTYPES[dy.dtype],
            dy.shape[0],
            weight.shape[1],
            B.shape[1],
            rows.data_ptr(),
            rows.stride(0),
            pointer(source),
            0 if source is None else source.stride(0),
            pointer(projection),
            0 if projection is None else projection.stride(0),
            pointer(S) if need_dC else None,
            pointer(A),
            pointer(a),
            B_acc.data_ptr(),
            C_acc.data_ptr(),
            C.shape[1],
            dx.data_ptr() if need_dx else None,
            dB.data_ptr() if need_dB else None,
            dC.data_ptr() if need_dC else None,
            _layout(row_subspace, offsets, active, trainable),
        )
    )
    if need_dx:
        dx.addmm_(dy, weight)
    if need_dweight:
        assert x is not None
        dweight = torch.mm(dy.t(), x)
    else:
        dweight = dy.new_empty(0)
    dbias = dy.sum(0) if need_dbias else dy.new_empty(0)
    return dx, dweight, dbias, dB.to(B.dtype), dC.to(C.dtype)


def _rows(t: Tensor) -> Tensor:
    """Return t (M, D) with contiguous rows, copied only where they are not (an expanded gradient, a transpose)."""
    return t if t.stride(1) == 1 else t.contiguous()


@overload
def _dense(t: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return t contiguous and of `dtype`, copied only where it is not."""
    return t if t is None or (t.dtype is dtype and t.is_contiguous()) else t.to(dtype).contiguous()


def _layout(row_subspace: Tensor, offsets: Tensor, active: Tensor | None, trainable: Tensor | None) -> Layout:
    return Layout(
        row_subspace.shape[0],
        offsets.shape[0] - 1,
        row_subspace.data_ptr(),
        offsets.data_ptr(),
        pointer(active),
        pointer(trainable),
    )

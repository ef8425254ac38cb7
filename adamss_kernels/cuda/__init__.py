"""Backend `cuda`: the CUDA library of csrc/cuda around PyTorch's GEMMs, for GPUs on which Triton does not run.

Base and skinny products are cuBLAS's; the library adds the update to y in place, and takes dS and dC from one pass
over dy.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiled import why_not_loaded
from ..compiled.cuda_library import describe, load
from ..subspaces import Subspaces, accumulation_dtype
from . import hopper

__all__ = ["backward", "describe", "forward", "is_fused", "why_unavailable"]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or None; None leaves an argument open.

    The library is loaded only where there is a CUDA device; the first answer there runs a small kernel.
    """
    if device_type not in (None, "cuda") or torch.version.hip:
        return "it runs on NVIDIA GPUs only"
    if dtype is not None and dtype not in _DTYPES:
        return "it takes float32, float64, bfloat16 and float16 only"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return why_not_loaded(load) or _launch_error()


def is_fused(dtype: torch.dtype) -> bool:
    """Return whether base and update of `dtype` are one kernel on the current GPU; see `hopper`."""
    return dtype in hopper.DTYPES and why_unavailable("cuda", dtype) is None and hopper.is_here()


@functools.cache
def _launch_error() -> str | None:
    """Return why a kernel cannot be launched: a GPU, or a driver, that the library was not compiled for."""
    try:
        one, offsets = torch.ones(1, 1, device="cuda"), torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        load().input_projection(one, one, None, None, offsets, None)
        torch.cuda.synchronize()
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA asserts
        return f"cannot launch a kernel ({error}); it was compiled for {load().architectures}"
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
    """Compute `reference.forward`."""
    basis, basis_bias, row_subspace, offsets, active, *_ = subspaces
    (M, N), acc = (x.shape[0], weight.shape[0]), accumulation_dtype(x.dtype)
    P = x.new_empty((M, basis.shape[0]) if basis is not None and keep_P else 0)
    if M == 0:
        return x.new_empty(0, N), x.new_empty((0, B.shape[0]) if keep_S else 0, dtype=acc), P
    if basis is not None and keep_P:
        P = hopper.input_product(x, basis, basis_bias)
    if hopper.takes(x, weight, B.shape[0], bias):
        y, S = load().fused_forward(x, weight, bias, B, C, basis, basis_bias, row_subspace, offsets, active, keep_S)
        return y, S, P
    if keep_P:
        basis = basis_bias = None  # P has been through them
    Q, q = load().input_projection(x, B, basis, basis_bias, offsets, active)
    S = _product(P if keep_P else x, Q.t(), acc)
    if basis_bias is not None:
        S += q
    y = F.linear(x, weight, bias)
    load().delta_fwd(y, S, C, row_subspace, offsets, active)
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
    """Compute `reference.backward`."""
    basis, basis_bias, row_subspace, offsets, active, trainable, *_ = subspaces
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    M, acc = dy.shape[0], accumulation_dtype(dy.dtype)
    dx, dweight, dbias, dB, dC = (dy.new_empty(0, dtype=t.dtype) for t in (dy, dy, dy, B, C))
    rows = row_subspace, offsets, active, trainable
    if M == 0:
        dx = dy.new_empty(0, weight.shape[1]) if need_dx else dx
        dB, dC = torch.zeros_like(B) if need_dB else dB, torch.zeros_like(C) if need_dC else dC
    elif need_dx and hopper.takes(dy, weight, B.shape[0]) and (x is None or hopper.is_aligned(x)):
        dx, dB, dC = load().fused_backward(dy, x, S, P, weight, B, C, basis, basis_bias, *rows, need_dB, need_dC)
    elif need_dx or need_dB or need_dC:
        dS, dC = load().delta_bwd(dy, S if need_dC else None, C, *rows, B.shape[0], need_dx or need_dB)
        if need_dB:
            dB = _grad_B(dS, x, P, basis, basis_bias, acc)
            if trainable is not None:  # what is not active is zero in dS
                load().mask_rows(dB, *rows)
            dB = dB.to(B.dtype)
        if need_dx:
            Q, _ = load().input_projection(dy, B, basis, None, offsets, active)
            dx = torch.mm(dS, Q).addmm_(dy, weight)
    if need_dweight:
        assert x is not None
        dweight = torch.mm(dy.t(), x)
    if need_dbias:
        dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def _grad_B(
    dS: Tensor, x: Tensor | None, P: Tensor | None, basis: Tensor | None, basis_bias: Tensor | None, acc: torch.dtype
) -> Tensor:
    """Return dB = dS^T P, or (dS^T x) A^T + (sum_m dS) a^T where x was kept and P was not, in `acc`."""
    if P is not None:
        return _product(dS.t(), P, acc)
    assert x is not None and basis is not None
    dB = _product(dS.t(), x, acc) @ basis.t().to(acc)
    return dB if basis_bias is None else dB.addr_(dS.sum(0, dtype=acc), basis_bias.to(acc))


def _product(left: Tensor, right: Tensor, acc: torch.dtype) -> Tensor:
    """Return left right in `acc`, without rounding to the operands' dtype on a GPU, where cuBLAS can leave that out."""
    if left.is_cuda and left.dtype is not acc:
        return torch.mm(left, right, out_dtype=acc)
    return torch.mm(left, right).to(acc)

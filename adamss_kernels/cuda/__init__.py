"""Backend `cuda`: the CUDA library of csrc/cuda around PyTorch's GEMMs, for GPUs on which Triton does not run.

Base and skinny products are cuBLAS's; the library adds the update to y in place, and takes dS and dC from one pass
over dy.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiled import why_not_loaded
from ..compiled.cuda_library import (
    DeltaBwdArgs,
    DeltaFwdArgs,
    InputProjectionArgs,
    Layout,
    MaskRowsArgs,
    describe,
    load,
)
from ..subspaces import Subspaces, accumulation_dtype
from . import hopper
from .operands import DTYPES, dense, layout_of, place, pointer

__all__ = ["backward", "describe", "forward", "input_projection", "is_fused", "why_unavailable"]


def why_unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or None; None leaves an argument open.

    The library is loaded only where there is a CUDA device; the first answer there runs a small kernel.
    """
    if device_type not in (None, "cuda") or torch.version.hip:
        return "it runs on NVIDIA GPUs only"
    if dtype is not None and dtype not in DTYPES:
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
        offsets = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        input_projection(None, None, torch.ones(1, 1, device="cuda"), offsets, None, torch.float32)
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
    with _current(x.device):
        if basis is not None and keep_P:
            P = hopper.input_product(x, basis, basis_bias)
        if hopper.takes(x, weight, B.shape[0], bias):
            y, S = hopper.forward(x, weight, bias, B, C, subspaces, keep_S)
            return y, x.new_empty(0, dtype=acc) if S is None else S, P
        if keep_P:
            Q, q = input_projection(None, None, B, offsets, active, x.dtype)
        else:
            Q, q = input_projection(basis, basis_bias, B, offsets, active, x.dtype)
        S = _product(P if keep_P else x, Q.t(), acc)
        if q is not None:
            S += q
        y = F.linear(x, weight, bias)
        C, active = dense(C, acc), dense(active, torch.bool)
        load().delta_fwd(
            # In the order of csrc/cuda/interface.h; keywords would take longer than a small layer's kernel.
            DeltaFwdArgs(
                *place(x),
                DTYPES[x.dtype],
                M,
                B.shape[0],
                C.shape[1],
                y.data_ptr(),
                y.stride(0),
                S.data_ptr(),
                C.data_ptr(),
                layout_of(row_subspace, offsets, active, None),
            )
        )
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
    with _current(dy.device):
        if M == 0:
            dx = dy.new_empty(0, weight.shape[1]) if need_dx else dx
            dB, dC = torch.zeros_like(B) if need_dB else dB, torch.zeros_like(C) if need_dC else dC
        elif need_dx and hopper.takes(dy, weight, B.shape[0]) and (x is None or hopper.is_aligned(x)):
            dx, dB_, dC_ = hopper.backward(dy, x, S, P, weight, B, C, subspaces, need_dB, need_dC)
            dB, dC = dB if dB_ is None else dB_, dC if dC_ is None else dC_
        elif need_dx or need_dB or need_dC:
            active, trainable = dense(active, torch.bool), dense(trainable, torch.bool)
            layout = layout_of(row_subspace, offsets, active, trainable)
            dS, dC_ = _delta_bwd(dy, S, dense(C, acc), B.shape[0], layout, need_dx or need_dB, need_dC)
            dC = dC_.to(C.dtype) if need_dC else dC
            if need_dB:
                grad = _grad_B(dS, x, P, basis, basis_bias, acc)
                if trainable is not None:  # what is not active is zero in dS
                    load().mask_rows(
                        MaskRowsArgs(*place(dy), DTYPES[acc], grad.shape[0], grad.shape[1], grad.data_ptr(), layout)
                    )
                dB = grad.to(B.dtype)
            if need_dx:
                Q, _ = input_projection(basis, None, B, offsets, active, dy.dtype)
                dx = torch.mm(dS, Q).addmm_(dy, weight)
        if need_dweight:
            assert x is not None
            dweight = torch.mm(dy.t(), x)
        if need_dbias:
            dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def input_projection(
    basis: Tensor | None,
    basis_bias: Tensor | None,
    B: Tensor,
    offsets: Tensor,
    active: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return Q = B A (RHO, D) in `dtype` and q = B a (RHO,), zero in the rows of pruned subspaces; Q = B without A."""
    acc = accumulation_dtype(dtype)
    B, active = dense(B, acc), dense(active, torch.bool)
    if basis is not None:
        basis = basis if basis.dtype in (dtype, acc) else basis.to(acc)
        basis_bias = None if basis_bias is None else basis_bias.to(basis.dtype)
    D = B.shape[1] if basis is None else basis.shape[1]
    Q = B.new_empty(B.shape[0], D, dtype=dtype)
    q = None if basis_bias is None else B.new_empty(B.shape[0])
    load().input_projection(
        InputProjectionArgs(
            *place(B),
            DTYPES[dtype],
            DTYPES[dtype if basis is None else basis.dtype],
            B.shape[0],
            B.shape[1],
            D,
            B.data_ptr(),
            pointer(basis),
            *((0, 0) if basis is None else basis.stride()),
            pointer(basis_bias),
            0 if basis_bias is None else basis_bias.stride(0),
            Q.data_ptr(),
            pointer(q),
            Layout(0, offsets.shape[0] - 1, None, offsets.data_ptr(), pointer(active), None),
        )
    )
    return Q, q


def _delta_bwd(
    dy: Tensor, S: Tensor | None, C: Tensor, rho: int, layout: Layout, need_dS: bool, need_dC: bool
) -> tuple[Tensor, Tensor]:
    """Return dS = dy C (M, RHO) in the dtype of dy and dC (N, r_max) in that of C; empty where not needed."""
    (M, N), r_max, dtype = dy.shape, C.shape[1], DTYPES[dy.dtype]
    plan = load().delta_bwd_plan(dtype, M, N, rho, _multiprocessors(dy.device))
    dS = dy.new_empty((M, rho) if need_dS else 0)
    dS_parts = C.new_empty((plan.stretches, M, rho) if need_dS and plan.stretches > 1 else 0)
    dC = C.new_empty((N, r_max) if need_dC else 0)
    dC_parts = C.new_empty((plan.parts, N, r_max) if need_dC else 0)
    load().delta_bwd(
        DeltaBwdArgs(
            *place(dy),
            dtype,
            M,
            rho,
            r_max,
            dy.data_ptr(),
            *dy.stride(),
            pointer(S) if need_dC else None,
            C.data_ptr(),
            # An empty tensor's address is null.
            *(t.data_ptr() or None for t in (dS, dS_parts, dC, dC_parts)),
            plan,
            layout,
        )
    )
    return dS, dC


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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` the current one while its kernels are launched."""
    # The usual case, in which torch's own context would take as long as a launch.
    return contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device)

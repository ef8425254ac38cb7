"""The Triton backend: every product beside the base GEMM fused into it, or into one pass beside it.

Runs on CUDA and ROCm tensors, and on CPU tensors under Triton's interpreter (TRITON_INTERPRET=1, slow, for tests).
Triton itself is imported on first use.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from ..mixed_batch import Groups
from ..subspaces import Subspaces
from . import tuning

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_unavailable(device_type: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return why this backend cannot run `dtype` on `device_type`, or on this machine at all, or None if it can.

    The first answer for a GPU compiles and runs a small kernel, so that a Triton that is installed but does not work
    is found here and not in the middle of a model.
    """
    if dtype is not None and dtype not in _DTYPES:
        return f"it computes {', '.join(str(t).removeprefix('torch.') for t in _DTYPES)}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type is None:
        device_type = "cpu" if interpreted else "cuda"
    if device_type == "cpu":
        if not interpreted:
            return "on the CPU it runs only under TRITON_INTERPRET=1"
        if dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
        return _import_error()
    if device_type != "cuda":
        return f"it has no kernels for {device_type}"
    if interpreted:
        return "TRITON_INTERPRET=1 is set, which is for CPU tensors"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _import_error() or _launch_error()


@functools.cache
def _import_error() -> str | None:
    try:
        _launchers()
    except Exception as error:  # a broken installation raises anything
        return f"cannot import triton: {error}"
    return None


@functools.cache
def _launch_error() -> str | None:
    try:
        parts = torch.ones(2, 1, device="cuda")
        _launchers().sum_parts(parts, parts.dtype)
    except Exception as error:  # compilers and drivers raise anything
        return f"cannot compile or launch a kernel: {error}"
    return None


def _launchers() -> ModuleType:
    from . import launch

    return launch


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
    """Compute y = x W^T + bias + S Ct with S = x Q^T + q; see `reference.forward` for shapes and dtypes."""
    launch = _launchers()
    basis, basis_bias, row_subspace, offsets, active, *_ = subspaces
    if x.shape[0] == 0:
        return _empty_forward(x, weight, basis, B, keep_S, keep_P)
    with _current(x.device):
        B, C, bias, active = _contiguous(B, C, bias, active)
        arch = tuning.arch_of(x.device)
        Q, q = launch.input_projection(basis, basis_bias, B, offsets, active, x.dtype)
        rows = (row_subspace, offsets, active)
        form, config = _forward_plan(x, weight, basis, B, keep_P, arch)
        if form == "fused":
            y, S, P = launch.linear_fwd(
                x, weight, bias, Q, q, basis, basis_bias, C, *rows, keep_S, keep_P, config, arch
            )
        else:
            S, P = launch.project(x, Q, q, basis, basis_bias, keep_P, arch)
            if form == "two_launch":
                y = launch.linear_from_s(x, weight, bias, S, C, *rows, arch)
            else:
                y = torch.nn.functional.linear(x, weight, bias)
                launch.delta_fwd(y, S, C, *rows, arch)
    return y, S if keep_S else x.new_empty(0, dtype=torch.float32), x.new_empty(0) if P is None else P


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
    """Compute the gradients of `forward`; see `reference.backward` for formulas, shapes and dtypes."""
    launch = _launchers()
    basis, basis_bias, row_subspace, offsets, active, trainable, *_ = subspaces
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    dx, dweight, dbias, dB, dC = (dy.new_empty(0, dtype=t.dtype) for t in (dy, dy, dy, B, C))
    M = dy.shape[0]
    with _current(dy.device):
        arch = tuning.arch_of(dy.device)
        if M == 0:
            dx = dy.new_empty(0, weight.shape[1]) if need_dx else dx
            dB, dC = torch.zeros_like(B) if need_dB else dB, torch.zeros_like(C) if need_dC else dC
        elif need_dx or need_dB or need_dC:
            B, C, S, P, active, trainable = _contiguous(B, C, S, P, active, trainable)
            need_dS = need_dx or need_dB
            dS, dC_ = launch.delta_bwd(
                dy, S, C, row_subspace, offsets, active, trainable, B.shape[0], need_dS, need_dC, arch
            )
            dC = dC_ if need_dC else dC
            if need_dB:
                dB = _grad_B(dS, x, P, basis, basis_bias, B, offsets, active, trainable, arch)
            if need_dx:
                Q, _ = launch.input_projection(basis, None, B, offsets, active, dy.dtype)
                shape = tuning.shape_class(M, *weight.shape)
                if tuning.backward_form(dy.dtype, arch, shape) == "two_launch":
                    dx = launch.linear_dx(dy, weight, dS, Q, arch)
                else:
                    dx = torch.mm(dS.to(dy.dtype), Q).addmm_(dy, weight)
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
    """Compute `reference.grouped_forward`: torch's products for x W^T and P, which all groups share, and one pass."""
    from . import launch_grouped

    with _current(x.device):
        y = torch.nn.functional.linear(x, weight, bias)
        P = _projection(x, subspaces)
        S = x.new_empty((x.shape[0], B.shape[1]) if keep_S else 0, dtype=torch.float32)
        if x.shape[0]:
            B, C = _contiguous(B, C)
            launch_grouped.delta_fwd(y, P, B, C, _contiguous_masks(subspaces), groups, S if keep_S else None)
    return y, S, P if keep_P else x.new_empty(0)


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
    """Compute `reference.grouped_backward`; dx = dP A + dy W by torch's products."""
    from . import launch_grouped

    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    G, M = groups.slots.shape[0], dy.shape[0]
    dx, dweight, dbias = (dy.new_empty(0) for _ in range(3))
    dB = B.new_zeros((G, *B.shape[1:]) if need_dB else 0)
    dC = C.new_zeros((G, *C.shape[1:]) if need_dC else 0)
    with _current(dy.device):
        B, C, S, P = _contiguous(B, C, S, P)
        subspaces = _contiguous_masks(subspaces)
        dP = None
        if M and (need_dx or need_dB):
            dS, dP = launch_grouped.delta_bwd(dy, B, C, subspaces, groups, need_dx)
            if need_dB and G:
                P = _projection(x, subspaces) if P is None else P
                dB = launch_grouped.grad_B(dS, P, B, subspaces, groups)
        if M and need_dC and G:
            assert S is not None
            dC = launch_grouped.grad_C(dy, S, C, subspaces, groups)
        if need_dx:
            assert subspaces.basis is not None
            dx = dy @ weight if dP is None else torch.mm(dP, subspaces.basis.to(dP.dtype)).addmm_(dy, weight)
        if need_dweight:
            assert x is not None
            dweight = dy.T @ x
        if need_dbias:
            dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def _projection(x: Tensor | None, subspaces: Subspaces) -> Tensor:
    """Return P = x A^T + a (M, R)."""
    basis, basis_bias, *_ = subspaces
    assert x is not None and basis is not None
    return torch.nn.functional.linear(x, basis.to(x.dtype), None if basis_bias is None else basis_bias.to(x.dtype))


def _contiguous_masks(subspaces: Subspaces) -> Subspaces:
    active, trainable = _contiguous(subspaces.active, subspaces.trainable)
    return subspaces._replace(active=active, trainable=trainable)


def _grad_B(dS, x, P, basis, basis_bias, B, offsets, active, trainable, arch):  # type: ignore[no-untyped-def]
    """Return dB = dS^T P, or dS^T [x | 1] [A | a]^T where x was kept and P was not."""
    launch = _launchers()
    if P is not None:
        parts = launch.token_product(dS, P, False, arch)
        return launch.sum_dB(parts, offsets, active, trainable, B.dtype)
    assert x is not None
    ones = basis_bias is not None
    parts = launch.token_product(dS, x, ones, arch)
    G, g = launch.sum_dB(parts, offsets, active, trainable, torch.float32).split([x.shape[1], int(ones)], 1)
    dB = G @ basis.T.float()
    if basis_bias is not None:
        dB.addmm_(g, basis_bias.float().unsqueeze(0))
    return dB.to(B.dtype)


def _empty_forward(
    x: Tensor, weight: Tensor, basis: Tensor | None, B: Tensor, keep_S: bool, keep_P: bool
) -> tuple[Tensor, Tensor, Tensor]:
    S = x.new_empty((0, B.shape[0]) if keep_S else 0, dtype=torch.float32)
    return x.new_empty(0, weight.shape[0]), S, x.new_empty((0, basis.shape[0]) if basis is not None and keep_P else 0)


def _forward_plan(
    x: Tensor, weight: Tensor, basis: Tensor | None, B: Tensor, keep_P: bool, arch: str
) -> tuple[str, tuning.Config]:
    """Return the form that runs and the configuration of the one-pass kernel, which decides whether that one can."""
    (M, D), N = x.shape, weight.shape[0]
    shape = tuning.shape_class(M, D, N)
    form = tuning.forward_form(x.dtype, arch, shape)
    config = tuning.config("linear_fwd", x.dtype, arch, shape)
    # The one-pass kernel holds y, all of S and a slice of P in registers.
    too_wide = B.shape[0] > tuning.MAX_FUSED_RHO or (
        basis is not None and keep_P and _launchers().slice_width(basis.shape[0], N, config) > tuning.MAX_FUSED_SLICE
    )
    return ("two_launch" if form == "fused" and too_wide else form), config


def _contiguous(*tensors):  # type: ignore[no-untyped-def]
    """Return the tensors, laid out as the kernels read what has no strides among their arguments."""
    return (tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def _current(device: torch.device) -> torch.cuda.device:
    """Make `device` the one that Triton launches on; a no-op for CPU tensors."""
    return torch.cuda.device(device if device.type == "cuda" else -1)

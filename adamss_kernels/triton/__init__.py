"""The Triton backend: four kernels, one of which computes base and update; `tuning.form` says where torch's serve.

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
        B, C = (torch.ones(1, 1, device="cuda") for _ in range(2))
        rows, offsets = (torch.tensor(n, dtype=torch.int32, device="cuda") for n in ([0], [0, 1]))
        _launchers().prepare(torch.float32, B, C, Subspaces(None, None, rows, offsets))
        torch.cuda.synchronize()
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
    (M, _), rho = x.shape, B.shape[0]
    S = x.new_empty((M, rho) if keep_S else 0, dtype=torch.float32)
    with _current(x.device):
        P = _projection(x, subspaces) if keep_P else x.new_empty(0)
        if M == 0:
            return x.new_empty(0, weight.shape[0]), S, P
        arch = tuning.arch_of(x.device)
        B, C, bias = _contiguous(B, C, bias)
        subspaces = _contiguous_masks(subspaces)
        if _form("forward", x, weight, rho, arch) == "fused":
            few = x if M <= tuning.FEW else None
            Q, q, Ct, parts = launch.prepare(x.dtype, B, C, subspaces, few)
            y = launch.low_rank_gemm(x, weight.t(), Q, parts, q, Ct, bias, S if keep_S else None, arch)
        else:
            Q, q, Ct, _ = launch.prepare(x.dtype, B, C, subspaces)
            y = torch.nn.functional.linear(x, weight, bias)
            inner = (x @ Q.t()).float()
            if q is not None:
                inner += q
            y.addmm_(inner.to(x.dtype), Ct)
            if keep_S:
                S = inner.narrow(1, 0, rho).clone(memory_format=torch.contiguous_format)
    return y, S, P


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
    need_dx, need_dweight, need_dbias, need_dB, need_dC = needs
    dx, dweight, dbias, dB, dC = (dy.new_empty(0, dtype=t.dtype) for t in (dy, dy, dy, B, C))
    (M, _), rho = dy.shape, B.shape[0]
    with _current(dy.device):
        if M == 0:
            dx = dy.new_empty(0, weight.shape[1]) if need_dx else dx
            dB, dC = torch.zeros_like(B) if need_dB else dB, torch.zeros_like(C) if need_dC else dC
        elif need_dx or need_dB or need_dC:
            arch = tuning.arch_of(dy.device)
            is_fused = _form("backward", dy, weight, rho, arch) == "fused"
            B, C, S = _contiguous(B, C, S)
            subspaces = _contiguous_masks(subspaces)
            dS = None
            if need_dx or need_dB:
                Q, _, Ct, _ = launch.prepare(dy.dtype, B, C, subspaces._replace(basis_bias=None))
                if need_dx and is_fused:
                    dS = dy.new_empty(M, Ct.shape[0]) if need_dB else None
                    dx = launch.low_rank_gemm(dy, weight, Ct, None, None, Q, None, dS, arch)
                else:
                    dS = dy @ Ct.t()
                    dx = torch.mm(dS, Q).addmm_(dy, weight) if need_dx else dx
            if need_dB and P is None:
                # Of x there are D columns to multiply with dS, of P only R.
                P = x if subspaces.basis is None else _projection(x, subspaces)
            if need_dB or need_dC:
                s, z = S if need_dC else None, P if need_dB else None
                products = launch.token_products if is_fused else _token_products
                dB_, dC_ = launch.finish(*products(dy, s, z, dS, rho, arch), B, C, subspaces)
                dB, dC = dB if dB_ is None else dB_, dC if dC_ is None else dC_
        if need_dweight:
            assert x is not None
            dweight = dy.T @ x
        if need_dbias:
            dbias = dy.sum(0)
    return dx, dweight, dbias, dB, dC


def _token_products(
    dy: Tensor, S: Tensor | None, z: Tensor | None, dS: Tensor | None, rho: int, arch: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return what `launch.token_products` does, by torch's products: in one part."""
    dy_parts = None if S is None else torch.mm(dy.t(), S.to(dy.dtype)).unsqueeze(0)
    z_parts = None if z is None or dS is None else torch.mm(z.t(), dS).unsqueeze(0)
    return dy_parts, z_parts


def _form(direction: str, t: Tensor, weight: Tensor, rho: int, arch: str) -> str:
    """Return how a product of x or dy and W is computed; see `tuning.form`."""
    N, D = weight.shape
    return tuning.form(direction, t.dtype, arch, (t.shape[0], D, N), rho, _launchers().precision(t.dtype))


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


def _contiguous(*tensors):  # type: ignore[no-untyped-def]
    """Return the tensors, laid out as the kernels read what has no strides among their arguments."""
    return (tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def _current(device: torch.device) -> torch.cuda.device:
    """Make `device` the one that Triton launches on; a no-op for CPU tensors."""
    return torch.cuda.device(device if device.type == "cuda" else -1)

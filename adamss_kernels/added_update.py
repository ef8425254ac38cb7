"""`add_update`: the update alone, added to what a base layer of another library has computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import differentiable, reference
from .functional import Gradients, higher_order, is_transformed, keeps_projection, require_input, zero_gradients
from .ops import UPDATE_OPERATORS, Operators, choose_backend, without_autocast
from .subspaces import Subspaces


def add_update(
    y: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    save_for_backward: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Return y + S C^T with S = (x A^T + a) B^T, in y's memory where no transform looks on.

    Differentiable in y, x, B and C, as `adamss_linear` is: dy goes through to what has computed y, which adds its own
    gradient of x. By the kernels of `UPDATE_OPERATORS`, which the CPU alone has yet; elsewhere by two products of
    PyTorch, (M, D) by (D, RHO) and (M, RHO) by (RHO, N). The sum rounds once.

    Args:
        y: (..., N), a fresh tensor that nobody else holds.
        x: (..., D).
        B: (RHO, R).
        C: (N, r_max).
        subspaces: Basis, row map and masks.
        save_for_backward: As in `adamss_linear`.
        backend: As in `adamss_linear`.
    """
    if x.dtype != y.dtype:
        # Under autocast, or where the base computes in a dtype of its own.
        x = x.to(y.dtype)
    if torch.compiler.is_compiling() or is_transformed():
        with without_autocast(x):
            return y + differentiable.update(x, B, C, subspaces)
    learns = torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or B.requires_grad or C.requires_grad)
    if not learns and not subspaces.contributes:
        return y
    whole, shape = _unviewed(y), y.shape
    operators = UPDATE_OPERATORS.get(choose_backend(backend, x.device, x.dtype))
    with without_autocast(x):
        if learns:
            whole = _AddUpdate.apply(whole, x, B, C, subspaces, save_for_backward, operators)
        else:
            _add(whole, x, B, C, subspaces, operators, False, False)
    return whole.view(shape)


def _unviewed(y: Tensor) -> Tensor:
    """Return y, or what y is only another shape of: to change a view in place costs autograd two copies of it.

    Of any other view a copy is returned.
    """
    whole = y._base
    if whole is None and y.is_contiguous():
        return y
    if (
        whole is not None
        and whole.is_contiguous()
        and y.is_contiguous()
        and whole.numel() == y.numel()
        and whole.dtype == y.dtype
        and whole.requires_grad == y.requires_grad
    ):
        return whole
    return y.clone(memory_format=torch.contiguous_format)


def _add(
    y: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    operators: Operators | None,
    keep_S: bool,
    keep_P: bool,
) -> tuple[Tensor, Tensor]:
    y, x = y.view(-1, C.shape[0]), x.reshape(-1, x.shape[-1])
    if operators is None:
        return reference.add_update(y, x, B, C, subspaces, keep_S, keep_P)
    S, P = operators.forward(y, x, B, C, *subspaces[:5], keep_S, keep_P)
    # Operators of this kind do not count it themselves.
    increment_version(y)
    return S, P


def _formula(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> Gradients:
    """Return what `_closed_form` returns, differentiably."""
    x, _, _, B, C, *frozen = saved
    need_dx, need_dB, need_dC = _needs(ctx)
    require_input(x, need_dB or need_dC)
    needs = [need_dx, False, False, need_dB, need_dC]
    dy, x = dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
    dx, _, _, dB, dC = differentiable.backward(dy, x, None, B, C, Subspaces(*frozen), needs)
    return _shaped(ctx, dx, dB, dC, B, C)


def _closed_form(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> Gradients:
    """Return dx = dS Q, dB and dC."""
    x, S, P, B, C, *frozen = saved
    need_dx, need_dB, need_dC = _needs(ctx)
    needs = [need_dx, False, False, need_dB, need_dC]
    dy, x = dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
    with without_autocast(dy):
        if ctx.operators is None:
            dx, _, _, dB, dC = reference.backward(dy, x, S, P, None, B, C, Subspaces(*frozen), needs)
        else:
            # Without a basis it is x that B takes.
            P = x if frozen[0] is None else P
            dx, _, _, dB, dC = ctx.operators.backward(dy, x, S, P, B, C, *frozen, needs)
    return _shaped(ctx, dx, dB, dC, B, C)


def _needs(ctx: Any) -> tuple[bool, bool, bool]:
    _, need_dx, need_dB, need_dC, *_ = ctx.needs_input_grad
    return need_dx, need_dB and ctx.learns, need_dC and ctx.learns


def _shaped(ctx: Any, dx: Tensor | None, dB: Tensor | None, dC: Tensor | None, B: Tensor, C: Tensor) -> Gradients:
    _, need_dx, need_dB, need_dC, *_ = ctx.needs_input_grad
    if not ctx.learns:
        dB, dC = zero_gradients(ctx, (2, B), (3, C))
    return (
        dx.reshape(ctx.shape) if need_dx and dx is not None else None,
        dB if need_dB else None,
        dC if need_dC else None,
    )


_gradients = higher_order(_formula)(_closed_form)


class _AddUpdate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, x, B, C, subspaces, save_for_backward, operators):
        _, _, need_dB, need_dC, *_ = ctx.needs_input_grad
        need_dB, need_dC = need_dB and subspaces.learns, need_dC and subspaces.learns
        N, D = C.shape[0], x.shape[-1]
        keep_P = need_dB and keeps_projection(save_for_backward, (N, D), subspaces.basis)
        keep_x = not keep_P and (need_dB or (need_dC and save_for_backward == "input"))
        S, P = _add(y, x, B, C, subspaces, operators, need_dC, keep_P)
        ctx.mark_dirty(y)
        ctx.learns, ctx.shape, ctx.operators = subspaces.learns, x.shape, operators
        ctx.save_for_backward(
            x if keep_x else None, S if need_dC else None, P if keep_P else None, B, C, *subspaces[:6]
        )
        return y

    @staticmethod
    def backward(ctx, dy):
        return dy, *_gradients(ctx, dy), None, None, None

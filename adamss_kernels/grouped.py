"""`grouped_linear`: one frozen layer under the updates of many adapters, each token taking one of them or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .functional import as_linear_takes_them, first_order, is_transformed, keeps_projection
from .mixed_batch import groups_of
from .ops import GROUPED_OPERATORS, choose_backend
from .subspaces import Subspaces


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    leaves: Sequence[Tensor],
    leaf_groups: Sequence[int],
    bank: int,
    save_for_backward: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Apply a frozen linear layer plus, to each token, the update of the adapter that its row of the batch takes.

    y[m] = x[m] W^T + bias + (S[m] C^T) with B and C of the token's slot in the stacks, or without an adapter the first
    two terms alone. Differentiable once, in x, in the leaves, and in weight and bias where they require grad.

    Args:
        x: (batch, ..., D).
        weight: W (N, D).
        bias: (N,) or None.
        B: (slots, RHO, R), a constant.
        C: (slots, N, r_max), a constant.
        subspaces: Basis, row map and masks (slots, K), of all adapters.
        leaves: B and C of one adapter after another, which share the memory of the stacks and get their gradients.
        leaf_groups: The group of each of those adapters: its place among the batch's slots, or, in compiled code, its
            slot.
        bank: Number of the bank whose current batch says which row takes which slot.
        save_for_backward: As in `adamss_linear`.
        backend: "auto" or the name of a backend.

    Returns:
        y (batch, ..., N), as `adamss_linear`.

    Raises:
        TypeError, ValueError: As `adamss_linear`; or the batch has another number of rows than were named.
        RuntimeError: The backend asked for cannot run here, or `torch.func` looks on.
    """
    x, weight, bias = as_linear_takes_them(x, weight, bias)
    if is_transformed():
        raise RuntimeError("torch.func and forward-mode derivatives do not go through layers of an AdapterBank")
    shape = x.shape
    if x.dim() != 2:
        x = x.reshape(-1, shape[-1])
    groups = groups_of(x, shape[0] if len(shape) > 1 else 1, bank, B.shape[0])
    chosen = choose_backend(backend, x.device, x.dtype, is_grouped=True)
    needs_grad = (x, weight, *leaves) if bias is None else (x, weight, bias, *leaves)
    if torch.is_grad_enabled() and any(t.requires_grad for t in needs_grad):
        options = (save_for_backward, chosen, leaf_groups)
        y = _GroupedLinear.apply(x, weight, bias, B, C, subspaces, groups, *options, *leaves)
    else:
        forward, _ = GROUPED_OPERATORS[chosen]
        y, _, _ = forward(x, weight, bias, B, C, *subspaces[:5], *groups, False, False)
    return y if len(shape) == 2 else y.reshape(*shape[:-1], weight.shape[0])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, B, C, subspaces, groups, save_for_backward, backend, leaf_groups, *leaves):
        _, need_dweight, *_ = ctx.needs_input_grad
        of_leaves = ctx.needs_input_grad[10:]
        need_dB, need_dC = any(of_leaves[::2]), any(of_leaves[1::2])
        keep_P = need_dB and not need_dweight and keeps_projection(save_for_backward, weight.shape, subspaces.basis)
        keep_x = need_dweight or (need_dB and not keep_P)
        forward, _ = GROUPED_OPERATORS[backend]
        y, S, P = forward(x, weight, bias, B, C, *subspaces[:5], *groups, need_dC, keep_P)
        ctx.backend, ctx.leaf_groups, ctx.need_dB, ctx.need_dC = backend, leaf_groups, need_dB, need_dC
        kept = (x if keep_x else None, S if need_dC else None, P if keep_P else None)
        ctx.save_for_backward(*kept, weight, B, C, *subspaces[:6], *groups)
        return y

    @staticmethod
    @first_order
    def backward(ctx, dy, saved):
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        needs = [need_dx, need_dweight, need_dbias, ctx.need_dB, ctx.need_dC]
        _, backward = GROUPED_OPERATORS[ctx.backend]
        dx, dweight, dbias, dB, dC = backward(dy, *saved, needs)
        of_leaves = [
            (dC if i % 2 else dB)[ctx.leaf_groups[i // 2]] if needed else None
            for i, needed in enumerate(ctx.needs_input_grad[10:])
        ]
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            *(None,) * 7,
            *of_leaves,
        )

"""`adamss_linear`: validate, cast under autocast, differentiate; the arithmetic is the operators' in `ops.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from . import differentiable
from .config import SAVE_FOR_BACKWARD
from .layout import SubspaceLayout
from .ops import FEW_TOKENS, OPERATORS, choose_backend
from .subspaces import Subspaces


def adamss_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    basis_bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    layout: SubspaceLayout,
    *,
    active: Tensor | None = None,
    trainable: Tensor | None = None,
    save_for_backward: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Apply a frozen linear layer plus its masked block-diagonal AdaMSS update.

    y[m, i] = x[m] . W[i] + bias[i] + sum_{j < r_k(i)} S[m, off_k(i) + j] C[i, j], with S = (x A^T + a) B^T.

    Differentiable in x, B, C, and in weight and bias where they require grad; basis and basis_bias are frozen. Once by
    kernels. Further derivatives, forward mode and the transforms of `torch.func` go through plain PyTorch, for which
    `save_for_backward` has to be "input" where a gradient of B or C is differentiated again.
    B and C may have a wider dtype than x (float32 parameters over a bfloat16 layer); their gradients come back in
    their own dtype.

    Args:
        x: (..., D).
        weight: W (N, D), dtype of x (under autocast, any dtype that autocast casts).
        bias: (N,) or None.
        basis: A (R, D), any floating dtype.
        basis_bias: a (R,) or None, any floating dtype.
        B: (RHO, R).
        C: (N, r_max); entries beyond a row's rank are ignored and get zero gradient.
        layout: Row assignment and ranks.
        active: (K,) bool, subspaces that contribute; None for all. Changing its values neither recompiles nor
            synchronises.
        trainable: (K,) bool, subspaces whose B and C get gradients; None for all.
        save_for_backward: Keep P = x A^T + a ("projection", R values a token) or x ("input", D values a token, usually
            alive anyway) until backward; "auto" keeps P when R <= N / 16 and R < D.
        backend: "auto" or the name of a backend; see `available_backends`.

    Returns:
        y (..., N), of the dtype that `torch.nn.functional.linear` would return.

    Raises:
        TypeError: An argument is not a floating-point tensor, or dtypes do not agree.
        ValueError: A shape or an option does not fit; the message names argument, expectation and value.
        RuntimeError: The backend asked for cannot run here.
    """
    _check_shapes(x, weight, bias, basis, basis_bias, B, C, layout, active, trainable)
    if save_for_backward not in SAVE_FOR_BACKWARD:
        raise ValueError(f"save_for_backward: expected one of {SAVE_FOR_BACKWARD}, got {save_for_backward!r}")
    subspaces = Subspaces(basis, basis_bias, layout.row_subspace, layout.offsets, active, trainable)
    return fused_linear(x, weight, bias, B, C, subspaces, save_for_backward, backend)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    save_for_backward: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Compute `adamss_linear` for operands that are known to fit one another, but for x and dtypes.

    Args:
        x: (..., D).
        weight: W (N, D).
        bias: (N,) or None.
        B: (RHO, R), or (RHO, D) without a basis.
        C: (N, r_max).
        subspaces: Basis, row map and masks. What it promises of the masks is known before anything runs, unlike the
            masks, so that a change of it recompiles.
        save_for_backward: As in `adamss_linear`; without a basis x is kept.
        backend: As in `adamss_linear`.
    """
    x, weight, bias = as_linear_takes_them(x, weight, bias)
    if is_transformed():
        return differentiable.forward(x, weight, bias, B, C, subspaces)
    N, D = weight.shape
    shape = x.shape
    if x.dim() != 2:
        x = x.reshape(-1, D)
    if torch.is_grad_enabled() and (
        B.requires_grad
        or C.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        if subspaces.contributes:
            y = _FusedLinear.apply(x, weight, bias, B, C, subspaces, save_for_backward, _choose(backend, x))
        else:
            y = _BareLinear.apply(x, weight, bias, B, C)
    elif subspaces.contributes:
        forward, _ = OPERATORS[_choose(backend, x)]
        y, _, _ = forward(x, weight, bias, B, C, *subspaces[:5], False, False)
    else:
        y = F.linear(x, weight, bias)
    # A view only where needed: FSDP2 warns of modules that return one, since in-place changes of it bypass its hooks.
    return y if len(shape) == 2 else y.reshape(*shape[:-1], N)


def _choose(backend: str, x: Tensor) -> str:
    # Off the CPU alone does the number of tokens matter; compiled code is specialised on it, exported code cannot be.
    if x.is_cpu or torch.compiler.is_exporting() or x.shape[0] > FEW_TOKENS:
        return choose_backend(backend, x.device, x.dtype)
    return choose_backend(backend, x.device, x.dtype, has_few_tokens=True)


def as_linear_takes_them(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands of a frozen layer with the dtypes that `F.linear` computes in, autocast's where it is on.

    Raises:
        TypeError: The dtypes do not agree, or x is a nested tensor.
        ValueError: The last dimension of x is not the layer's D.
    """
    if x.is_nested:
        raise TypeError(
            "x: expected a tensor (..., D), got a nested one; pass its parts, or x.values() of a jagged one"
        )
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # As autocast does: float64 is left alone.
        x, weight = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
    if x.dtype != weight.dtype:
        raise TypeError(f"x: expected the dtype of weight, {weight.dtype}, got {x.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected the dtype of weight, {weight.dtype}, got {bias.dtype}")
    D = weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != D:
        raise ValueError(f"x: expected shape (..., {D}), got {tuple(x.shape)}")
    return x, weight, bias


def is_transformed() -> bool:
    """Whether `torch.func`, forward mode or an export to ONNX looks on, for which the operators have no rules."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()
    # torch has no public question for either.
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


Gradients = tuple[Tensor | None, ...]
Backward = Callable[[Any, Tensor, tuple[Any, ...]], Gradients]


def first_order(backward: Backward) -> Callable[..., Gradients]:
    """Make `backward(ctx, dy, saved)` one of an autograd function, whose gradients cannot be differentiated again.

    Differentiating them raises, in whatever they depend on. With `torch.autograd.function.once_differentiable` it
    raises only if dy requires grad and the error lies on the way of the derivative, which else is silently zero.
    """
    return higher_order(_refuse_to_differentiate)(backward)


def higher_order(formula: Backward) -> Callable[[Backward], Callable[..., Gradients]]:
    """Make `backward(ctx, dy, saved)` one of an autograd function, whose gradients `formula` differentiates again.

    `formula` takes the same arguments and returns the same values by operations that PyTorch can differentiate. It is
    called only where somebody differentiates the gradients, which themselves are `backward`'s to the last bit.
    """

    def decorate(backward: Backward) -> Callable[..., Gradients]:
        @functools.wraps(backward)
        def wrapper(ctx: Any, dy: Tensor) -> Gradients:
            saved = ctx.saved_tensors
            with torch.no_grad():
                gradients = backward(ctx, dy, saved)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return gradients

            def again(dy: Tensor, *saved: Any) -> Gradients:
                return formula(ctx, dy, saved)

            return _Gradients.apply(again, len(gradients), *gradients, dy, *saved)

        return wrapper

    return decorate


def _refuse_to_differentiate(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> Gradients:
    raise RuntimeError("trying to differentiate twice through an adapted layer, whose gradients are first order")


class _Gradients(torch.autograd.Function):
    """Gradients that are there, with `again(dy, *saved)` as the way in which they depend on what follows them."""

    @staticmethod
    def forward(ctx, again, count, *tensors):
        ctx.again, ctx.count = again, count
        ctx.save_for_backward(*tensors[count:])
        return tensors[:count]

    @staticmethod
    def backward(ctx, *directions):
        inputs = list(ctx.saved_tensors)
        wanted = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
        is_wanted_again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases: dy itself may follow from x, and that way is not ours to go.
            for i in wanted:
                inputs[i] = inputs[i].view_as(inputs[i])
            # What is zero for every input has no graph.
            gradients = zip(ctx.again(*inputs), directions, strict=True)
            pairs = [(g, d) for g, d in gradients if g is not None and d is not None and g.requires_grad]
            found = torch.autograd.grad(
                [g for g, _ in pairs],
                [inputs[i] for i in wanted],
                [d for _, d in pairs],
                create_graph=is_wanted_again,
                allow_unused=True,
            )
        results = dict(zip(wanted, found, strict=True))
        return (None, None, *(None,) * ctx.count, *(results.get(i) for i in range(len(inputs))))


def require_input(x: Tensor | None, is_needed: bool) -> None:
    """Raise where a gradient of B or C is differentiated again and x was not kept for it."""
    if x is None and is_needed:
        raise RuntimeError(
            "trying to differentiate twice through an adapted layer that keeps no input for it; with "
            "save_for_backward='input' it has derivatives of every order"
        )


def _formula(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> Gradients:
    """Return what `_FusedLinear.backward` returns, differentiably."""
    x, _, _, weight, B, C, *frozen = saved
    need_dx, need_dweight, need_dbias, need_dB, need_dC, *_ = ctx.needs_input_grad
    needs = [need_dx, need_dweight, need_dbias, need_dB and ctx.learns, need_dC and ctx.learns]
    require_input(x, needs[3] or needs[4])
    gradients = differentiable.backward(dy, x, weight, B, C, Subspaces(*frozen), needs)
    if not ctx.learns:
        gradients = (*gradients[:3], *zero_gradients(ctx, (3, B), (4, C)))
    return (*gradients, None, None, None)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, B, C, subspaces, save_for_backward, backend):
        _, need_dweight, _, need_dB, need_dC, *_ = ctx.needs_input_grad
        need_dB, need_dC = need_dB and subspaces.learns, need_dC and subspaces.learns
        keep_P = need_dB and not need_dweight and keeps_projection(save_for_backward, weight.shape, subspaces.basis)
        keep_x = need_dweight or (not keep_P and (need_dB or (need_dC and save_for_backward == "input")))
        forward, _ = OPERATORS[backend]
        y, S, P = forward(x, weight, bias, B, C, *subspaces[:5], need_dC, keep_P)
        ctx.learns, ctx.backend = subspaces.learns, backend
        kept = (x if keep_x else None, S if need_dC else None, P if keep_P else None)
        ctx.save_for_backward(*kept, weight, B, C, *subspaces[:6])
        return y

    @staticmethod
    @higher_order(_formula)
    def backward(ctx, dy, saved):
        x, S, P, _, B, C, basis, *_ = saved
        need_dx, need_dweight, need_dbias, need_dB, need_dC, *_ = ctx.needs_input_grad
        learns = ctx.learns
        needs = [need_dx, need_dweight, need_dbias, need_dB and learns, need_dC and learns]
        # Without a basis it is x that B takes.
        P = x if basis is None else P
        _, backward = OPERATORS[ctx.backend]
        dx, dweight, dbias, dB, dC = backward(dy, x, S, P, *saved[3:], needs)
        if not learns:
            dB, dC = zero_gradients(ctx, (3, B), (4, C))
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            dB if need_dB else None,
            dC if need_dC else None,
            None,
            None,
            None,
        )


class _BareLinear(torch.autograd.Function):
    """The frozen linear layer by itself, which still hands zero gradients to B and C.

    Not `F.linear` plus a node behind it: such a node's output would be a view, on which an in-place activation fails.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, B, C):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, B, C)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight, B, C = ctx.saved_tensors
        need_dx, need_dweight, need_dbias, *_ = ctx.needs_input_grad
        dx = dy @ weight if need_dx else None
        dweight = dy.T @ x if need_dweight else None
        dbias = dy.sum(0) if need_dbias else None
        return dx, dweight, dbias, *zero_gradients(ctx, (3, B), (4, C))


def zero_gradients(ctx, *arguments: tuple[int, Tensor]) -> list[Tensor | None]:
    """Return zeros for the arguments, given with their places, that need a gradient."""
    # Zero rather than None: DDP and FSDP wait for the gradient of every parameter that they manage.
    return [torch.zeros_like(tensor) if ctx.needs_input_grad[index] else None for index, tensor in arguments]


def keeps_projection(save_for_backward: str, shape: tuple[int, ...], basis: Tensor | None) -> bool:
    """Whether P is kept for backward; with "auto", where it costs under 1/16 of the base GEMM and is smaller than x.

    `shape` is W's.
    """
    if basis is None:
        return False
    if save_for_backward == "auto":
        R, (N, D) = basis.shape[0], shape
        return 16 * R <= N and R < D
    return save_for_backward == "projection"


def _check_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    basis: Tensor,
    basis_bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    layout: SubspaceLayout,
    active: Tensor | None,
    trainable: Tensor | None,
) -> None:
    N, K, rho, r_max = layout.num_rows, layout.num_subspaces, layout.rho, layout.r_max
    if weight.dim() != 2 or weight.shape[0] != N:
        raise ValueError(f"weight: expected shape ({N}, D) for a layout of {N} rows, got {tuple(weight.shape)}")
    D = weight.shape[1]
    if basis.dim() != 2 or basis.shape[1] != D:
        raise ValueError(f"basis: expected shape (R, {D}), got {tuple(basis.shape)}")
    R = basis.shape[0]
    for name, tensor, shape in (
        ("bias", bias, (N,)),
        ("basis_bias", basis_bias, (R,)),
        ("B", B, (rho, R)),
        ("C", C, (N, r_max)),
        ("active", active, (K,)),
        ("trainable", trainable, (K,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("x", x), ("weight", weight), ("basis", basis), ("B", B), ("C", C)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
    for name, tensor in (("active", active), ("trainable", trainable)):
        if tensor is not None and tensor.dtype != torch.bool:
            raise TypeError(f"{name}: expected a bool tensor, got {tensor.dtype}")

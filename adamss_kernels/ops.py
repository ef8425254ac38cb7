"""The two operators behind `adamss_linear`: schema beside fake, and the choice of backend.

The operators are raw: they carry no autograd formula of their own (that is `functional.py`), so calling one directly
on tensors that require grad gives no gradient. They are not part of the public API.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from .config import BACKENDS

_FEW_TOKENS = 64
_PREFERENCE = {"cpu": ("native",), "cuda": ("triton", "cuda")}
# Backends that do not live in a module of their own name.
_MODULES = {"cuda": "native.cuda"}
_OVERRIDE = os.environ.get("ADAMSS_BACKEND") or "auto"

_library = torch.library.Library("adamss_kernels", "DEF")
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor? basis, Tensor? basis_bias, Tensor B, Tensor C, "
    "Tensor row_subspace, Tensor offsets, Tensor? active, bool keep_S, bool keep_P, str backend) "
    "-> (Tensor y, Tensor S, Tensor P)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? S, Tensor? P, Tensor weight, Tensor? basis, Tensor? basis_bias, "
    "Tensor B, Tensor C, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable, bool[] needs, "
    "str backend) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dB, Tensor dC)"
)

forward_operator = torch.ops.adamss_kernels.linear_forward.default
backward_operator = torch.ops.adamss_kernels.linear_backward.default


def linear_forward(x, *args):
    """Run `adamss_kernels::linear_forward`, without the dispatcher where nobody could tell."""
    return (_linear_forward if _is_plain_eager(x) else forward_operator)(x, *args)


def linear_backward(dy, *args):
    """Run `adamss_kernels::linear_backward`, without the dispatcher where nobody could tell."""
    return (_linear_backward if _is_plain_eager(dy) else backward_operator)(dy, *args)


def _is_plain_eager(tensor):
    # Going through the dispatcher to a Python kernel costs as much as a small layer's whole update. Tracing, tensor
    # subclasses, modes and function transforms see the operator.
    return (
        type(tensor) is torch.Tensor
        and not tensor.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
    )


@torch.library.register_fake("adamss_kernels::linear_forward", lib=_library)
def _linear_forward_fake(
    x, weight, bias, basis, basis_bias, B, C, row_subspace, offsets, active, keep_S, keep_P, backend
):
    M = x.shape[0]
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty(M, weight.shape[0])
    S = x.new_empty((M, B.shape[0]) if keep_S else 0, dtype=acc)
    P = x.new_empty((M, basis.shape[0]) if keep_P else 0)
    return y, S, P


@torch.library.register_fake("adamss_kernels::linear_backward", lib=_library)
def _linear_backward_fake(
    dy, x, S, P, weight, basis, basis_bias, B, C, row_subspace, offsets, active, trainable, needs, backend
):
    shapes = ((dy.shape[0], weight.shape[1]), weight.shape, weight.shape[:1], B.shape, C.shape)
    dtypes = (dy.dtype, dy.dtype, dy.dtype, B.dtype, C.dtype)
    return tuple(
        dy.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _linear_forward(x, *args):
    device_type = x.device.type
    forward, _ = _kernels(args[-1], device_type, x.dtype, x.shape[0] <= _FEW_TOKENS)
    if torch.is_autocast_enabled(device_type):
        # `functional.py` has cast the operands already; inside, float32 means float32.
        with torch.autocast(device_type, enabled=False):
            return forward(x, *args[:-1])
    return forward(x, *args[:-1])


def _linear_backward(dy, *args):
    device_type = dy.device.type
    _, backward = _kernels(args[-1], device_type, dy.dtype, dy.shape[0] <= _FEW_TOKENS)
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return backward(dy, *args[:-1])
    return backward(dy, *args[:-1])


_library.impl("linear_forward", _linear_forward, "CompositeExplicitAutograd")
_library.impl("linear_backward", _linear_backward, "CompositeExplicitAutograd")


@functools.cache
def _kernels(requested, device_type, dtype, has_few_tokens=False):
    """Return forward and backward of the backend that `choose_backend` chooses."""
    module = implementation(choose_backend(requested, torch.device(device_type), dtype, has_few_tokens))
    return module.forward, module.backward


def implementation(name: str) -> ModuleType:
    """Return the module that implements backend `name`, importing it on first use.

    Such a module has `forward` and `backward` with the arguments of the operators less `backend`, and
    `unavailable(device_type, dtype)`, which returns None or the reason why it cannot run there.
    """
    return importlib.import_module(f"{__package__}.{_MODULES.get(name, name)}")


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, has_few_tokens: bool = False) -> str:
    """Return the backend that runs for tensors of `dtype` on `device`: the only place where that is decided.

    "auto" is replaced by the environment variable ADAMSS_BACKEND where that was set when the package was imported. What
    is still "auto" takes the first of these that can run: on the CPU native, reference; on CUDA and ROCm triton, cuda,
    reference, but cuda before triton where its library has the fused kernels for the GPU (Hopper, 16-bit dtypes) and
    more than 64 tokens to fill their tiles with; elsewhere reference. Where Triton works on a GPU with no dtype at all
    (it cannot be imported, or its first kernel does not compile), one warning names the cause and what runs instead. A
    backend named explicitly runs or raises; it never falls back to another.

    Raises:
        ValueError: `requested`, or ADAMSS_BACKEND, is not the name of a backend.
        RuntimeError: The backend asked for cannot run here; the message says why.
    """
    if requested == "auto":
        requested = _OVERRIDE
    if requested == "auto":
        preferred = _preferred(device.type, dtype, has_few_tokens)
        able = (name for name in preferred if implementation(name).unavailable(device.type, dtype) is None)
        chosen = next(able, "reference")
        if device.type == "cuda" and chosen != preferred[0]:
            _warn_of_broken(device.type, chosen)
        return chosen
    if requested not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {requested!r}")
    reason = implementation(requested).unavailable(device.type, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} cannot run {dtype} on {device.type}: {reason}")
    return requested


def _preferred(device_type, dtype, has_few_tokens):
    preferred = _PREFERENCE.get(device_type, ())
    if device_type == "cuda" and not has_few_tokens and implementation("cuda").is_fused(dtype):
        return tuple(reversed(preferred))
    return preferred


@functools.cache
def _warn_of_broken(device_type, chosen):
    """Warn, once, that backends before `chosen` run no dtype on this kind of device; the first of them counts."""
    reasons = []
    for name in _PREFERENCE[device_type]:
        reason = None if name == chosen else implementation(name).unavailable(device_type)
        if reason is None:
            break
        reasons.append(f"{name!r} cannot run on {device_type}: {reason}")
    if reasons:
        warnings.warn(f"using backend {chosen!r} instead: {'; '.join(reasons)}", stacklevel=4)


def available_backends() -> dict[str, str]:
    """Return, for every backend, "available" or the reason why it cannot run on this machine."""
    return {name: implementation(name).unavailable() or "available" for name in BACKENDS}

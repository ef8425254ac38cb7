"""The two operators behind `adamss_linear`: schema beside fake, and the choice of backend.

The operators are raw: they carry no autograd formula of their own (that is `functional.py`), so calling one directly
on tensors that require grad gives no gradient. They are not part of the public API.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

from .config import BACKENDS

_PREFERENCE = {"cpu": ("native",)}

_library = torch.library.Library("adamss_kernels", "DEF")
_library.define(
    "linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor basis, Tensor? basis_bias, Tensor B, Tensor C, "
    "Tensor row_subspace, Tensor offsets, Tensor? active, bool keep_S, bool keep_P, str backend) "
    "-> (Tensor y, Tensor S, Tensor P)"
)
_library.define(
    "linear_backward(Tensor dy, Tensor? x, Tensor? S, Tensor? P, Tensor weight, Tensor basis, Tensor? basis_bias, "
    "Tensor B, Tensor C, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable, bool[] needs, "
    "str backend) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dB, Tensor dC)"
)

linear_forward = torch.ops.adamss_kernels.linear_forward.default
linear_backward = torch.ops.adamss_kernels.linear_backward.default


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


@torch.library.impl("adamss_kernels::linear_forward", "CompositeExplicitAutograd", lib=_library)
def _linear_forward(x, *args):
    *operands, backend = args
    return _without_autocast(implementation(choose_backend(backend, x.device, x.dtype)).forward, x, *operands)


@torch.library.impl("adamss_kernels::linear_backward", "CompositeExplicitAutograd", lib=_library)
def _linear_backward(dy, *args):
    *operands, backend = args
    return _without_autocast(implementation(choose_backend(backend, dy.device, dy.dtype)).backward, dy, *operands)


def _without_autocast(function, tensor, *args):
    # `functional.py` has cast the operands already; inside, float32 means float32.
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return function(tensor, *args)
    return function(tensor, *args)


def implementation(name: str) -> ModuleType:
    """Return the module that implements backend `name`, importing it on first use.

    Such a module has `forward` and `backward` with the arguments of the operators less `backend`, and
    `unavailable(device_type, dtype)`, which returns None or the reason why it cannot run there.
    """
    return importlib.import_module(f"{__package__}.{name}")


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the backend that runs for tensors of `dtype` on `device`: the only place where that is decided.

    "auto" is replaced by the environment variable ADAMSS_BACKEND where that is set. What is still "auto" takes the
    first of these that can run: on the CPU native, reference; elsewhere reference. A backend named explicitly runs or
    raises; it never falls back to another.

    Raises:
        ValueError: `requested`, or ADAMSS_BACKEND, is not the name of a backend.
        RuntimeError: The backend asked for cannot run here; the message says why.
    """
    if requested == "auto":
        requested = os.environ.get("ADAMSS_BACKEND") or "auto"
    return _choose(requested, device.type, dtype)


@functools.cache
def _choose(requested: str, device_type: str, dtype: torch.dtype) -> str:
    if requested == "auto":
        for name in _PREFERENCE.get(device_type, ()):
            if implementation(name).unavailable(device_type, dtype) is None:
                return name
        return "reference"
    if requested not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {requested!r}")
    reason = implementation(requested).unavailable(device_type, dtype)
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} cannot run {dtype} on {device_type}: {reason}")
    return requested


def available_backends() -> dict[str, str]:
    """Return, for every backend, "available" or the reason why it cannot run on this machine."""
    return {name: implementation(name).unavailable() or "available" for name in BACKENDS}

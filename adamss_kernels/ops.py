"""The operators behind `fused_linear`, a pair for each backend: schema beside fake, and the choice of the pair.

All pairs share one schema. The operators are raw: they carry no autograd formula of their own (that is
`functional.py`), so calling one directly on tensors that require grad gives no gradient. They are not part of the
public API.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from types import ModuleType
from typing import NamedTuple

import torch

from .config import BACKENDS, known_backend
from .mixed_batch import Groups
from .subspaces import Subspaces, accumulation_dtype

FEW_TOKENS = 64
"""Up to so many tokens tiles of 128 rows stay mostly empty: a GPU's backends are then preferred in another order."""
_PREFERENCE = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
GROUPED_BACKENDS = ("reference", "cpu", "triton")
"""Those that have operators for groups of tokens."""

# {} is empty, or for grouped operators what `Groups` has.
_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor B, Tensor C, Tensor? basis, Tensor? basis_bias, "
    "Tensor row_subspace, Tensor offsets, Tensor? active, {}bool keep_S, bool keep_P) "
    "-> (Tensor y, Tensor S, Tensor P)"
)
_BACKWARD = (
    "(Tensor dy, Tensor? x, Tensor? S, Tensor? P, Tensor weight, Tensor B, Tensor C, Tensor? basis, "
    "Tensor? basis_bias, Tensor row_subspace, Tensor offsets, Tensor? active, Tensor? trainable, {}bool[] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dB, Tensor dC)"
)
_GROUPS = "Tensor tokens, Tensor slots, Tensor starts, Tensor tiles, "


# y (M, N) is contiguous and of x's dtype.
_ADD_UPDATE = (
    _FORWARD.format("")
    .replace("Tensor x, Tensor weight, Tensor? bias", "Tensor(a!) y, Tensor x")
    .replace("(Tensor y, Tensor S", "(Tensor S")
)
_UPDATE_BACKWARD = _BACKWARD.format("").replace("Tensor weight, ", "")


class Operators(NamedTuple):
    """A backend's `forward` and `backward`; `reference.py` says what they compute."""

    forward: torch._ops.OpOverload
    backward: torch._ops.OpOverload


def _forward_fake(x, weight, bias, B, C, basis, basis_bias, row_subspace, offsets, active, *rest):
    *_, keep_S, keep_P = rest
    M = x.shape[0]
    y = x.new_empty(M, weight.shape[0])
    S = x.new_empty((M, B.shape[-2]) if keep_S else 0, dtype=accumulation_dtype(x.dtype))
    P = x.new_empty((M, basis.shape[0]) if keep_P else 0)
    return y, S, P


def _backward_fake(dy, x, S, P, weight, B, C, basis, basis_bias, row_subspace, offsets, active, trainable, *rest):
    *groups, needs = rest
    B_shape, C_shape = ((groups[1].shape[0], *t.shape[1:]) if groups else t.shape for t in (B, C))
    shapes = ((dy.shape[0], weight.shape[1]), weight.shape, weight.shape[:1], B_shape, C_shape)
    dtypes = (dy.dtype, dy.dtype, dy.dtype, B.dtype, C.dtype)
    return tuple(
        dy.new_empty(shape if need else 0, dtype=dtype)
        for shape, dtype, need in zip(shapes, dtypes, needs, strict=True)
    )


def _add_update_fake(y, x, B, C, basis, basis_bias, row_subspace, offsets, active, keep_S, keep_P):
    S = x.new_empty((x.shape[0], B.shape[0]) if keep_S else 0, dtype=accumulation_dtype(x.dtype))
    return S, x.new_empty((x.shape[0], basis.shape[0]) if keep_P else 0)


def _update_backward_fake(dy, x, S, P, B, C, basis, *rest):
    weight = dy.new_empty(dy.shape[1], B.shape[1] if basis is None else basis.shape[1])
    return _backward_fake(dy, x, S, P, weight, B, C, basis, *rest)


def _python_kernels(name, is_grouped):
    """Return the kernels of a backend whose module has them in Python."""
    prefix = "grouped_" if is_grouped else ""

    def forward(x, weight, bias, B, C, basis, basis_bias, row_subspace, offsets, active, *rest):
        subspaces = Subspaces(basis, basis_bias, row_subspace, offsets, active)
        groups = (Groups(*rest[:4]),) if is_grouped else ()
        with without_autocast(x):
            kernel = getattr(implementation(name), f"{prefix}forward")
            return kernel(x, weight, bias, B, C, subspaces, *groups, *rest[-2:])

    def backward(dy, x, S, P, weight, B, C, basis, basis_bias, row_subspace, offsets, active, trainable, *rest):
        subspaces = Subspaces(basis, basis_bias, row_subspace, offsets, active, trainable)
        groups = (Groups(*rest[:4]),) if is_grouped else ()
        with without_autocast(dy):
            kernel = getattr(implementation(name), f"{prefix}backward")
            return kernel(dy, x, S, P, weight, B, C, subspaces, *groups, rest[-1])

    return forward, backward


def _library_kernels(pairs, name):
    """Return stand-ins for kernels in compiled code: they load it, which puts its kernels before these."""

    def stand_in(which):
        def kernel(tensor, *operands):
            reason = implementation(name).why_unavailable(tensor.device.type, tensor.dtype)
            if reason is not None:
                raise RuntimeError(f"backend {name!r} cannot run {tensor.dtype} on {tensor.device.type}: {reason}")
            return pairs()[name][which](tensor, *operands)

        return kernel

    return stand_in(0), stand_in(1)


def without_autocast(tensor):
    """Switch autocast off inside, where it is on: `functional.py` has cast the operands, and float32 means float32."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


_library = torch.library.Library("adamss_kernels", "DEF")


def _defined_operator(operator, schema, kernel, fake):
    _library.define(operator + schema)
    _library.impl(operator, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"adamss_kernels::{operator}", fake, lib=_library)
    return getattr(torch.ops.adamss_kernels, operator).default


def _defined(name, is_grouped):
    """Define a pair of operators of backend `name`, and return it."""
    if name == "cpu":
        forward, backward = _library_kernels(lambda: GROUPED_OPERATORS if is_grouped else OPERATORS, name)
    else:
        forward, backward = _python_kernels(name, is_grouped)
    infix, groups = ("_grouped", _GROUPS) if is_grouped else ("", "")
    return Operators(
        _defined_operator(f"{name}{infix}_forward", _FORWARD.format(groups), forward, _forward_fake),
        _defined_operator(f"{name}{infix}_backward", _BACKWARD.format(groups), backward, _backward_fake),
    )


def _defined_without_base(name):
    """Define the pair of a backend in compiled code that leaves the base out, and return it."""
    forward, backward = _library_kernels(lambda: UPDATE_OPERATORS, name)
    return Operators(
        _defined_operator(f"{name}_add_update", _ADD_UPDATE, forward, _add_update_fake),
        _defined_operator(f"{name}_update_backward", _UPDATE_BACKWARD, backward, _update_backward_fake),
    )


OPERATORS = {name: _defined(name, is_grouped=False) for name in BACKENDS}
"""The pair of each backend, by its name."""
UPDATE_OPERATORS = {"cpu": _defined_without_base("cpu")}
"""The pair for the update alone, of the backends that have one: `forward` adds it to y and returns S and P."""
GROUPED_OPERATORS = {name: _defined(name, is_grouped=True) for name in GROUPED_BACKENDS}
"""The pair for tokens in groups, each of which has a B, C and masks of its own."""


@functools.cache
def implementation(name: str) -> ModuleType:
    """Return the module that implements backend `name`, importing it on first use.

    Such a module has `why_unavailable(device_type, dtype)`, which returns None or the reason why it cannot run there,
    and, unless compiled code gives the operators their kernels, `forward` and `backward` with the arguments of
    `reference.forward` and `reference.backward`, and, if it is one of `GROUPED_BACKENDS`, their grouped namesakes.
    """
    return importlib.import_module(f"{__package__}.{name}")


def choose_backend(
    requested: str, device: torch.device, dtype: torch.dtype, has_few_tokens: bool = False, is_grouped: bool = False
) -> str:
    """Return the backend that runs for tensors of `dtype` on `device`: the only place where that is decided.

    "auto" is replaced by the environment variable ADAMSS_BACKEND where that is set at the first call. What is still
    "auto" takes the first of these that can run: on the CPU cpu, reference; on CUDA and ROCm triton, cuda,
    reference, but cuda before triton where its library has the fused kernels for the GPU (Hopper, 16-bit dtypes) and
    more than `FEW_TOKENS` tokens to fill their tiles with; elsewhere reference. Where Triton works on a GPU with no
    dtype at all (it cannot be imported, or its first kernel does not compile), one warning names the cause and what
    runs instead. A backend named explicitly runs or raises; it never falls back to another. Compiled and exported code
    keeps what was chosen for it. Of `GROUPED_BACKENDS` alone where the tokens are in groups.

    Raises:
        ValueError: `requested`, or ADAMSS_BACKEND, is not the name of a backend.
        RuntimeError: The backend asked for cannot run here; the message says why.
    """
    return _chosen(requested, device.type, dtype, has_few_tokens, is_grouped)


# `torch.compiler.assume_constant_result` without its import of the whole compiler: tracers ask, and do not look inside.
choose_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _chosen(requested, device_type, dtype, has_few_tokens, is_grouped=False):
    requested = known_backend(requested)
    if requested == "auto":
        requested = known_backend(os.environ.get("ADAMSS_BACKEND") or "auto")
    if requested == "auto":
        preferred = _preferred(device_type, dtype, has_few_tokens)
        if is_grouped:
            preferred = tuple(name for name in preferred if name in GROUPED_BACKENDS)
        able = (name for name in preferred if implementation(name).why_unavailable(device_type, dtype) is None)
        chosen = next(able, "reference")
        if device_type == "cuda" and preferred and chosen != preferred[0]:
            _warn_of_broken(device_type, chosen)
        return chosen
    reason = implementation(requested).why_unavailable(device_type, dtype)
    if reason is None and is_grouped and requested not in GROUPED_BACKENDS:
        reason = f"it has no kernels for mixed batches; {', '.join(GROUPED_BACKENDS)} have"
    if reason is not None:
        raise RuntimeError(f"backend {requested!r} cannot run {dtype} on {device_type}: {reason}")
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
        reason = None if name == chosen else implementation(name).why_unavailable(device_type)
        if reason is None:
            break
        reasons.append(f"{name!r} cannot run on {device_type}: {reason}")
    if reasons:
        warnings.warn(f"using backend {chosen!r} instead: {'; '.join(reasons)}", stacklevel=4)


def available_backends() -> dict[str, str]:
    """Return, for every backend, "available" or the reason why it cannot run on this machine."""
    return {name: implementation(name).why_unavailable() or "available" for name in BACKENDS}

"""Finds and loads the CUDA library, and declares its interface (csrc/cuda/interface.h) to ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

from . import build_state, cuda_compile, find


class Layout(ctypes.Structure):
    """`adamss_cuda_layout`."""

    _fields_ = (
        *((name, c_int64) for name in ("N", "K")),
        *((name, c_void_p) for name in ("row_subspace", "offsets", "active", "trainable")),
    )


class Plan(ctypes.Structure):
    """`adamss_cuda_plan`."""

    _fields_ = tuple((name, c_int64) for name in ("stretches", "width", "parts"))


class InputProjectionArgs(ctypes.Structure):
    """`adamss_cuda_input_projection_args`."""

    _fields_ = (
        ("device", c_int64),
        ("stream", c_void_p),
        *((name, c_int64) for name in ("dtype", "A_dtype", "RHO", "R", "D")),
        *((name, c_void_p) for name in ("B", "A")),
        *((name, c_int64) for name in ("stride_ar", "stride_ad")),
        ("a", c_void_p),
        ("stride_a", c_int64),
        *((name, c_void_p) for name in ("Q", "q")),
        ("layout", Layout),
    )


class DeltaFwdArgs(ctypes.Structure):
    """`adamss_cuda_delta_fwd_args`."""

    _fields_ = (
        ("device", c_int64),
        ("stream", c_void_p),
        *((name, c_int64) for name in ("dtype", "M", "RHO", "r_max")),
        ("y", c_void_p),
        ("stride_ym", c_int64),
        *((name, c_void_p) for name in ("S", "C")),
        ("layout", Layout),
    )


class DeltaBwdArgs(ctypes.Structure):
    """`adamss_cuda_delta_bwd_args`."""

    _fields_ = (
        ("device", c_int64),
        ("stream", c_void_p),
        *((name, c_int64) for name in ("dtype", "M", "RHO", "r_max")),
        ("dy", c_void_p),
        *((name, c_int64) for name in ("stride_dym", "stride_dyn")),
        *((name, c_void_p) for name in ("S", "C", "dS", "dS_parts", "dC", "dC_parts")),
        ("plan", Plan),
        ("layout", Layout),
    )


class MaskRowsArgs(ctypes.Structure):
    """`adamss_cuda_mask_rows_args`."""

    _fields_ = (
        ("device", c_int64),
        ("stream", c_void_p),
        *((name, c_int64) for name in ("dtype", "RHO", "R")),
        ("dB", c_void_p),
        ("layout", Layout),
    )


class FusedArgs(ctypes.Structure):
    """`adamss_cuda_fused_args`."""

    _fields_ = (
        ("device", c_int64),
        ("stream", c_void_p),
        *((name, c_int64) for name in ("dtype", "A_dtype", "M", "D", "RHO", "RHO_PAD", "R", "r_max")),
        ("multiprocessors", c_int64),
        ("x", c_void_p),
        ("stride_xm", c_int64),
        ("W", c_void_p),
        ("stride_wn", c_int64),
        *((name, c_void_p) for name in ("bias", "A")),
        *((name, c_int64) for name in ("stride_ar", "stride_ad")),
        ("a", c_void_p),
        ("stride_a", c_int64),
        *((name, c_void_p) for name in ("B", "C", "y", "S", "dy")),
        ("stride_dym", c_int64),
        *((name, c_void_p) for name in ("P", "dx", "dB", "dC", "workspace")),
        ("layout", Layout),
    )


class Library(NamedTuple):
    """The loaded library; a kernel that cannot be launched raises RuntimeError with its name, shape and device."""

    input_projection: Callable[[InputProjectionArgs], None]
    delta_fwd: Callable[[DeltaFwdArgs], None]
    delta_bwd: Callable[[DeltaBwdArgs], None]
    mask_rows: Callable[[MaskRowsArgs], None]
    fused: Callable[[FusedArgs], None]
    fused_workspace: Callable[[FusedArgs], int]
    delta_bwd_plan: Callable[[int, int, int, int, int], Plan]
    architectures: str
    path: Path


def open_library(path: Path) -> Library:
    """Load the library in the file `path`.

    Raises:
        OSError: It cannot be loaded.
    """
    library = ctypes.CDLL(str(path))
    error, plan, architectures = (
        getattr(library, f"adamss_cuda_{name}") for name in ("error", "delta_bwd_plan", "architectures")
    )
    error.restype, error.argtypes = c_char_p, (c_int32,)
    plan.restype, plan.argtypes = Plan, (c_int64,) * 5
    architectures.restype = c_char_p
    workspace = library.adamss_cuda_fused_workspace
    workspace.restype, workspace.argtypes = c_int64, (ctypes.POINTER(FusedArgs),)

    def checked(name: str, args_type: type[ctypes.Structure]) -> Callable[..., None]:
        function = getattr(library, f"adamss_cuda_{name}")
        function.restype, function.argtypes = c_int32, (ctypes.POINTER(args_type),)

        def call(args: ctypes.Structure) -> None:
            status = function(args)
            if status != 0:
                raise RuntimeError(f"{name} failed on cuda:{args.device} for {_shape(args)}: {error(status).decode()}")

        return call

    return Library(
        checked("input_projection", InputProjectionArgs),
        checked("delta_fwd", DeltaFwdArgs),
        checked("delta_bwd", DeltaBwdArgs),
        checked("mask_rows", MaskRowsArgs),
        checked("fused", FusedArgs),
        workspace,
        plan,
        architectures().decode(),
        path,
    )


def _shape(args: ctypes.Structure) -> str:
    sizes = {
        name: getattr(args, name) for name, *_ in args._fields_ if name in ("M", "D", "R", "E", "F", "RHO", "r_max")
    }
    return ", ".join(f"{name}={size}" for name, size in (sizes | {"N": args.layout.N, "K": args.layout.K}).items())


@functools.cache
def load() -> Library:
    """Load the library once per process: the one that `build-cuda` made last, else the one that was installed.

    Raises:
        OSError: It is not there or cannot be loaded; the message says why.
    """
    path = _find()
    if path is None:
        raise OSError(_build_state())
    return open_library(path)


def describe() -> dict[str, str]:
    """Return what `adamss-kernels info` shows of the library, which need not be loaded for that."""
    path = _find()
    if path is None:
        return {"state": _build_state()}
    state = f"built by `adamss-kernels build-cuda` ({path.parent.name})" if _is_cached(path) else _build_state()
    return {"state": state, "file": str(path)}


def cache_folder() -> Path:
    """Return the folder under the user's cache for libraries of these very sources; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "adamss_kernels", "cuda", cuda_compile.source_hash(cuda_compile.sources())).absolute()


def _find() -> Path | None:
    built = sorted(cache_folder().glob(f"*/{cuda_compile.NAME}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else find(cuda_compile.NAME)


def _is_cached(path: Path) -> bool:
    return cache_folder() in path.parents


def _build_state() -> str:
    return build_state("cuda_build_state.txt", f"not built; {cuda_compile.HOW_TO_BUILD}")

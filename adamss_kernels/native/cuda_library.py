"""Finds and loads the CUDA library, and declares its interface (csrc/cuda/interface.h) to ctypes."""

from __future__ import annotations

import ctypes
import functools
import os
import stat
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

from . import cuda_compile


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
    reason = why_not_private(path) if _is_cached(path) else None
    if reason is not None:
        raise OSError(f"{path}: {reason}")
    return open_library(path)


def why_not_loaded() -> str | None:
    """Return why the library cannot be loaded, or None."""
    try:
        load()
    except OSError as error:
        return str(error)
    return None


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


def why_not_private(path: Path) -> str | None:
    """Return why someone else could put code into `path`, of which any part may not exist yet, or None.

    The cache folder's base has to be this user's and not writable by everyone, what lies in it by nobody else at all;
    above it, nobody may be able to replace a folder.
    """
    base = cache_folder().parents[2]
    for part in (path, *path.parents):
        if not part.exists():
            continue
        # A link is followed: what counts is where it leads.
        status = part.stat()
        mode = stat.S_IMODE(status.st_mode)
        if part == base or base in part.parents:
            if status.st_uid != os.geteuid():
                return f"{part} belongs to another user ({status.st_uid})"
            if mode & (stat.S_IWOTH if part == base else stat.S_IWOTH | stat.S_IWGRP):
                return f"{part} can be written by others (mode {mode:o})"
        elif mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"{part} can be written by anyone (mode {mode:o})"
    return None


def _find() -> Path | None:
    built = sorted(cache_folder().glob(f"*/{cuda_compile.NAME}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else _installed(cuda_compile.NAME)


def _is_cached(path: Path) -> bool:
    return cache_folder() in path.parents


def _installed(name: str) -> Path | None:
    # An editable install keeps the library apart from the sources; the package's path names both places.
    from adamss_kernels import native

    return next((path for folder in native.__path__ if (path := Path(folder) / name).is_file()), None)


def _build_state() -> str:
    """Return what was recorded about the library when the package was installed."""
    path = _installed("cuda_build_state.txt")
    return path.read_text().strip() if path else f"not built; {cuda_compile.HOW_TO_BUILD}"

"""Finds and loads the CUDA library, whose launches (csrc/cuda/operators.h) are operators of torch from then on."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import build_state, cuda_compile, find, of_torch, register


class Library(NamedTuple):
    """The loaded library's operators; one whose kernel cannot be launched raises RuntimeError and names it."""

    input_projection: Callable[..., tuple[Tensor, Tensor]]
    delta_fwd: Callable[..., None]
    delta_bwd: Callable[..., tuple[Tensor, Tensor]]
    mask_rows: Callable[..., None]
    fused_forward: Callable[..., tuple[Tensor, Tensor]]
    fused_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    architectures: str


def open_library(
    path: Path, namespace: str = "adamss_kernels", key: str = "CUDA", libtorch_cuda: Path | None = None
) -> Library:
    """Load the library in the file `path`, and define its operators in `namespace`: once per namespace.

    Args:
        path: The library.
        namespace: Of the operators.
        key: The dispatch key of the tensors that they take.
        libtorch_cuda: What exports torch's functions for CUDA; torch's own by default.

    Raises:
        OSError: It cannot be loaded, or this torch has not what it needs.
    """
    library = ctypes.CDLL(str(path))
    words = (namespace, key, of_torch("torch_cpu"), libtorch_cuda or of_torch("torch_cuda"))
    register(library, "adamss_cuda_register", *words)
    operators = getattr(torch.ops, namespace)
    names = [name for name in Library._fields if name != "architectures"]
    called: dict[str, Any] = {name: _told(getattr(operators, f"cuda_{name}").default) for name in names}
    return Library(**called, architectures=architectures(path))


def architectures(path: Path) -> str:
    """Return what the library in the file `path` was compiled for, as in "80 90+PTX", and register nothing.

    Raises:
        OSError: It cannot be loaded.
    """
    said = ctypes.CDLL(str(path)).adamss_cuda_architectures
    said.restype = ctypes.c_char_p
    return str(said().decode())


def _told(operator: Callable[..., object]) -> Callable[..., object]:
    """Return the operator with torch's own type for a lack of memory, which C++ can only put in words."""

    def call(*operands: object) -> object:
        try:
            return operator(*operands)
        except RuntimeError as error:
            if str(error).startswith("CUDA out of memory"):
                raise torch.OutOfMemoryError(str(error)) from None
            raise

    return call


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
    return Path(base, "adamss_kernels", "cuda", cuda_compile.source_hash(cuda_compile.csrc())).absolute()


def _find() -> Path | None:
    built = sorted(cache_folder().glob(f"*/{cuda_compile.NAME}"), key=lambda path: path.stat().st_mtime)
    return built[-1] if built else find(cuda_compile.NAME)


def _is_cached(path: Path) -> bool:
    return cache_folder() in path.parents


def _build_state() -> str:
    return build_state("cuda_build_state.txt", f"not built; {cuda_compile.HOW_TO_BUILD}")

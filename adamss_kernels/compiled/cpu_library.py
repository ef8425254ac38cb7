"""Loads the C++ library of csrc/cpu, which from then on gives the operators of backend `cpu` their kernels."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from ctypes import c_char_p, c_int32, c_void_p
from typing import NamedTuple

import torch

from . import SUFFIX, build_state, find, of_torch, register, why_not_loaded

_NAME = f"libadamss_cpu.{SUFFIX}"


class Library(NamedTuple):
    """The loaded library: the instruction sets it can use here, and how to choose one by name."""

    isas: tuple[str, ...]
    use_isa: Callable[[str], None]
    isa: Callable[[], str]


@functools.cache
def load() -> Library:
    """Load the library once per process; the environment variable ADAMSS_CPU_ISA forces an instruction set.

    Raises:
        OSError: It is not there or cannot be loaded; the message says why.
    """
    path = find(_NAME)
    if path is None:
        raise OSError(_build_state())
    library = ctypes.CDLL(str(path))
    libtorch = of_torch("torch_cpu")
    try:
        parallel_for = ctypes.cast(ctypes.CDLL(str(libtorch)).torch_parallel_for, c_void_p)
    except AttributeError:
        raise OSError(f"torch {torch.__version__} does not export torch_parallel_for") from None
    for name in ("adamss_cpu_isa", "adamss_cpu_isas"):
        getattr(library, name).restype = c_char_p
    library.adamss_cpu_init.argtypes = (c_void_p, c_char_p)
    library.adamss_cpu_init.restype = c_int32

    isas = tuple(library.adamss_cpu_isas().decode().split())

    def use_isa(name: str) -> None:
        if library.adamss_cpu_init(parallel_for, name.encode()) != 0:
            raise OSError(f"ADAMSS_CPU_ISA={name!r}: this machine and build have {isas}")

    use_isa(os.environ.get("ADAMSS_CPU_ISA", ""))
    register(library, "adamss_cpu_register", libtorch)
    return Library(isas, use_isa, lambda: library.adamss_cpu_isa().decode())


def describe() -> dict[str, str]:
    """Return what `adamss-kernels info` shows of the library."""
    reason = why_not_loaded(load)
    if reason is not None:
        return {"state": reason}
    library = load()
    return {
        "state": _build_state(),
        "ISA": f"{library.isa()} (of {', '.join(library.isas)}; ADAMSS_CPU_ISA forces one)",
        "takes": "float32, float64 and bfloat16 on the CPU; everything else is the reference's",
        "threads": "torch's own",
    }


def _build_state() -> str:
    return build_state("build_state.txt", "not built: this is a source tree that was not installed")

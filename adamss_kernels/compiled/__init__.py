"""The compiled libraries: where they lie, how they are built and loaded, and their interfaces."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

SUFFIX = "dylib" if sys.platform == "darwin" else "so"


def find(name: str) -> Path | None:
    """Return the path of an installed library or of what was recorded about its build, or None."""
    # An editable install keeps them apart from the sources; the package's path names both places.
    return next((path for folder in __path__ if (path := Path(folder) / name).is_file()), None)


def of_torch(name: str) -> Path:
    """Return the path of torch's own library `name`."""
    return Path(torch.__file__).parent / "lib" / f"lib{name}.{SUFFIX}"


def register(library: ctypes.CDLL, function: str, *words: str | Path) -> None:
    """Call `function` of `library`, which finds torch's functions and gives operators their kernels.

    Raises:
        OSError: torch has not what it needs.
    """
    call = getattr(library, function)
    call.restype, call.argtypes = ctypes.c_char_p, (ctypes.c_char_p,) * len(words)
    missing = call(*map(os.fsencode, words))
    if missing is not None:
        lack = os.fsdecode(missing)
        raise OSError(f"torch {torch.__version__} {'has not loaded' if os.sep in lack else 'does not export'} {lack}")


def build_state(name: str, otherwise: str) -> str:
    """Return what CMake recorded in the file `name` when the package was installed, or `otherwise`."""
    path = find(name)
    return path.read_text().strip() if path else otherwise


def why_not_loaded(load: Callable[[], object]) -> str | None:
    """Return why `load` cannot load its library, or None."""
    try:
        load()
    except OSError as error:
        return str(error)
    return None

"""The compiled libraries: where they lie, how they are built and loaded, and their interfaces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def find(name: str) -> Path | None:
    """Return the path of an installed library or of what was recorded about its build, or None."""
    # An editable install keeps them apart from the sources; the package's path names both places.
    return next((path for folder in __path__ if (path := Path(folder) / name).is_file()), None)


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

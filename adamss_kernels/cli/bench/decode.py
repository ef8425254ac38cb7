"""Few tokens, as when text is generated, and ranks above the usual: what the layers' suite has no room for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import layer, providers
from .measure import Settings
from .results import Row

DEFAULTS = layer.DEFAULTS | {"M": 1, "r": 3}
# Width, dtype, tokens.
_DECODE = [
    (768, "float32", (1, 8, 16)),
    (768, "bfloat16", (1, 8, 16)),
    (4096, "float32", (1, 16)),
    (4096, "bfloat16", (1, 16)),
]
_HIGH_RANK = {"D": 768, "M": 2048, "r": 16}


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Measure one case as `layer` does; by default the bare layer, ours and PEFT's two."""
    if names is None:
        able = providers.defaults(settings.device, getattr(torch, case["dtype"]), settings.graph)
        # The first after the bare layer is the backend that "auto" takes.
        names = [name for name in able if name in (able[0], able[1], "peft-adamss", "peft-lora")]
    for row in layer.measure(case, names, settings):
        yield {**row, "suite": "decode"}


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open."""
    return layer.complete(DEFAULTS | case)


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default; in full, also 32 and 64 tokens."""
    more = (32, 64) if full else ()
    few = [{"D": D, "M": M, "dtype": dtype} for D, dtype, tokens in _DECODE for M in (*tokens, *more)]
    return [complete(case) for case in (*few, _HIGH_RANK)]

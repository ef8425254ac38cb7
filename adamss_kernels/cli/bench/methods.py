"""The related methods against the bare frozen `nn.Linear`, AdaMSS and PEFT's LoRA: one layer each, as `layer` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...adapters import METHODS
from . import layer, providers
from .measure import Settings
from .results import Row

DEFAULTS = layer.DEFAULTS
complete = layer.complete


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Measure one case as the layer suite does, every method with its default options."""
    able = providers.defaults(settings.device, getattr(torch, case["dtype"]))
    # The first after the bare layer is the backend that "auto" takes.
    names = names or [able[1], *METHODS, *(name for name in able if name == "peft-lora")]
    for row in layer.measure(case, names, settings):
        yield {**row, "suite": "methods"}


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default."""
    return [complete(case) for case in [{"M": 1024}, *([{"M": 4096}, {"D": 4096, "M": 512}] if full else [])]]

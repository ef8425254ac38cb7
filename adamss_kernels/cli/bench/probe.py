"""What one call costs besides time: tensor memory at its peak, bytes kept for backward, operators."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from .results import Row


def probe(layer: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Row:
    """Run `layer` once without timing it.

    Args:
        layer: Called on x.
        x: (M, D), requires grad.
        dy: (M, N), gradient of the output.
        backward: Whether backward follows; otherwise forward runs without gradients.

    Returns:
        peak_bytes: What the call adds to the memory of tensors at its peak, its result included.
        saved_bytes: What forward keeps for backward besides parameters and buffers, x included where it is kept.
        aten_calls: Calls of `aten` operators that are not made by another one, as torch.profiler sees them.
    """
    trained = [p for p in layer.parameters() if p.requires_grad]
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return t

    if torch.cuda.is_available() and x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated() if x.is_cuda else 0
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=not x.is_cuda) as profiler:
        if backward:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = layer(x)
            torch.autograd.grad(y, (x, *trained), dy)
        else:
            with torch.no_grad():
                y = layer(x)
    for t in (*layer.parameters(), *layer.buffers()):
        saved.pop(t.untyped_storage().data_ptr(), None)
    events = profiler.profiler.kineto_results.events()
    peak = torch.cuda.max_memory_allocated() - start if x.is_cuda else _peak(events)
    return {"peak_bytes": peak, "saved_bytes": sum(saved.values()), "aten_calls": _outermost(events)}


def _outermost(events: list[Any]) -> int:
    """Return how many `aten` operators run that are not part of another one."""
    count = end = 0
    for event in sorted(events, key=lambda e: (e.start_ns(), -e.duration_ns())):
        if event.name().startswith("aten::") and event.start_ns() >= end:
            count += 1
            end = event.start_ns() + event.duration_ns()
    return count


def _peak(events: list[Any]) -> int:
    """Return the highest sum of allocations minus releases; what was allocated before the call does not count."""
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the profiler's C++ library from writing its own trace points to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

"""Peak memory of one layer as the system sees it, GEMM buffers included, each provider in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from . import layer, providers
from .layer import FORWARD_BACKWARD
from .measure import Settings
from .results import Row

BASE = "linear"
DEFAULTS = layer.DEFAULTS
FORWARD = "training forward"
complete = layer.complete


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Measure by how much a training forward, and one with its backward, raise the peak of resident memory.

    Yields:
        One row for each pass and provider: peak_bytes, and y_bytes, the size of the output.
    """
    dtype = getattr(torch, case["dtype"])
    if names is None:
        known = providers.defaults(settings.device, dtype)
        names = [name for name in known if name in (known[1], "peft-adamss", "peft-lora")]
    chosen = [BASE, *(name for name in names if name != BASE)]
    y_bytes = case["M"] * case["N"] * dtype.itemsize
    peaks: dict[str, dict[str, int]] = {}
    for name in chosen:
        # A process that has done something else has memory to spare, and shows no peak.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[name] = pool.submit(_peaks, name, case, str(settings.device), torch.get_num_threads()).result()
    for direction in (FORWARD, FORWARD_BACKWARD):
        for name in chosen:
            row = {"suite": "memory", "case": {"pass": direction, **case}, "provider": name}
            yield {**row, "peak_bytes": peaks[name][direction], "y_bytes": y_bytes}


def _peaks(name: str, case: dict[str, Any], device: str, threads: int) -> dict[str, int]:
    torch.set_num_threads(threads)
    module = providers.build([name], case, torch.device(device))[name].layer
    trained = [p for p in module.parameters() if p.requires_grad]
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(case["M"], case["D"], device=device).to(dtype).requires_grad_()
    dy = torch.ones(case["M"], case["N"], device=device, dtype=dtype)
    # Loads libraries and compiles, on few tokens so that hardly anything is left allocated.
    few = x[:1].detach().requires_grad_()
    torch.autograd.grad(module(few), (few, *trained), dy[:1])
    peaks = {}
    before = _start(x)
    y = module(x)
    peaks[FORWARD] = _peak(x) - before
    torch.autograd.grad(y, (x, *trained), dy)
    peaks[FORWARD_BACKWARD] = _peak(x) - before
    return peaks


def _start(x: torch.Tensor) -> int:
    """Forget the peak so far and return the memory in use."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    before = _status("VmRSS")
    # Resets the high-water mark (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    return before


def _peak(x: torch.Tensor) -> int:
    if x.is_cuda:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default."""
    return [complete(case) for case in [{"D": 4096, "M": 512, "r": 3}, *([{"M": 4096, "r": 3}] if full else [])]]

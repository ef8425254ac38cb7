"""Timing on a GPU, shared by the stages of bench/gpu.py; what was timed where is `results.environment`."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from adamss_kernels.cli.bench.measure import captured

# Dense bf16 FLOP/s and bytes/s that a large product, and a large copy, were seen to reach; not the data sheet's.
PEAKS = {"NVIDIA H100": (798e12, 3.0e12), "NVIDIA H200": (790e12, 4.3e12)}


def peaks(device: torch.device) -> tuple[float, float] | None:
    """Return the FLOP/s and bytes/s that bound this GPU, or None where nobody has measured them."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if name.startswith(known)), None)


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, graph: bool = False
) -> dict[str, float | str]:
    """Return the median seconds of each call, taken in turns; a call that fails is answered by its error.

    Eager, a time is that of back-to-back calls, Python included. With `graph` it is the GPU's, of one replay of a CUDA
    graph, after the L2 cache has been overwritten; a call that synchronises is answered by PyTorch's complaint.
    """
    results: dict[str, float | str] = {}
    timers = {}
    for name, call in calls.items():
        try:
            timers[name] = _timer(call, device, graph)
        except Exception as error:  # whatever another library cannot do
            results[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            times[name].append(timer())
    return results | {name: statistics.median(values) for name, values in times.items()}


def _timer(call: Callable[[], object], device: torch.device, graph: bool) -> Callable[[], float]:
    """Warm up, and return what takes one time."""
    if device.type != "cuda":
        call()
        return lambda: _wall(call)
    if graph:
        replay = captured(call)
        return lambda: _events(replay, before=_scratch(device).zero_)
    for _ in range(3):
        call()
    repeats = max(1, min(10, round(0.02 / _events(call))))
    return lambda: _events(lambda: [call() for _ in range(repeats)]) / repeats


@functools.cache
def _scratch(device: torch.device) -> torch.Tensor:
    """Return memory larger than any L2 cache."""
    return torch.empty(256 << 20, dtype=torch.uint8, device=device)


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _events(call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return rows as a Markdown table; the columns are those of the first row that has them."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        lines.append("| " + " | ".join(f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)

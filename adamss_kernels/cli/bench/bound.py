"""What this machine can do at best, measured in the same run: a matrix product for FLOP/s, copies for bytes/s."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .results import Row

# Rows of square products, and bytes that a copy reads and writes in total.
_GEMM = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_COPY = {"cpu": tuple(2**n for n in range(18, 30, 2)), "cuda": (2**24, 2**28, 2**32)}


class Bound(NamedTuple):
    """The best that was seen.

    Attributes:
        flops: FLOP/s of a square product in the dtype that is measured.
        bandwidth: Bytes/s of a copy, by the bytes that it reads and writes: small ones stay in a cache.
    """

    flops: float
    bandwidth: dict[int, float]

    def seconds(self, flops: float, moved: float) -> float:
        """Return the least time for so many FLOPs on operands of so many bytes, each moved once."""
        nearest = min(self.bandwidth, key=lambda size: abs(math.log(size / moved)))
        return max(flops / self.flops, moved / self.bandwidth[nearest])

    def rows(self, suite: str, dtype: str) -> list[Row]:
        """Return the bound that a suite measured for `dtype` as rows of its result file."""
        case = {"of": suite, "dtype": dtype}
        gemm: Row = {"suite": "bound", "case": case, "provider": "gemm", "tflop_per_s": self.flops / 1e12}
        copies = [
            {"suite": "bound", "case": {**case, "bytes": size}, "provider": "copy", "gb_per_s": speed / 1e9}
            for size, speed in self.bandwidth.items()
        ]
        return [gemm, *copies]


@functools.cache
def measure_bound(device: torch.device, dtype: torch.dtype) -> Bound:
    """Measure products of `dtype` and copies on `device`, once per process."""
    flops = 0.0
    for size in _GEMM[device.type]:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        flops = max(flops, 2 * size**3 / _best_seconds(functools.partial(torch.mm, a, b, out=c), device))
    bandwidth = {}
    for size in _COPY[device.type]:
        source = torch.ones(size // 8, device=device)
        target = torch.empty_like(source)
        bandwidth[size] = size / _best_seconds(functools.partial(target.copy_, source), device)
    return Bound(flops, bandwidth)


def linear_work(D: int, N: int, M: int, itemsize: int, backward: bool) -> tuple[int, int]:
    """Return FLOPs and bytes of a bare linear layer, each operand moved once: forward, or also dx = dy W.

    They are what every provider is credited with, whatever it computes besides.
    """
    passes = 2 if backward else 1
    return 2 * M * N * D * passes, itemsize * (N * D + M * D + M * N) * passes


def update_work(case: Mapping[str, Any], rho: int, entries: int, itemsize: int, backward: bool) -> tuple[int, int]:
    """Return FLOPs and bytes that an AdaMSS update adds to the bare layer at least: forward, or also backward.

    S and dQ = dS^T x are counted by the cheaper of their two ways, through Q or through P; dx by the cheaper of dS Q
    and an updated copy of W. x is read once more than by the bare layer, in backward x and dy.

    Args:
        case: D, N, M and R.
        rho: Columns of S that are active.
        entries: Coefficients of C that are active, sum_k n_k r_k.
        itemsize: Bytes of an element of x.
        backward: Whether to add the backward.
    """
    D, N, M, R = (case[name] for name in ("D", "N", "M", "R"))
    S, moved = M * min(rho * D, R * (D + rho)), M * D
    work = S + M * entries
    if backward:
        work += S + 2 * M * entries + min(M * rho, entries) * D
        moved += M * D + M * N + 2 * min(M, N) * D
    return 2 * work, itemsize * moved


def _best_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the shortest of several times of `call`, repeated until a time is long enough to be read."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    sync()
    times: list[float] = []
    repeats = 1
    while len(times) < 15:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        sync()
        elapsed = time.perf_counter() - start
        if elapsed < 2e-3:
            repeats *= 2
        else:
            times.append(elapsed / repeats)
    return min(times)

"""Microseconds of Python that a layer costs on the Triton backend, without a GPU: all but the driver's part of it.

Usage: python tools/triton_overhead.py

The driver is a stub and the tensors lie on the CPU, so that kernels are compiled and never run. Torch's own products
do run, on tensors so small that they take about as long as their launches on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

import adamss_kernels.triton as backend
from adamss_kernels.functional import fused_linear
from adamss_kernels.subspaces import Subspaces
from adamss_kernels.triton import tuning

ROUNDS = 500
M, D, N, R, K, RANK = 32, 64, 64, 16, 10, 3


class Driver:
    """As much of Triton's driver as a launch asks for."""

    launcher_cls = staticmethod(lambda source, metadata: lambda *args: None)
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448},
        load_binary=lambda *args: (1, 1, 64, 0, 1024),
        unload_module=lambda module: None,
    )
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def median_us(function: Callable[[], object]) -> float:
    """Return the median time of a call, after some that compile."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        function()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times[ROUNDS // 10 :]) / 1e3


def main() -> None:
    """Print one line for forward without gradients, and for forward and backward with P kept and x kept."""
    torch.set_num_threads(1)
    shapes = ((M, D), (N, D), (N,), (R, D), (R,))
    x, weight, bias, basis, a = (torch.randn(shape, dtype=torch.bfloat16) for shape in shapes)
    B, C = torch.randn(K * RANK, R).requires_grad_(), torch.randn(N, RANK).requires_grad_()
    rows, offsets = torch.arange(N, dtype=torch.int32) % K, torch.arange(K + 1, dtype=torch.int32) * RANK
    on = torch.ones(K, dtype=torch.bool)
    subspaces, dy = Subspaces(basis, a, rows, offsets, on, on), torch.randn(M, N, dtype=torch.bfloat16)
    x.requires_grad_()

    def layer(mode: str = "auto") -> torch.Tensor:
        return fused_linear(x, weight, bias, B, C, subspaces, mode, "triton")

    triton.runtime.driver.set_active(Driver)
    with (
        mock.patch.object(backend, "why_unavailable", lambda *args: None),
        mock.patch.object(tuning, "arch_of", lambda device: "sm_90"),
    ):
        with torch.no_grad():
            print(f"forward without gradients: {median_us(layer):.0f} us")
        for mode in ("projection", "input"):
            y = layer(mode)
            forward = median_us(lambda mode=mode: layer(mode))  # type: ignore[misc]
            backward = median_us(lambda y=y: torch.autograd.grad(y, (x, B, C), dy, retain_graph=True))  # type: ignore[misc]
            print(f"{mode} kept: forward {forward:.0f} us, backward {backward:.0f} us")


if __name__ == "__main__":
    main()

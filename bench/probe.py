"""Stage `probe` of bench/gpu.py: the ceilings of the card, and how long each kernel takes beside cuBLAS's product."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import interleaved
from torch import Tensor
from torch.nn import functional as F

from adamss_kernels import SubspaceLayout, adamss_linear, available_backends

# (M, D, N), those first that matter most.
SHAPES = {
    "cuda": [(8192, 4096, 4096), (16384, 768, 768), (16384, 1024, 1024), (4096, 3072, 3072), (8192, 4096, 14336)],
    "cpu": [(20, 32, 48)],
}
RANKS, R = (3,) * 10, 100


def run(device: torch.device, budget: float, record: Callable[[dict[str, Any]], None]) -> None:
    """Record copy bandwidth, cuBLAS's rate, and for each backend the error and the time of each kernel, per shape."""
    deadline = time.monotonic() + budget
    record({"what": "copy, read and written", "TB/s": _copy_rate(device) / 1e12})
    for M, D, N in SHAPES[device.type]:
        if time.monotonic() > deadline:
            record({"M": M, "D": D, "N": N, "skipped": "no time left"})
            continue
        _shape(M, D, N, device, record)


def _copy_rate(device: torch.device) -> float:
    source = torch.randn(1 << (28 if device.type == "cuda" else 12), device=device).bfloat16()
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    seconds = interleaved(copy, device, rounds=5, graph=device.type == "cuda")["copy"]
    assert isinstance(seconds, float)
    return 2 * source.nbytes / seconds


def _shape(M: int, D: int, N: int, device: torch.device, record: Callable[[dict[str, Any]], None]) -> None:
    size = {"M": M, "D": D, "N": N}
    operands, dy = problem(M, D, N, device)
    x, weight = operands["x"], operands["weight"]
    products = {
        "cuBLAS forward": lambda: torch.mm(x.detach(), weight.T),
        "cuBLAS dx": lambda: torch.mm(dy, weight),
    }
    for what, seconds in interleaved(products, device, rounds=9, graph=device.type == "cuda").items():
        if isinstance(seconds, float):
            record(size | {"what": what, "us": seconds * 1e6, "TFLOP/s": 2 * M * D * N / seconds / 1e12})
    exact = gradients(plain(operands), operands, dy)
    for backend in ("cuda", "triton"):
        if available_backends()[backend] != "available":
            continue
        for mode in ("projection", "input"):

            def call(backend: str = backend, mode: str = mode) -> tuple[Tensor, ...]:
                y = adamss_linear(**operands, backend=backend, save_for_backward=mode)
                return gradients(y, operands, dy)

            errors = [float((got - want).norm() / want.norm()) for got, want in zip(call(), exact, strict=True)]
            named = dict(zip(("y", "dx", "dB", "dC"), (f"{error:.1e}" for error in errors), strict=True))
            record(size | {"what": f"{backend}, {mode} kept: error"} | named)
            if device.type != "cuda":
                continue
            for kernel, us in kernels(call):
                record(size | {"what": f"{backend}, {mode} kept: kernel", "kernel": kernel, "us": us})


def problem(M: int, D: int, N: int, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Return operands of `adamss_linear` and dy, in bfloat16 with B and C in float32 (float32 on the CPU)."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    K = len(RANKS)
    rows = torch.cat((torch.arange(K), torch.randint(0, K, (N - K,), generator=torch.Generator().manual_seed(0))))
    layout = SubspaceLayout(rows.to(device, torch.int32), RANKS)
    operands = {
        "x": randn(M, D).to(dtype).requires_grad_(),
        "weight": (randn(N, D) / D**0.5).to(dtype),
        "bias": randn(N).to(dtype),
        "basis": (randn(R, D) / D**0.5).to(dtype),
        "basis_bias": randn(R).to(dtype),
        "B": (randn(layout.rho, R) / R**0.5).requires_grad_(),
        "C": randn(N, layout.r_max).requires_grad_(),
        "layout": layout,
    }
    return operands, randn(M, N).to(dtype)


def plain(operands: dict[str, Any]) -> Tensor:
    """Return the formula in float32 PyTorch."""
    from adamss_kernels.layout import block_diagonal

    layout = operands["layout"]
    x, weight, bias, basis, a = (operands[name].float() for name in ("x", "weight", "bias", "basis", "basis_bias"))
    S = F.linear(F.linear(x, basis, a), operands["B"])
    Ct = block_diagonal(operands["C"], layout.row_subspace, layout.offsets, layout.rho)
    return F.linear(x, weight, bias) + S @ Ct


def gradients(y: Tensor, operands: dict[str, Any], dy: Tensor) -> tuple[Tensor, ...]:
    """Return y and the gradients of x, B and C."""
    leaves = [operands[name] for name in ("x", "B", "C")]
    return tuple(t.detach() for t in (y, *torch.autograd.grad(y, leaves, dy.to(y.dtype))))


def kernels(call: Callable[[], object]) -> list[tuple[str, float]]:
    """Return name and microseconds of each kernel of one warm call, in the order of their start."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [e for e in profiled.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name[:70], e.time_range.elapsed_us()) for e in sorted(events, key=lambda e: e.time_range.start)]

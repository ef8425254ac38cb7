"""Stage `grid` of bench/gpu.py: one layer against the bare frozen linear, over widths and numbers of tokens."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import interleaved, peaks
from torch import Tensor, nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, available_backends

# (D, N, M), those first that matter most: time may end before the last.
GRID = {
    "cuda": [
        (4096, 4096, 8192), (768, 768, 16384), (4096, 4096, 1), (4096, 4096, 16), (1024, 1024, 16384), (768, 768, 4096),
        (4096, 14336, 8192), (768, 768, 1), (4096, 4096, 16384), (1024, 1024, 4096), (4096, 14336, 16),
    ],
    "cpu": [(32, 48, 20), (32, 48, 1)],
}  # fmt: skip
OPTIONS = {"r": 100, "num_subspaces": 10, "subspace_rank": 3}


def contenders(D: int, N: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the layers that are compared, over the same weight; those of libraries that are absent are left out."""
    torch.manual_seed(0)
    linear = nn.Linear(D, N, device=device, dtype=dtype).requires_grad_(False)
    layers: dict[str, nn.Module] = {"linear": linear}
    options = OPTIONS if device.type == "cuda" else {"r": 8, "num_subspaces": 3, "subspace_rank": 2}
    first = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(**options))
    nn.init.normal_(first.C, std=0.02)
    for name, state in available_backends().items():
        if state == "available" and name in (("triton", "cuda") if device.type == "cuda" else ("cpu", "triton")):
            layer = copy.deepcopy(first)
            layer.config = dataclasses.replace(layer.config, backend=name)
            layers[f"adamss {name}"] = layer
    try:
        import peft
    except ImportError:
        return layers
    # Releases before 0.19 have no AdaMSS.
    adamss = {"peft adamss": ("AdamssConfig", options)} if hasattr(peft, "AdamssConfig") else {}
    lora = {f"peft lora r={r}": ("LoraConfig", {"r": r}) for r in (8, 32)}
    for name, (config, values) in (adamss | lora).items():
        model = nn.Module()
        model.proj = nn.Linear(D, N, device=device, dtype=dtype)
        model.proj.load_state_dict(linear.state_dict())
        adapted = peft.get_peft_model(model, getattr(peft, config)(**values, target_modules=["proj"]))
        layers[name] = adapted.base_model.model.proj
    return layers


def run(device: torch.device, budget: float, record: Callable[[dict[str, Any]], None]) -> None:
    """Time forward without gradients, and forward and backward, eager and in a CUDA graph, until `budget` seconds."""
    deadline = time.monotonic() + budget
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    built: dict[tuple[int, int], dict[str, nn.Module]] = {}
    for D, N, M in GRID[device.type]:
        if time.monotonic() > deadline:
            record({"D": D, "N": N, "M": M, "skipped": "no time left"})
            continue
        try:
            if (D, N) not in built:
                built[D, N] = contenders(D, N, device, dtype)
            for row in _size(built[D, N], (D, N, M), device, dtype):
                record(row)
        except Exception as error:  # the other sizes may still run
            record({"D": D, "N": N, "M": M, "error": f"{type(error).__name__}: {error}".splitlines()[0]})


def _size(
    layers: dict[str, nn.Module], size: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """Return the rows of one size."""
    D, N, M = size
    trained = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
    x = torch.randn(M, D, device=device, dtype=dtype)
    dy = torch.randn(M, N, device=device, dtype=dtype)
    rows: list[dict[str, Any]] = []
    for backward in (False, True):
        # Serving: nothing of an adapter is trained.
        for p in trained:
            p.requires_grad_(backward)
        calls = {name: _call(layer, x, dy, backward) for name, layer in layers.items()}
        for graph in (False, True) if device.type == "cuda" else (False,):
            times = interleaved(calls, device, rounds=7 if device.type == "cuda" else 2, graph=graph)
            rows += _rows(times, size, backward, graph, dtype, peaks(device))
    return rows


def _call(layer: nn.Module, x: Tensor, dy: Tensor, backward: bool) -> Callable[[], object]:
    if not backward:

        def forward() -> Tensor:
            with torch.no_grad():
                return layer(x)

        return forward
    leaf = x.clone().requires_grad_()
    trained = [p for p in layer.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(layer(leaf), (leaf, *trained), dy)


def _rows(
    times: dict[str, float | str],
    size: tuple[int, int, int],
    backward: bool,
    graph: bool,
    dtype: torch.dtype,
    bound: tuple[float, float] | None,
) -> list[dict[str, Any]]:
    D, N, M = size
    # Of the bare linear layer: what any method pays at least.
    flops = 2 * M * N * D * (2 if backward else 1)
    moved = dtype.itemsize * (N * D + M * D + M * N) * (2 if backward else 1)
    base = times["linear"]
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {"D": D, "N": N, "M": M, "pass": "fwd+bwd" if backward else "fwd"}
        row |= {"mode": "graph" if graph else "eager", "layer": name}
        if isinstance(seconds, str):
            row["error"] = seconds
        else:
            row |= {"us": seconds * 1e6, "ratio": seconds / base if isinstance(base, float) else None}
            row |= {"TFLOP/s": flops / seconds / 1e12, "GB/s": moved / seconds / 1e9}
            if bound is not None:
                row["share of bound"] = max(flops / bound[0], moved / bound[1]) / seconds
        rows.append(row)
    return rows

"""Stage `grid` of bench/gpu.py: one layer against the bare frozen linear, over widths and numbers of tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import interleaved, peaks
from torch import Tensor, nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, available_backends

GRID = {
    "cuda": ([(768, 768), (1024, 1024), (4096, 4096), (4096, 14336)], [1, 16, 256, 4096, 16384]),
    "cpu": ([(32, 48)], [1, 20]),
}
OPTIONS = {"r": 100, "num_subspaces": 10, "subspace_rank": 3}


def contenders(D: int, N: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the layers that are compared, over the same weight; those of libraries that are absent are left out."""
    torch.manual_seed(0)
    linear = nn.Linear(D, N, device=device, dtype=dtype).requires_grad_(False)
    layers: dict[str, nn.Module] = {"linear": linear}
    options = OPTIONS if device.type == "cuda" else {"r": 8, "num_subspaces": 3, "subspace_rank": 2}
    for name, state in available_backends().items():
        if state == "available" and not (device.type == "cuda" and name == "native"):
            layer = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(**options, backend=name))
            nn.init.normal_(layer.C, std=0.02)
            layers[f"adamss {name}"] = layer
    try:
        from peft import AdamssConfig, LoraConfig, get_peft_model
    except ImportError:
        return layers
    for name, config in {
        "peft adamss": AdamssConfig(**options, target_modules=["proj"]),
        "peft lora r=8": LoraConfig(r=8, target_modules=["proj"]),
        "peft lora r=32": LoraConfig(r=32, target_modules=["proj"]),
    }.items():
        model = nn.Module()
        model.proj = nn.Linear(D, N, device=device, dtype=dtype)
        model.proj.load_state_dict(linear.state_dict())
        layers[name] = get_peft_model(model, config).base_model.model.proj
    layers["peft adamss compiled"] = torch.compile(layers["peft adamss"], dynamic=False)
    return layers


def run(device: torch.device, budget: float) -> dict[str, Any]:
    """Time forward without gradients, and forward and backward, eager and in a CUDA graph, until `budget` seconds."""
    deadline = time.monotonic() + budget
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    widths, tokens = GRID[device.type]
    bound = peaks(device)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    for D, N in widths:
        layers = contenders(D, N, device, dtype)
        trained = [p for layer in layers.values() for p in layer.parameters() if p.requires_grad]
        for M in tokens:
            if time.monotonic() > deadline:
                skipped.append(f"D={D} N={N} M={M}")
                continue
            x = torch.randn(M, D, device=device, dtype=dtype)
            dy = torch.randn(M, N, device=device, dtype=dtype)
            for backward in (False, True):
                # Serving: nothing of an adapter is trained, so what follows from B alone is computed once.
                for p in trained:
                    p.requires_grad_(backward)
                calls = {name: _call(layer, x, dy, backward) for name, layer in layers.items()}
                for graph in (False, True) if device.type == "cuda" else (False,):
                    times = interleaved(calls, device, rounds=20 if device.type == "cuda" else 2, graph=graph)
                    rows += _rows(times, (D, N, M), backward, graph, dtype, bound)
    return {"rows": rows, "skipped for time": skipped}


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

"""Every kernel-level operation by backend, one at a time: `python -m pytest bench --benchmark-only`.

A group holds the same work on the same operands, so its rows compare backends; the base product that every backend
hands to PyTorch is a row of its own.
"""

from __future__ import annotations

import pytest
import torch

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, SubspaceAllocator, SubspaceLayout, ops
from adamss_kernels.config import BACKENDS
from adamss_kernels.decompose import decompose
from adamss_kernels.importance import build_banks
from adamss_kernels.layout import gather_index
from adamss_kernels.subspaces import Subspaces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# M, D, N, R, ranks: a BERT-sized layer, and one so small that calls cost as much as kernels.
SIZES = {"768": (2048, 768, 768, 100, (3,) * 10), "small": (16, 64, 64, 16, (1,) * 4)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
able = [name for name in BACKENDS if ops.implementation(name).why_unavailable(DEVICE) is None]
# What the operator returns besides y: nothing for inference; S, or S and P, for training.
FORWARDS = {"nothing kept": (False, False), "S kept": (True, False), "S and P kept": (True, True)}
# dx, dweight, dbias, dB, dC.
BACKWARDS = {
    "dx": [True, False, False, False, False],
    "dB and dC": [False, False, False, True, True],
    "dx, dB and dC": [True, False, False, True, True],
}


def operands(size: str, dtype: torch.dtype) -> tuple:
    M, D, N, R, ranks = SIZES[size]
    g = torch.Generator().manual_seed(0)
    layout = SubspaceLayout((torch.arange(N, device=DEVICE) % len(ranks)).to(torch.int32), ranks)

    def randn(*shape: int, to: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, to)

    B, C = randn(layout.rho, R, to=torch.float32), randn(N, layout.r_max, to=torch.float32)
    masks = (torch.ones(len(ranks), dtype=torch.bool, device=DEVICE),) * 2
    subspaces = Subspaces(randn(R, D), randn(R), layout.row_subspace, layout.offsets, *masks)
    return randn(M, D), randn(N, D), randn(N), B, C, subspaces


def run(benchmark, group: str, call, *arguments) -> None:
    benchmark.group = group

    def synchronised() -> None:
        call(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(synchronised)


@pytest.mark.parametrize("backend", ["base product alone", *able])
@pytest.mark.parametrize("kept", FORWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear_forward(benchmark, size, dtype, kept, backend):
    x, weight, bias, B, C, subspaces = operands(size, DTYPES[dtype])
    group = f"forward, {size}, {dtype}, {kept}"
    if backend == "base product alone":
        run(benchmark, group, torch.addmm, bias, x, weight.T)
        return
    run(benchmark, group, ops.OPERATORS[backend].forward, x, weight, bias, B, C, *subspaces[:5], *FORWARDS[kept])


@pytest.mark.parametrize("backend", ["base product alone", *able])
@pytest.mark.parametrize("kept", ["x", "P"])
@pytest.mark.parametrize("wanted", BACKWARDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_linear_backward(benchmark, size, dtype, wanted, kept, backend):
    x, weight, bias, B, C, subspaces = operands(size, DTYPES[dtype])
    dy = torch.randn_like(x @ weight.T)
    group = f"backward, {size}, {dtype}, {wanted} from {kept}"
    if backend == "base product alone":
        run(benchmark, group, torch.mm, dy, weight)
        return
    forward, backward = ops.OPERATORS[backend]
    _, S, P = forward(x, weight, bias, B, C, *subspaces[:5], True, kept == "P")
    saved = (x, S, None) if kept == "x" else (None, S, P)
    run(benchmark, group, backward, dy, *saved, weight, B, C, *subspaces[:6], BACKWARDS[wanted])


@pytest.mark.parametrize("operation", ["measure", "accumulate"])
def test_importance(benchmark, operation):
    layer = FusedAdaMSSLinear.from_linear(torch.nn.Linear(768, 768).to(DEVICE), AdaMSSConfig(num_subspaces=10))
    for p in (layer.B, layer.C):
        p.grad = torch.randn_like(p)
    (bank,) = build_banks({"layer": layer}, (0.85, 0.85))
    bank.measure()
    call = bank.measure if operation == "measure" else lambda: bank.accumulate(None)
    run(benchmark, f"ASA {operation}, one layer", call)


def test_asa_update(benchmark):
    layer = FusedAdaMSSLinear.from_linear(torch.nn.Linear(768, 768).to(DEVICE), AdaMSSConfig(num_subspaces=10))
    config = AdaMSSConfig(use_asa=True, init_warmup=1, final_warmup=10**9, mask_interval=10**8)
    for p in (layer.B, layer.C):
        p.grad = torch.randn_like(p)
    allocator = SubspaceAllocator(torch.nn.Sequential(layer), config)
    run(benchmark, "ASA update, one layer", allocator.update_and_allocate, 2)


@pytest.mark.parametrize("operation", ["delta_weight", "merge and unmerge", "to_linear"])
def test_folding(benchmark, operation):
    layer = FusedAdaMSSLinear.from_linear(torch.nn.Linear(768, 768).to(DEVICE), AdaMSSConfig(num_subspaces=10))
    calls = {
        "delta_weight": layer.delta_weight,
        "merge and unmerge": lambda: (layer.merge(keep_original_on=DEVICE), layer.unmerge()),
        "to_linear": layer.to_linear,
    }
    run(benchmark, "folding the update in, 768 x 768", calls[operation])


@pytest.mark.parametrize("operation", ["decompose", "svd_lowrank alone"])
def test_initialisation(benchmark, operation):
    weight, bias = torch.randn(768, 768, device=DEVICE), torch.randn(768, device=DEVICE)
    config = AdaMSSConfig(num_subspaces=10)
    calls = {
        "decompose": lambda: decompose(weight, bias, config),
        "svd_lowrank alone": lambda: torch.svd_lowrank(torch.cat((weight, bias[:, None]), 1), q=100, niter=2),
    }
    run(benchmark, "initialisation, 768 x 768", calls[operation])


@pytest.mark.parametrize("operation", ["pack", "unpack", "gather_index"])
def test_layout(benchmark, operation):
    layout = SubspaceLayout((torch.arange(768, device=DEVICE) % 10).to(torch.int32), (3,) * 10)
    B, C = torch.randn(layout.rho, 100, device=DEVICE), torch.randn(768, 3, device=DEVICE)
    ragged = layout.unpack(B, C)
    calls = {
        "pack": lambda: layout.pack(*ragged),
        "unpack": lambda: layout.unpack(B, C),
        "gather_index": lambda: gather_index(layout.row_subspace, layout.offsets, layout.r_max),
    }
    run(benchmark, "layout, 768 rows", calls[operation])

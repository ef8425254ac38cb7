"""Sweep the Triton kernels' configurations and forms on this GPU, and write the fastest where later runs read them."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .. import triton as backend
from ..layout import SubspaceLayout
from ..subspaces import Subspaces
from ..triton import tuning
from .bench.measure import Contender, captured, gpu_timer

# Kernel to the operator that runs it, in the fused form.
_RUNS = {"low_rank_gemm": "forward", "token_products": "backward"}
# Shape class to (M, D, N) of the member that stands for it, on a GPU and in a dry run on the CPU.
_SHAPES = {
    "cuda": {"few": (8, 4096, 4096), "small": (256, 1024, 1024), "large": (8192, 4096, 4096)},
    "cpu": {"few": (3, 64, 64), "small": (20, 64, 64)},
}
_R, _RANKS = 100, (3,) * 10

Case = tuple[str, tuple[int, int, int], torch.dtype, torch.device]
"""Shape class, (M, D, N), dtype and device of one sweep."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `tune`."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: dry run in the interpreter")
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"])
    parser.add_argument("--shape", nargs="+", choices=tuple(_SHAPES["cuda"]), help="shape classes; default all")
    parser.add_argument("--seconds", type=float, default=300, help="stop starting new measurements after this long")
    parser.add_argument("--jobs", type=int, help="processes that compile ahead; default one per CPU, in a dry run none")
    parser.add_argument("--out", type=Path, help=f"file to write; default {tuning.user_file()}")


def run(args: argparse.Namespace) -> int:
    """Sweep and write; the status is 1 where the backend cannot run at all."""
    out = args.out or tuning.user_file()
    end = time.monotonic() + args.seconds
    jobs = args.jobs if args.jobs is not None else (os.cpu_count() or 1) if args.device == "cuda" else 0
    cases = []
    for dtype in (getattr(torch, name) for name in args.dtype):
        reason = backend.why_unavailable(args.device, dtype)
        if reason is not None:
            print(f"triton cannot run {dtype} on {args.device}: {reason}")
            return 1
        chosen = [item for item in _SHAPES[args.device].items() if args.shape is None or item[0] in args.shape]
        cases += [(shape, size, dtype, torch.device(args.device)) for shape, size in chosen]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max(jobs, 1), mp_context=spawn) as pool:
        # Their imports are not to cost the first case its share.
        with contextlib.suppress(BrokenProcessPool):
            list(pool.map(tuning.arch_of, [torch.device(args.device)] * jobs))
        for index, case in enumerate(cases):
            # Each case gets the same share of what is left.
            start = time.monotonic()
            deadline = start + (end - start) / (len(cases) - index)
            configs, forms = _sweep(case, deadline, pool if jobs else None)
            tuning.save(out, configs, forms)
    print(f"wrote {out}")
    return 0


def candidates(kernel: str, dtype: torch.dtype, shape: str, device_type: str) -> Iterator[tuning.Config]:
    """Yield the configurations worth trying for a kernel, besides the one that runs without tuning."""
    if device_type == "cpu":
        yield tuning.Config(16, 16, 16, num_stages=2)
        return
    rows: tuple[int, ...] = (64, 128)
    cols: tuple[int, ...] = (64, 128)
    depths: tuple[int, ...] = (32, 64)
    if kernel == "token_products":
        rows, depths = (32, 64), (64,)
    elif shape == "few":
        rows, cols, depths = (16,), (16, 32, 64), (64, 128, 256)
    elif dtype != torch.float32:
        cols = (64, 128, 256)
    for r, c, d, warps, stages in itertools.product(rows, cols, depths, (4, 8), (2, 3, 4, 5)):
        if warps == 8 or r * c <= 128 * 128:
            yield tuning.Config(r, c, d, num_warps=warps, num_stages=stages)


def _sweep(
    case: Case, deadline: float, pool: concurrent.futures.Executor | None
) -> tuple[dict[tuning.Key, tuning.Config], dict[tuning.Key, str]]:
    """Return the fastest configuration of each kernel, and with those the fastest form of each operator."""
    shape, size, dtype, device = case
    arch = tuning.arch_of(device)
    tried = {kernel: _shuffled(kernel, dtype, shape, device.type) for kernel in _RUNS}
    if pool is not None:
        tried = _compile_ahead(case, tried, time.monotonic() + 0.6 * (deadline - time.monotonic()), pool)
    operators = {name: _gated(name, args) for name, args in _arguments(size, dtype, device).items()}
    configs: dict[tuning.Key, tuning.Config] = {}
    forms: dict[tuning.Key, str] = {}
    for index, (kernel, operator) in enumerate(_RUNS.items()):
        key = tuning.key(kernel, dtype, arch, shape)
        tuning.use({}, {tuning.key(operator, dtype, arch, shape): "fused"})
        start = time.monotonic()
        share = start + (deadline - start) / (len(_RUNS) - index)
        times: dict[tuning.Config, float] = {}
        for config in (tuning.config(kernel, dtype, arch, shape), *tried[kernel]):
            if times and time.monotonic() > share:
                break
            tuning.use({key: config}, {})
            seconds = _measure(*operators[operator])
            if seconds is not None:
                times[config] = seconds
        if times:
            configs[key] = min(times, key=times.__getitem__)
            tuning.use({key: configs[key]}, {})
            print(
                f"{'/'.join(key)}: {times[configs[key]] * 1e6:.1f} us of {len(times)} measured, {configs[key]}",
                flush=True,
            )
    for operator in tuning.DIRECTIONS:
        key = tuning.key(operator, dtype, arch, shape)
        seconds_of: dict[str, float] = {}
        for form in tuning.FORMS:
            tuning.use({}, {key: form})
            seconds = _measure(*operators[operator])
            if seconds is not None:
                seconds_of[form] = seconds
        if seconds_of:
            forms[key] = min(seconds_of, key=seconds_of.__getitem__)
            tuning.use({}, {key: forms[key]})
            print(
                f"{'/'.join(key)}: {forms[key]} of " + ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in seconds_of.items())
            )
    return configs, forms


def _shuffled(kernel: str, dtype: torch.dtype, shape: str, device_type: str) -> list[tuning.Config]:
    """Return the candidates in an order of which every beginning is a fair sample."""
    found = list(candidates(kernel, dtype, shape, device_type))
    random.Random(0).shuffle(found)
    return found


def _compile_ahead(
    case: Case, tried: dict[str, list[tuning.Config]], deadline: float, pool: concurrent.futures.Executor
) -> dict[str, list[tuning.Config]]:
    """Run candidates in other processes, of all kernels in turn, which leaves them in Triton's cache.

    They end before this returns, so that nothing else runs on the GPU while this process measures.

    Returns:
        The candidates of each kernel less those that failed, first those that ran.
    """
    turns = itertools.zip_longest(*([(kernel, config) for config in configs] for kernel, configs in tried.items()))
    order = [job for turn in turns for job in turn if job is not None]
    ran: dict[str, list[tuning.Config]] = {kernel: [] for kernel in tried}
    waiting: dict[str, list[tuning.Config]] = {kernel: [] for kernel in tried}
    try:
        futures = {pool.submit(_compile, case, *job): job for job in order}
        concurrent.futures.wait(futures, timeout=max(0, deadline - time.monotonic()))
        for future, (kernel, config) in futures.items():
            if future.cancel():
                waiting[kernel].append(config)
            elif future.result(timeout=60):
                ran[kernel].append(config)
    except (BrokenProcessPool, concurrent.futures.TimeoutError) as error:
        print(f"  compiling in one process: {type(error).__name__}: {error}")
        return tried
    return {kernel: ran[kernel] + waiting[kernel] for kernel in tried}


def _compile(case: Case, kernel: str, config: tuning.Config) -> bool:
    """Call the kernel once; say whether that worked."""
    shape, size, dtype, device = case
    operator, arch = _RUNS[kernel], tuning.arch_of(device)
    tuning.use({tuning.key(kernel, dtype, arch, shape): config}, {tuning.key(operator, dtype, arch, shape): "fused"})
    try:
        getattr(backend, operator)(*_arguments(size, dtype, device)[operator])
        if device.type == "cuda":
            torch.cuda.synchronize()
    except Exception:  # out of registers, of shared memory, or a compiler that gives up
        return False
    return True


@functools.lru_cache(maxsize=1)
def _arguments(size: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> dict[str, tuple[Any, ...]]:
    """Return the arguments of forward and backward: random operands."""
    M, D, N = size
    if dtype == torch.float32:
        # In full precision it is torch's to multiply, and there is nothing to tune.
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    g = torch.Generator(device).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, device=device).to(dtype)

    K = len(_RANKS)
    layout = SubspaceLayout((torch.arange(N, device=device) % K).to(torch.int32), _RANKS)
    x, weight, bias, basis, a = randn(M, D), randn(N, D) / D**0.5, randn(N), randn(_R, D) / D**0.5, randn(_R)
    B, C = randn(layout.rho, _R, dtype=torch.float32) / _R**0.5, randn(N, layout.r_max, dtype=torch.float32)
    # Tokens one by one are inference, where nothing is kept; otherwise what `save_for_backward="auto"` keeps.
    keep_S, keep_P = M > 16, 16 * _R <= N and M > 16
    ones = torch.ones(K, dtype=torch.bool, device=device)
    subspaces = Subspaces(basis, a, layout.row_subspace, layout.offsets, ones, ones)
    operands = (x, weight, bias, B, C, subspaces)
    forward = (*operands, keep_S, keep_P)
    _, S, P = reference.forward(*operands, True, keep_P)
    kept = (None, S, P) if keep_P else (x, S, None)
    backward = (randn(M, N), *kept, weight, B, C, subspaces, [True, False, False, True, True])
    return {"forward": forward, "backward": backward}


def _gated(name: str, args: tuple[Any, ...]) -> tuple[Callable[[], tuple[Tensor, ...]], list[Tensor], list[float]]:
    """Return a call of the operator, its results in float64, and twice the reference's errors plus one rounding."""
    exact = list(getattr(reference, name)(*map(_doubled, args)))
    plain = getattr(reference, name)(*args)
    unit = torch.finfo(args[0].dtype).eps / 2
    allowed = [2 * _error(got, want) + unit for got, want in zip(plain, exact, strict=True)]
    return lambda: getattr(backend, name)(*args), exact, allowed


def _doubled(value: Any) -> Any:
    """Return `value` with every floating-point tensor in it as float64."""
    if isinstance(value, Subspaces):
        return Subspaces(*map(_doubled, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got - exact).norm() / exact.norm()) if exact.numel() else 0.0


def _measure(call: Callable[[], tuple[Tensor, ...]], exact: list[Tensor], allowed: list[float]) -> float | None:
    """Return the seconds of one call, or None where it does not compile, does not fit, or is wrong."""
    try:
        results = call()
        if any(not _error(got, want) <= limit for got, want, limit in zip(results, exact, allowed, strict=True)):
            return None
        return _graph_seconds(call, results[0].device) if results[0].is_cuda else _wall_seconds(call)
    except Exception as error:  # out of registers, of shared memory, or a compiler that gives up
        print(f"  skipped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        return None


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _graph_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median GPU time of a call in a CUDA graph, where launches cost no Python, W not being in the L2."""
    return gpu_timer(device)(Contender(captured(call)), 15)

"""Show versions, devices and backends, and test each available backend numerically."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

from .. import __version__, available_backends
from ..compiled import cpu_library, cuda_library
from ..functional import adamss_linear
from ..layout import SubspaceLayout

_LIBRARIES = ("torch", "triton", "numpy", "scikit-learn", "safetensors", "peft", "transformers", "accelerate")
# Those whose quantised layers can be adapted.
_LIBRARIES_OF_BASES = ("bitsandbytes", "torchao")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `info`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the report; the status is 1 when an available backend fails its self-test."""
    report = collect()
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print(_as_text(report))
    return int(any("FAILED" in state for state in report["backends"].values()))


def collect() -> dict[str, Any]:
    """Return the report as JSON-serialisable values."""
    backends = {}
    for name, state in available_backends().items():
        backends[name] = self_test(name) if state == "available" else f"unavailable: {state}"
    return {
        "adamss_kernels": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: installed_version(name) for name in (*_LIBRARIES, *_LIBRARIES_OF_BASES)},
        "cpu": {"threads": torch.get_num_threads(), "torch_isa": torch.backends.cpu.get_cpu_capability()},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_library": cpu_library.describe(),
        "cuda": cuda_library.describe(),
        "backends": backends,
    }


def self_test(backend: str) -> str:
    """Compare a small float32 problem with float64 and return "available (self-test: error ...)" or a failure."""
    device = "cuda" if backend in ("triton", "cuda") else "cpu"
    generator = torch.Generator().manual_seed(0)
    M, D, N, R, ranks = 37, 48, 40, 12, (2, 1, 3)
    shapes = ((M, D), (N, D), (N,), (R, D), (R,), (sum(ranks), R), (N, max(ranks)))
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    layout = SubspaceLayout((torch.arange(N) % 3).to(torch.int32), ranks)
    rounded = [t.float() for t in exact]
    exact = [t.double() for t in rounded]

    def output_and_gradients(operands: list[Any], layout: SubspaceLayout, backend: str) -> list[torch.Tensor]:
        x, weight, bias, basis, basis_bias, B, C = operands
        leaves = [t.requires_grad_() for t in (x, B, C)]
        y = adamss_linear(x, weight, bias, basis, basis_bias, B, C, layout, backend=backend)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    try:
        on_device = SubspaceLayout(layout.row_subspace.to(device), ranks)
        got = output_and_gradients([t.to(device) for t in rounded], on_device, backend)
        expected = output_and_gradients(exact, layout, "reference")
    except Exception as error:
        return f"FAILED its self-test: {type(error).__name__}: {error}"
    errors = [((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]
    if not max(errors) < 1e-5:
        return f"FAILED its self-test: relative errors of y, dx, dB, dC: {errors}"
    return f"available (self-test: largest relative error {max(errors):.1e})"


def installed_version(distribution: str) -> str:
    """Return the version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _as_text(report: dict[str, Any]) -> str:
    lines = [f"adamss_kernels {report['adamss_kernels']}, Python {report['python']}, {report['platform']}"]
    lines += ["", "libraries"]
    lines += [f"  {name:<14}{version}" for name, version in report["libraries"].items()]
    lines += ["", "devices"]
    lines += [f"  {'cpu':<14}{report['cpu']['threads']} threads, torch uses {report['cpu']['torch_isa']}"]
    lines += [f"  {f'cuda:{i}':<14}{name}" for i, name in enumerate(report["gpus"])]
    lines += ["", "CPU library"]
    lines += [f"  {key:<14}{value}" for key, value in report["cpu_library"].items()]
    lines += ["", "CUDA library"]
    lines += [f"  {key:<14}{value}" for key, value in report["cuda"].items()]
    lines += ["", "backends"]
    lines += [f"  {name:<14}{state}" for name, state in report["backends"].items()]
    return "\n".join(lines)

"""Interleaved timing, and results as JSON that name their hardware, versions and command."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adamss_kernels import native
from adamss_kernels.native import cuda_library


def interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float, warmup: int = 3
) -> dict[str, list[float]]:
    """Call all functions in turn for `seconds` (at least 5 rounds) and return the seconds of each call.

    In turn, so that a machine that slows down slows all of them: compare them round by round.
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: dict[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return median and quartiles in seconds, and the median over rounds of the ratio to `base`."""
    result = {}
    for name, samples in times.items():
        low, median, high = statistics.quantiles(samples, n=4)
        ratio = statistics.median(t / b for t, b in zip(samples, times[base], strict=True))
        result[name] = {"median_s": median, "quartiles_s": [low, high], "ratio": ratio, "rounds": len(samples)}
    return result


def environment(device: torch.device | None = None) -> dict[str, Any]:
    """Return what a number depends on besides the code: hardware, versions, threads, commit, command."""
    record: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "native": native.describe(),
        "versions": {name: _version(name) for name in ("torch", "triton", "peft", "transformers", "numpy")}
        | {"python": platform.python_version()},
        "commit": _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device is not None and device.type == "cuda":
        record |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda_library": cuda_library.describe(),
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _said("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader"),
        }
    return record


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Declare --out."""
    parser.add_argument("--out", type=Path, help="write the results as JSON to this file")


def write(path: Path | None, rows: list[dict[str, Any]]) -> None:
    """Write environment and rows to `path`; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

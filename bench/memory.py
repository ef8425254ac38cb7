"""Measure the peak resident memory of one training forward, each provider in a process of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from layer import providers
from measure import add_output_argument, write
from torch import nn

PROVIDERS = ("linear", "native", "peft-adamss", "peft-lora")


def peak_bytes(provider: str, D: int, N: int, M: int, K: int, r: int) -> int:
    """Return by how much one training forward raises this process' peak resident memory (Linux)."""
    torch.manual_seed(0)
    linear = nn.Linear(D, N).requires_grad_(False)
    layer = providers(linear, K, r, [provider])[provider]
    x = torch.randn(M, D, requires_grad=True)
    layer(x[:1])
    status = Path("/proc/self/status")
    before = _kib(status, "VmRSS")
    # Resets the high-water mark (proc(5)).
    Path("/proc/self/clear_refs").write_text("5")
    layer(x)
    return (_kib(status, "VmHWM") - before) * 1024


def _kib(status: Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("D", 4096), ("N", 4096), ("M", 512), ("K", 10), ("r", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--provider", choices=PROVIDERS, help="measure this one here and print its bytes")
    add_output_argument(parser)
    args = parser.parse_args()
    shape = (args.D, args.N, args.M, args.K, args.r)
    if args.provider:
        print(peak_bytes(args.provider, *shape))
        return
    flags = [f"--{name}={value}" for name, value in zip("DNMKr", shape, strict=True)]
    row = dict(zip("DNMKr", shape, strict=True)) | {"y_bytes": args.M * args.N * 4, "peak_bytes": {}}
    for provider in PROVIDERS:
        command = [sys.executable, __file__, *flags, "--provider", provider]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        row["peak_bytes"][provider] = json.loads(result.stdout)
        ratio = row["peak_bytes"][provider] / row["y_bytes"]
        print(f"{provider:<16}{row['peak_bytes'][provider] / 2**20:>9.1f} MiB{ratio:>8.2f} x y")
    write(args.out, [row])


if __name__ == "__main__":
    main()

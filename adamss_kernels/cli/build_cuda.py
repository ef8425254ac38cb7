"""Compile the CUDA backend with nvcc into the user's cache, for an install that had no nvcc, or for other GPUs."""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
from pathlib import Path

import torch

from ..compiled import cuda_compile, cuda_library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `build-cuda`."""
    parser.add_argument(
        "--arch", nargs="+", help="compute capabilities, as in 90; default: those of this machine's GPUs, else a list"
    )
    parser.add_argument("--force", action="store_true", help="compile also where the same build is already there")
    parser.add_argument("--dry-run", action="store_true", help="print nvcc's command and run nothing")


def run(args: argparse.Namespace) -> int:
    """Build; the status is 1 where that cannot be done."""
    nvcc = cuda_compile.find_nvcc()
    if nvcc is None:
        print("no nvcc: not $CUDACXX, not on the path, not in $CUDA_HOME/bin, not in /usr/local/cuda/bin")
        return 1
    try:
        architectures = cuda_compile.supported(nvcc, args.arch or _present())
        name = f"nvcc-{cuda_compile.nvcc_version(nvcc)}-sm_{'_'.join(architectures)}"
        target = cuda_library.cache_folder() / name / cuda_compile.NAME
        if args.dry_run:
            print(shlex.join(cuda_compile.command(nvcc, architectures, target)))
            return 0
        build(nvcc, architectures, target, args.force)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"build-cuda: {error}")
        return 1
    print(f"{target}: for {cuda_library.architectures(target)}")
    return 0


def build(nvcc: str, architectures: tuple[str, ...], target: Path, force: bool = False) -> None:
    """Compile into `target` unless it is there: one process at a time, and never half a file.

    Raises:
        RuntimeError: nvcc failed.
    """
    import fcntl

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists() and not force:
            os.utime(target)  # the newest is the one that is loaded
            return
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            built = Path(scratch, target.name)
            cuda_compile.compile_library(nvcc, architectures, built)
            os.replace(built, target)


def _present() -> list[str]:
    """Return the compute capabilities of the GPUs of this machine."""
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"{major}{minor}" for major, minor in sorted(capabilities)]

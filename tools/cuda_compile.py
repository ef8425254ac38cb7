"""Compile every CUDA kernel for GPUs that are not here, and tabulate registers, spills and shared memory.

Usage: python tools/cuda_compile.py [--arch 80 ...] [--out docs/cuda-registers.md]

Exit status 1 if a kernel spills, or keeps anything in local memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from adamss_kernels.compiled import cuda_compile

# Kernels of csrc/cuda/hopper.cu: empty but on sm_90, where they are compiled for sm_90a.
HOPPER = ("dB_kernel", "finish_kernel", "low_rank_gemm_kernel", "prepare_kernel", "token_products_kernel")


@dataclasses.dataclass(frozen=True, order=True)
class Compiled:
    """What ptxas says about one kernel for one architecture, in bytes but for the registers."""

    arch: str
    kernel: str
    registers: int
    stack: int
    spilled: int
    shared: int


def compile_kernels(nvcc: str, architectures: Sequence[str]) -> list[Compiled]:
    """Compile as an install does, and return what ptxas says of each kernel."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch, cuda_compile.NAME)
        command = cuda_compile.command(nvcc, architectures, out, "-Xptxas=-v")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if "instructions are serialized" in done.stderr:
        raise RuntimeError(f"wgmma runs one instruction after the other: {done.stderr}")
    filt = shutil.which("c++filt") or "cu++filt"
    said = subprocess.run([filt], input=done.stderr, capture_output=True, text=True, check=True).stdout
    pattern = (
        r"Compiling entry function '(?:void )?adamss::(.+?)\(.*' for 'sm_(\w+)'\n.*\n"
        r"\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers(.*)"
    )
    rows = (
        Compiled(
            arch.removesuffix("a"),
            kernel.replace("__nv_", ""),
            int(registers),
            int(stack),
            int(stores) + int(loads),
            _shared(rest),
        )
        for kernel, arch, stack, stores, loads, registers, rest in re.findall(pattern, said)
    )
    return sorted(row for row in rows if row.arch == "90" or not row.kernel.startswith(HOPPER))


def _shared(text: str) -> int:
    found = re.search(r"(\d+) bytes smem", text)
    return int(found[1]) if found else 0


def table(rows: list[Compiled], version: str) -> str:
    """Return the results as Markdown."""
    lines = [
        "# Registers and shared memory of the CUDA kernels",
        "",
        f"Written by `python tools/cuda_compile.py` with nvcc {version}, without a GPU: what ptxas says. A stack frame",
        "or a spill is an error. Shared memory is what a kernel declares; `delta_fwd_kernel<_, true>` and",
        "`delta_bwd_kernel` take more at launch, as `csrc/cuda/geometry.h` computes. None of this measures speed.",
    ]
    head = ["| kernel | registers | stack | spilled | shared |", "|---|---:|---:|---:|---:|"]
    for arch in sorted({row.arch for row in rows}, key=lambda arch: int(re.sub(r"\D", "", arch))):
        lines += ["", f"## sm_{arch}", "", *head]
        lines += [
            f"| `{row.kernel}` | {row.registers} | {row.stack} | {row.spilled} | {row.shared} |"
            for row in rows
            if row.arch == arch
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Compile, and write or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", help="default: those that an install compiles for")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    nvcc = cuda_compile.find_nvcc()
    if nvcc is None:
        print("no nvcc", file=sys.stderr)
        return 2
    rows = compile_kernels(nvcc, cuda_compile.supported(nvcc, options.arch))
    wrong = [row for row in rows if row.stack or row.spilled]
    for row in wrong:
        print(f"sm_{row.arch} {row.kernel}: {row.stack} bytes of stack, {row.spilled} bytes spilled", file=sys.stderr)
    text = table(rows, cuda_compile.nvcc_version(nvcc))
    if options.out:
        options.out.write_text(text)
    else:
        print(text)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

"""nvcc compiles every CUDA kernel for every listed architecture, without spills, local memory or atomics."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamss_kernels.compiled import cuda_compile, cuda_library

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NVCC = cuda_compile.find_nvcc()
if NVCC is None:
    pytest.skip("no nvcc", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("cuda_compile_bench", ROOT / "tools" / "cuda_compile.py")
bench = importlib.util.module_from_spec(_spec)
sys.modules["cuda_compile_bench"] = bench
_spec.loader.exec_module(bench)

KERNELS = {
    "delta_fwd_kernel": 8,  # four dtypes, with and without shared memory
    "delta_bwd_kernel": 4,
    "input_projection_kernel": 6,  # four dtypes, and a float32 basis under bfloat16 and float16
    "sum_dS_kernel": 4,
    "sum_dC_kernel": 2,
    "mask_rows_kernel": 2,
}
# On sm_90a alone, for two dtypes, and S padded to 32 and 64 columns.
HOPPER_KERNELS = {
    "low_rank_gemm_kernel": 12,  # forward and dx; tiles of 192 columns, and of 256 where S has 32
    "prepare_kernel": 8,  # a basis in the dtype of x or in float32
    "token_products_kernel": 4,
    "finish_kernel": 1,
    "dB_kernel": 3,
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What ptxas says of each kernel; compiled as an install does, for what this nvcc knows of the listed ones."""
    return bench.compile_kernels(NVCC, cuda_compile.supported(NVCC, None))


@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_every_listed_architecture_without_spills_or_local_memory(rows):
    for arch in cuda_compile.supported(NVCC, None):
        compiled = [row for row in rows if row.arch == arch]
        expected = KERNELS | (HOPPER_KERNELS if arch == "90" else {})
        counts = {name: sum(row.kernel.split("<")[0] == name for row in compiled) for name in expected}
        assert counts == expected
        assert len(compiled) == sum(expected.values())
        for row in compiled:
            assert (row.stack, row.spilled) == (0, 0), row
            assert row.shared <= 48 * 1024, row
            # 65536 registers hold at least one block of 256 threads.
            assert row.registers <= 255, row


def test_the_kept_table_lists_every_kernel_and_architecture(rows):
    kept = (ROOT / "docs" / "cuda-registers.md").read_text()
    for arch in cuda_compile.ARCHITECTURES:
        assert f"## sm_{arch}\n" in kept
    for kernel in {row.kernel for row in rows}:
        times = 1 if kernel.split("<")[0] in HOPPER_KERNELS else len(cuda_compile.ARCHITECTURES)
        assert kept.count(f"| `{kernel}` |") == times, f"{kernel}: run tools/cuda_compile.py"


def test_the_update_moves_sixteen_bytes_at_a_time_and_nothing_is_atomic(tmp_path):
    out = tmp_path / "kernels.ptx"
    command = [NVCC, "-O3", "-std=c++17", "-arch=compute_90", "-ptx", str(cuda_compile.csrc() / "cuda" / "launch.cu")]
    subprocess.run([*command, "-o", str(out)], check=True, capture_output=True)
    ptx = out.read_text()
    assert not re.search(r"\batom\b|\batom\.|\bred\.", ptx)
    assert ".local" not in ptx
    entries = re.split(r"\.entry ", ptx)[1:]
    updates = [entry for entry in entries if "delta_fwd_kernel" in entry.splitlines()[0]]
    assert len(updates) == KERNELS["delta_fwd_kernel"]
    wide = r"\.(v4\.[usfb]32|v2\.[usfb]64|b128)"
    for entry in updates:
        assert re.search(rf"ld\.global\S*{wide}", entry) and re.search(rf"st\.global\S*{wide}", entry)
    for entry in entries:
        if "delta_bwd_kernel" in entry.splitlines()[0]:
            assert re.search(rf"ld\.global\S*{wide}", entry)


def test_a_library_of_one_architecture_loads_and_says_what_it_is_for(tmp_path, twin_file):
    path = tmp_path / cuda_compile.NAME
    cuda_compile.compile_library(NVCC, ("80",), path)
    assert cuda_library.architectures(path) == "80+PTX"
    # The twin lends what a torch without CUDA lacks. Without a GPU or a driver the first launch fails, and says where.
    ctypes.CDLL(str(twin_file))
    library = cuda_library.open_library(path, "adamss_sm_80", "CPU", twin_file)
    assert library.architectures == "80+PTX"
    rows, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"mask_rows failed on cuda:-1: \w+"):
        library.mask_rows(torch.zeros(1, 1), rows, offsets, None, None)
    # CUDA's runtime is inside.
    needed = subprocess.run(["ldd", str(path)], capture_output=True, text=True, check=False).stdout
    assert "libcudart" not in needed

"""Forward and backward on GPUs of compute capability 9.0 (csrc/cuda/hopper.cu): one kernel for base and update.

Forward is y = x W^T + S C^T with S = x Q^T + q, backward dx = dy W + dS Q with dS = dy C: the same kernel, which takes
the inner product from the tiles that it reads for the base product. A bias rides along as one more column of S.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiled.cuda_library import load

DTYPES = (torch.bfloat16, torch.float16)

# Fewer tokens leave most of a tile of 128 rows empty.
_MIN_TOKENS = 65
_MAX_RHO = 64


def takes(t: Tensor, weight: Tensor, rho: int, bias: Tensor | None = None) -> bool:
    """Return whether the kernel can read `t` (x or dy) and `weight`, and holds `rho` columns of S, and the bias."""
    return (
        t.dtype in DTYPES
        and t.shape[0] >= _MIN_TOKENS
        and _is_hopper(t.device)
        and rho + (bias is not None) <= _MAX_RHO
        and is_aligned(t)
        and is_aligned(weight)
        # Rows of y and dx are dense.
        and weight.shape[0] % 8 == 0
        and weight.shape[1] % 8 == 0
    )


def is_here() -> bool:
    """Return whether the current GPU runs these kernels."""
    try:
        return _is_hopper(torch.device("cuda", torch.cuda.current_device()))
    except (RuntimeError, AssertionError, OSError):  # a torch without CUDA asserts
        return False


def is_aligned(t: Tensor) -> bool:
    """Return whether rows are dense and start at multiples of 16 bytes, as bulk copies need them."""
    rows, columns = t.stride()
    return columns == 1 and rows % 8 == 0 and rows >= t.shape[1] and t.data_ptr() % 16 == 0


def input_product(x: Tensor, basis: Tensor, basis_bias: Tensor | None) -> Tensor:
    """Return P = x A^T + a (M, R), through rows of whole 16 bytes: cuBLAS writes others at half the speed."""
    R = basis.shape[0]
    basis, basis_bias = basis.to(x.dtype), None if basis_bias is None else basis_bias.to(x.dtype)
    padding = -R % 8
    if padding:
        basis = F.pad(basis, (0, 0, 0, padding))
        basis_bias = None if basis_bias is None else F.pad(basis_bias, (0, padding))
    return F.linear(x, basis, basis_bias)[:, :R].contiguous()


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Return whether the GPU is one, and the library has code for it: PTX for older ones lacks its instructions."""
    compiled_for = [name.removesuffix("+PTX") for name in load().architectures.split()]
    return torch.cuda.get_device_capability(device) == (9, 0) and "90" in compiled_for

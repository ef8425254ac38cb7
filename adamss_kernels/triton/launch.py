"""Launchers of the kernels in `kernels.py` and `kernels_backward.py`: allocate the output, choose a grid, launch.

A launcher has its kernel's name and arguments. It works on the current device and stream, allocates with torch, and
neither synchronises nor reads device memory. Arguments other than x, dy, W, A and a have to be contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from ..layout import column_mask
from . import kernels, kernels_backward, tuning
from .tuning import Config

# Not tuned: these kernels move little.
_INPUT_PROJECTION = Config(16, 64, 16, num_stages=2)
_SUM_DC = Config(32, 16)
_SUM_DB = Config(16, 32)
_SUM_PARTS = Config(16, 1024)


def launch(kernel: JITFunction, grid: tuple[int, ...], config: Config, *args: object, **constants: object) -> None:
    """Run `kernel` over `grid`: the only place where anything is launched."""
    # The fusion of multiply and add is spelled out, since its default depends on Triton's version.
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    kernel[grid](*args, **constants, **options)


def precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of products of `dtype`: tf32 only where torch's own products use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def block(size: int, limit: int) -> int:
    """Return the power of two that covers `size`, from 16 (a tensor core's tile) to `limit`."""
    return max(16, min(limit, 1 << max(size - 1, 0).bit_length()))


def input_projection(
    basis: Tensor | None,
    basis_bias: Tensor | None,
    B: Tensor,
    offsets: Tensor,
    active: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return Q = B A (RHO, D) in `dtype` and q = B a (RHO,) in float32, zero in the columns of pruned subspaces.

    Without a basis Q is B.
    """
    if basis is None:
        pruned = None if active is None else ~column_mask(active, offsets, B.shape[0])
        return (B if pruned is None else B.masked_fill(pruned[:, None], 0)).to(dtype), None
    (R, D), rho, K = basis.shape, B.shape[0], offsets.shape[0] - 1
    Q = torch.empty(rho, D, dtype=dtype, device=B.device)
    q = None if basis_bias is None else torch.empty(rho, dtype=torch.float32, device=B.device)
    config = _INPUT_PROJECTION
    launch(
        kernels._input_projection_kernel, (cdiv(D + 1, config.cols), cdiv(rho, config.rows)), config,
        B, basis, basis_bias, offsets, active, Q, q,
        K, D, R, rho, *basis.stride(), 0 if basis_bias is None else basis_bias.stride(0),
        BLOCK_RHO=config.rows, BLOCK_D=config.cols, BLOCK_R=config.depth, BLOCK_K=block(K, K * 2),
    )  # fmt: skip
    return Q, q


def project(
    x: Tensor, Q: Tensor, q: Tensor | None, basis: Tensor | None, basis_bias: Tensor | None, keep_P: bool, arch: str
) -> tuple[Tensor, Tensor | None]:
    """Return S = x Q^T + q (M, RHO) in float32 and, with `keep_P`, P = x A^T + a (M, R) in the dtype of x."""
    basis = Q if basis is None else basis  # not read: only P needs it
    (M, D), rho, R = x.shape, Q.shape[0], basis.shape[0] if keep_P else 0
    config = tuning.config("project", x.dtype, arch, tuning.shape_class(M, D, D))
    BLOCK_RHO, BLOCK_R = block(rho, 128), block(R, 128)
    tiles, blocks = cdiv(M, config.rows), max(cdiv(rho, BLOCK_RHO), cdiv(R, BLOCK_R))
    splits, split_size = _split(arch, config.split, tiles * blocks, D, config.depth)
    S = x.new_empty((M, rho) if splits == 1 else (splits, M, rho), dtype=torch.float32)
    P = None
    if keep_P:
        P = x.new_empty(M, R) if splits == 1 else x.new_empty((splits, M, R), dtype=torch.float32)
    launch(
        kernels._project_kernel, (tiles, blocks, splits), config,
        x, Q, q, basis, basis_bias, S, P,
        M, D, R, rho, split_size, *x.stride(), *basis.stride(), 0 if basis_bias is None else basis_bias.stride(0),
        BLOCK_M=config.rows, BLOCK_D=config.depth, BLOCK_R=BLOCK_R, BLOCK_RHO=BLOCK_RHO,
        EVEN_D=D % config.depth == 0, PRECISION=precision(x.dtype),
    )  # fmt: skip
    if splits == 1:
        return S, P
    return sum_parts(S, S.dtype), None if P is None else sum_parts(P, x.dtype)


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, Q: Tensor, q: Tensor | None, basis: Tensor | None,
    basis_bias: Tensor | None, C: Tensor, row_subspace: Tensor, offsets: Tensor, active: Tensor | None,
    keep_S: bool, keep_P: bool, config: Config, arch: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return y = x W^T + bias + S Ct (M, N), and S (M, RHO) and P (M, R) where they are kept, from one pass over x."""
    basis = Q if basis is None else basis  # not read: only P needs it
    (M, D), N, rho, R = x.shape, weight.shape[0], Q.shape[0], basis.shape[0]
    tiles = cdiv(M, config.rows) * cdiv(N, config.cols)
    # Only y is summed over splits: what is kept for backward comes from one program.
    splits, split_size = (1, D) if keep_S or keep_P else _split(arch, config.split, tiles, D, config.depth)
    y = x.new_empty(M, N) if splits == 1 else x.new_empty((splits, M, N), dtype=torch.float32)
    S = x.new_empty((M, rho), dtype=torch.float32) if keep_S else None
    P = x.new_empty(M, R) if keep_P else None
    launch(
        kernels._linear_fwd_kernel, (tiles, splits), config,
        x, weight, bias, Q, q, basis, basis_bias, C, row_subspace, offsets, active, y, S, P,
        M, N, D, R, rho, C.shape[1], split_size, *x.stride(), *weight.stride(), *basis.stride(),
        0 if basis_bias is None else basis_bias.stride(0),
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_D=config.depth,
        BLOCK_R=slice_width(R if keep_P else 1, N, config), BLOCK_RHO=block(rho, tuning.MAX_FUSED_RHO),
        GROUP_M=config.group, EVEN_D=D % config.depth == 0, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return (y if splits == 1 else sum_parts(y, x.dtype)), S, P


def slice_width(R: int, N: int, config: Config) -> int:
    """Return how many columns of P each column of output tiles has to write for all R to be written."""
    return block(cdiv(R, cdiv(N, config.cols)), R * 2)


def linear_from_s(
    x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, C: Tensor, row_subspace: Tensor, offsets: Tensor,
    active: Tensor | None, arch: str,
) -> Tensor:  # fmt: skip
    """Return y = S Ct + bias + x W^T (M, N)."""
    (M, D), N, rho = x.shape, weight.shape[0], S.shape[1]
    config = tuning.config("linear_from_s", x.dtype, arch, tuning.shape_class(M, D, N))
    y = x.new_empty(M, N)
    launch(
        kernels._linear_from_s_kernel, (cdiv(M, config.rows) * cdiv(N, config.cols),), config,
        x, weight, bias, S, C, row_subspace, offsets, active, y,
        M, N, D, rho, C.shape[1], *x.stride(), *weight.stride(),
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_D=config.depth, BLOCK_RHO=block(rho, 32),
        GROUP_M=config.group, EVEN_D=D % config.depth == 0, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return y


def delta_fwd(
    y: Tensor, S: Tensor, C: Tensor, row_subspace: Tensor, offsets: Tensor, active: Tensor | None, arch: str
) -> None:
    """Add S Ct to y (M, N) in place."""
    (M, N), rho = y.shape, S.shape[1]
    config = tuning.config("delta_fwd", y.dtype, arch, tuning.shape_class(M, N, N))
    launch(
        kernels._delta_fwd_kernel, (cdiv(M, config.rows), cdiv(N, config.cols)), config,
        y, S, C, row_subspace, offsets, active, M, N, rho, C.shape[1],
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_RHO=block(rho, 32), PRECISION=precision(y.dtype),
    )  # fmt: skip


def delta_bwd(
    dy: Tensor, S: Tensor | None, C: Tensor, row_subspace: Tensor, offsets: Tensor, active: Tensor | None,
    trainable: Tensor | None, rho: int, need_dS: bool, need_dC: bool, arch: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Return dS = dy C (M, RHO) in float32 and dC (N, r_max) in the dtype of C, from one pass over dy."""
    (M, N), r_max = dy.shape, C.shape[1]
    config = tuning.config("delta_bwd", dy.dtype, arch, tuning.shape_class(M, N, N))
    BLOCK_RHO = block(rho, 64)
    tiles, blocks = cdiv(M, config.rows), cdiv(rho, BLOCK_RHO)
    splits, width = _split(arch, config.split, tiles * blocks, N, config.cols)
    dS = dy.new_empty((splits, M, rho) if splits > 1 else (M, rho), dtype=torch.float32) if need_dS else None
    parts = dy.new_empty((tiles, N, r_max), dtype=torch.float32) if need_dC else None
    launch(
        kernels_backward._delta_bwd_kernel, (tiles, splits, blocks), config,
        dy, S, C, row_subspace, offsets, active, trainable, dS, parts,
        M, N, rho, r_max, width, *dy.stride(),
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_RHO=BLOCK_RHO, PRECISION=precision(dy.dtype),
    )  # fmt: skip
    if dS is not None and splits > 1:
        dS = sum_parts(dS, dS.dtype)
    return dS, None if parts is None else sum_dC(parts, row_subspace, offsets, active, trainable, C.dtype)


def sum_dC(
    parts: Tensor, row_subspace: Tensor, offsets: Tensor, active: Tensor | None, trainable: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the sum over t of parts (T, N, r_max) in `dtype`, zero in rows that do not learn and beyond their rank."""
    T, N, r_max = parts.shape
    dC = parts.new_empty(N, r_max, dtype=dtype)
    config = _SUM_DC
    launch(
        kernels_backward._sum_dC_kernel, (cdiv(N, config.rows),), config,
        parts, row_subspace, offsets, active, trainable, dC, T, N, r_max,
        BLOCK_N=config.rows, BLOCK_J=block(r_max, r_max * 2),
    )  # fmt: skip
    return dC


def linear_dx(dy: Tensor, weight: Tensor, dS: Tensor, Q: Tensor, arch: str) -> Tensor:
    """Return dx = [dS | dy] [Q; W] (M, D)."""
    (M, N), (rho, D) = dy.shape, Q.shape
    config = tuning.config("linear_dx", dy.dtype, arch, tuning.shape_class(M, N, D))
    dx = dy.new_empty(M, D)
    launch(
        kernels_backward._linear_dx_kernel, (cdiv(M, config.rows) * cdiv(D, config.cols),), config,
        dy, weight, dS, Q, dx, M, N, D, rho, *dy.stride(), *weight.stride(),
        BLOCK_M=config.rows, BLOCK_D=config.cols, BLOCK_N=config.depth, BLOCK_RHO=block(rho, 32),
        GROUP_M=config.group, EVEN_N=N % config.depth == 0, PRECISION=precision(dy.dtype),
    )  # fmt: skip
    return dx


def token_product(dS: Tensor, z: Tensor, ones: bool, arch: str) -> Tensor:
    """Return the parts G (T, RHO, Z) of dS^T z in float32; with `ones`, z (M, Z - 1) gets a last column of ones."""
    (M, rho), Z = dS.shape, z.shape[1] + ones
    config = tuning.config("token_product", z.dtype, arch, tuning.shape_class(M, Z, Z))
    BLOCK_RHO = block(rho, 64)
    tiles, blocks = cdiv(Z, config.cols), cdiv(rho, BLOCK_RHO)
    splits, height = _split(arch, config.split, tiles * blocks, M, config.rows)
    G = dS.new_empty(splits, rho, Z)
    launch(
        kernels_backward._token_product_kernel, (tiles, splits, blocks), config,
        dS, z, G, M, rho, Z, height, *z.stride(),
        BLOCK_M=config.rows, BLOCK_Z=config.cols, BLOCK_RHO=BLOCK_RHO, ONES=ones, PRECISION=precision(z.dtype),
    )  # fmt: skip
    return G


def sum_dB(
    parts: Tensor, offsets: Tensor, active: Tensor | None, trainable: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the sum over t of parts (T, RHO, Z) in `dtype`, zero in rows of subspaces that do not learn."""
    (T, rho, Z), K = parts.shape, offsets.shape[0] - 1
    dB = parts.new_empty(rho, Z, dtype=dtype)
    config = _SUM_DB
    launch(
        kernels_backward._sum_dB_kernel, (cdiv(Z, config.cols), cdiv(rho, config.rows)), config,
        parts, offsets, active, trainable, dB, T, K, rho, Z,
        BLOCK_RHO=config.rows, BLOCK_Z=config.cols, BLOCK_K=block(K, K * 2),
    )  # fmt: skip
    return dB


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum over t of parts (T, ...) in `dtype`."""
    total = parts.new_empty(parts.shape[1:], dtype=dtype)
    E, BLOCK_E = total.numel(), _SUM_PARTS.cols
    launch(
        kernels._sum_parts_kernel, (cdiv(E, BLOCK_E),), _SUM_PARTS,
        parts, total, parts.shape[0], E, BLOCK_E=BLOCK_E,
    )  # fmt: skip
    return total


def _split(arch: str, split: int, programs: int, size: int, step: int) -> tuple[int, int]:
    """Return in how many parts to cut a reduction over `size`, none of them empty, and their length in whole steps."""
    steps = cdiv(size, step)
    length = cdiv(steps, min(split, steps) if split else tuning.fill(arch, programs, steps)) * step
    return cdiv(size, length), length

"""Launchers of the kernels in `kernels.py`: allocate the output, choose a grid, launch.

A launcher has its kernel's name. It works on the current device and stream, allocates with torch, and neither
synchronises nor reads device memory. Tensors without strides among a kernel's arguments have to be contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from ..subspaces import Subspaces
from . import kernels, tuning
from .tuning import Config, cdiv

# Not tuned: these kernels move little.
_PREPARE = {2: Config(16, 64, 64, num_stages=2), 4: Config(16, 64, 16, num_stages=2)}  # by the bytes of an element
_FINISH = Config(16, 32)

_compiled: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: JITFunction,
    grid: tuple[int, ...],
    config: Config,
    tensors: tuple[Tensor | None, ...],
    free: tuple[int, ...],
    fixed: tuple[int, ...],
    **constants: Any,
) -> None:
    """Run `kernel` over `grid`: the only place where anything is launched.

    A kernel's parameters are tensors, numbers of which compiled code is independent, numbers that it may depend on, and
    constants. What Triton compiled is kept by all that it depends on: Triton's own way from arguments to compiled code
    takes longer than a small kernel.
    """
    like = [None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors]
    key = (kernel, config, tensors[0].device, fixed, *constants.values(), *like)  # type: ignore[union-attr]
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[(*grid, 1, 1)[:3]](*tensors, *free, *fixed, *constants.values())
        return
    # The fusion of multiply and add is spelled out, since its default depends on Triton's version.
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    compiled = kernel[grid](*tensors, *free, *fixed, **constants, **options)
    if compiled is not None:  # as it is under the interpreter
        assert kernel.arg_names[-len(constants) :] == [*constants], "constants in the order of the kernel's parameters"
        _compiled[key] = compiled


def precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of products of `dtype`: tf32 only where torch's own products use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def block(size: int, limit: int) -> int:
    """Return the power of two that covers `size`, from 16 (a tensor core's tile) to `limit`."""
    return max(16, min(limit, 1 << max(size - 1, 0).bit_length()))


def padded(rho: int) -> int:
    """Return RHO_PAD: a power of two up to 64, whole 64s above."""
    return block(rho, 64) if rho <= 64 else cdiv(rho, 64) * 64


def prepare(
    dtype: torch.dtype, B: Tensor, C: Tensor, subspaces: Subspaces, few: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Return Q = B A (RHO_PAD, D), q = B a (RHO_PAD,), C^T (RHO_PAD, N) and, of few tokens, parts of x Q^T.

    Zero in the columns of pruned subspaces and in the padding; q in float32, None without a. For `few` (M, D) the parts
    (T, M, RHO_PAD) take the place of Q.
    """
    basis, basis_bias, row_subspace, offsets, active, *_ = subspaces
    (rho, R), (N, r_max), K = B.shape, C.shape, offsets.shape[0] - 1
    D = R if basis is None else basis.shape[1]
    rho_pad, config = padded(rho), _PREPARE[dtype.itemsize]
    blocks_Q = cdiv(D + (basis_bias is not None), config.cols)
    q = None if basis_bias is None else B.new_empty(rho_pad, dtype=torch.float32)
    Ct = B.new_empty(rho_pad, N, dtype=dtype)
    Q = parts = None
    if few is None:
        Q = B.new_empty(rho_pad, D, dtype=dtype)
    else:
        parts = B.new_empty(blocks_Q, few.shape[0], rho_pad, dtype=torch.float32)
    BLOCK_RHO = min(rho_pad, 64)
    launch(
        kernels._prepare_kernel, (blocks_Q + cdiv(N, config.cols), rho_pad // BLOCK_RHO), config,
        (B, basis, basis_bias, C, row_subspace, offsets, active, few, Q, q, Ct, parts),
        (0 if few is None else few.shape[0],),
        (
            N, D, R, K, rho, r_max, *((0, 0) if basis is None else basis.stride()),
            0 if basis_bias is None else basis_bias.stride(0), *((0, 0) if few is None else few.stride()),
        ),
        BLOCK_RHO=BLOCK_RHO, BLOCK_N=config.cols, BLOCK_R=config.depth, BLOCK_K=block(K, K * 2),
        BLOCK_M=tuning.FEW, PRECISION=precision(dtype),
    )  # fmt: skip
    return Q, q, Ct, parts


def low_rank_gemm(
    L: Tensor, R: Tensor, U: Tensor | None, parts: Tensor | None, u: Tensor | None, V: Tensor, bias: Tensor | None,
    inner: Tensor | None, arch: str,
) -> Tensor:  # fmt: skip
    """Return Y = L R + (L U^T + u) V + bias (M, F); the inner product, or the sum of its `parts`, goes to `inner`."""
    # Offsets within a tile have 32 bits.
    L = L if max(L.stride()) < 1 << 23 else L.contiguous()
    (M, E), F, rho_pad = L.shape, R.shape[1], V.shape[0]
    config = tuning.config("low_rank_gemm", L.dtype, arch, tuning.shape_class(M))
    Y = L.new_empty(M, F)
    # More columns of S leave registers for fewer of Y.
    BLOCK_F = min(config.cols, 8192 // rho_pad)
    rows, cols = cdiv(M, config.rows), cdiv(F, BLOCK_F)
    run = tuning.run_length(arch, rows, cols, 0.0 if U is None else rho_pad / BLOCK_F)
    launch(
        kernels._low_rank_gemm_kernel, (rows * cdiv(cols, run),), config,
        (L, R, U, parts, u, V, bias, inner, Y),
        (M, 0 if parts is None else parts.shape[0], run),
        (E, F, 0 if inner is None else inner.shape[1], *L.stride(), *R.stride()),
        BLOCK_M=config.rows, BLOCK_F=BLOCK_F, BLOCK_E=config.depth, RHO_PAD=rho_pad, GROUP_M=config.group,
        EVEN_E=E % config.depth == 0, PRECISION=precision(L.dtype),
    )  # fmt: skip
    return Y


def token_products(
    dy: Tensor, S: Tensor | None, z: Tensor | None, dS: Tensor | None, rho: int, arch: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return parts (T, N, RHO_PAD) of dy^T S and (T, Z, RHO_PAD) of z^T dS, in float32; None for what has no S or z."""
    (M, N), Z, rho_pad = dy.shape, 0 if z is None else z.shape[1], padded(rho)
    config = tuning.config("token_products", dy.dtype, arch, tuning.shape_class(M))
    blocks = (0 if S is None else cdiv(N, config.cols)) + cdiv(Z, config.cols)
    splits, width = tuning.split_tokens(arch, M, config.rows, blocks)
    dy_parts = None if S is None else dy.new_empty(splits, N, rho_pad, dtype=torch.float32)
    z_parts = None if z is None else dy.new_empty(splits, Z, rho_pad, dtype=torch.float32)
    launch(
        kernels._token_products_kernel, (blocks, splits), config,
        (dy, S, dy_parts, z, dS, z_parts),
        (M, width),
        (N, Z, rho, *dy.stride(), *((0, 0) if z is None else z.stride())),
        BLOCK_M=config.rows, BLOCK_Z=config.cols, RHO_PAD=rho_pad, PRECISION=precision(dy.dtype),
    )  # fmt: skip
    return dy_parts, z_parts


def finish(
    dy_parts: Tensor | None, z_parts: Tensor | None, B: Tensor, C: Tensor, subspaces: Subspaces
) -> tuple[Tensor | None, Tensor | None]:
    """Return dB (RHO, R) and dC (N, r_max) from the parts of z^T dS (R, ...) and of dy^T S (N, ...), or None."""
    _, _, row_subspace, offsets, active, trainable, *_ = subspaces
    (rho, R), (N, r_max), K, config = B.shape, C.shape, offsets.shape[0] - 1, _FINISH
    dB = None if z_parts is None else torch.empty_like(B)
    dC = None if dy_parts is None else torch.empty_like(C)
    parts = z_parts if dy_parts is None else dy_parts
    assert parts is not None
    BLOCK_RHO = block(rho, 64)
    blocks_dC = 0 if dC is None else cdiv(N, config.cols)
    blocks_dB = 0 if dB is None else cdiv(R, config.cols) * cdiv(rho, BLOCK_RHO)
    launch(
        kernels._finish_kernel, (blocks_dC + blocks_dB,), config,
        (row_subspace, offsets, active, trainable, dy_parts, z_parts, dC, dB),
        (parts.shape[0],),
        (
            N, R, K, rho, r_max,
            0 if dy_parts is None else dy_parts.shape[2], 0 if z_parts is None else z_parts.shape[2],
        ),
        BLOCK_N=config.cols, BLOCK_J=block(r_max, r_max * 2), BLOCK_RHO=BLOCK_RHO, BLOCK_K=block(K, K * 2),
    )  # fmt: skip
    return dB, dC

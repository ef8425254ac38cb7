"""Launchers of the kernels in `kernels_grouped.py`; conventions as in `launch.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..mixed_batch import TILE_TOKENS, Groups
from ..subspaces import Subspaces
from . import kernels_grouped, launch
from .launch import block, precision
from .tuning import Config, cdiv

# Not tuned: a tile of tokens is small, and what these kernels move beside dy and y stays in the cache. By the bytes of
# an element: what compiles without spills for every GPU of docs/triton-registers.md.
_DELTA_FWD = {2: Config(TILE_TOKENS, 64, 32), 4: Config(TILE_TOKENS, 64, 32, num_stages=2)}
_DELTA_BWD = {2: Config(TILE_TOKENS, 32, 128, num_stages=2), 4: Config(TILE_TOKENS, 16, 128, num_stages=1)}
_DC = {2: Config(32, 64, num_stages=2), 4: Config(32, 32, num_stages=2)}
_DB = {2: Config(32, 32, num_stages=2), 4: Config(32, 32, num_stages=2)}


def delta_fwd(
    y: Tensor, P: Tensor, B: Tensor, C: Tensor, subspaces: Subspaces, groups: Groups, S: Tensor | None
) -> None:
    """Add S Ct to y (M, N) in place, S = P B^T, B and C of each token's slot; write S (M, RHO) where it is wanted."""
    N, (_, rho, R), r_max = y.shape[1], B.shape, C.shape[2]
    _, _, row_subspace, offsets, active, *_ = subspaces
    T, K, config = groups.tiles.shape[0], offsets.shape[0] - 1, _DELTA_FWD[y.element_size()]
    launch.launch(
        kernels_grouped._grouped_delta_fwd_kernel, (T, cdiv(N, config.cols)), config,
        (P, B, C, row_subspace, offsets, active, groups.tokens, groups.tiles, y, S),
        (T,),
        (N, R, rho, K, r_max),
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_R=config.depth, BLOCK_RHO=block(rho, 64),
        BLOCK_K=block(K, K * 2), PRECISION=precision(y.dtype),
    )  # fmt: skip


def delta_bwd(
    dy: Tensor, B: Tensor, C: Tensor, subspaces: Subspaces, groups: Groups, need_dP: bool
) -> tuple[Tensor, Tensor | None]:
    """Return dS = dy C (M, RHO) in float32 and dP = dS B (M, R) in the dtype of dy, B and C of each token's slot."""
    (M, N), (_, rho, R), r_max = dy.shape, B.shape, C.shape[2]
    _, _, row_subspace, offsets, active, *_ = subspaces
    dS = dy.new_empty((M, rho), dtype=torch.float32)
    dP = dy.new_empty(M, R) if need_dP else None
    T, config = groups.tiles.shape[0], _DELTA_BWD[dy.element_size()]
    BLOCK_R = block(R, config.depth)
    launch.launch(
        kernels_grouped._grouped_delta_bwd_kernel, (T, cdiv(R, BLOCK_R) if need_dP else 1), config,
        (dy, B, C, row_subspace, offsets, active, groups.tokens, groups.tiles, dS, dP),
        (T,),
        (N, R, rho, offsets.shape[0] - 1, r_max, *dy.stride()),
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_R=BLOCK_R, BLOCK_RHO=block(rho, 64),
        PRECISION=precision(dy.dtype),
    )  # fmt: skip
    return dS, dP


def grad_C(dy: Tensor, S: Tensor, C: Tensor, subspaces: Subspaces, groups: Groups) -> Tensor:
    """Return dC (G, N, r_max) in the dtype of C: dy^T S at the places of C, over the tokens of each group."""
    (_, N), rho, r_max = dy.shape, S.shape[1], C.shape[2]
    _, _, row_subspace, offsets, active, trainable, *_ = subspaces
    G, config, BLOCK_RHO = groups.slots.shape[0], _DC[dy.element_size()], block(rho, 64)
    dC = C.new_zeros(G, N, r_max)
    launch.launch(
        kernels_grouped._grouped_dC_kernel, (G, cdiv(N, config.cols), cdiv(rho, BLOCK_RHO)), config,
        (dy, S, row_subspace, offsets, active, trainable, groups.tokens, groups.slots, groups.starts, dC),
        (),
        (N, rho, offsets.shape[0] - 1, r_max, *dy.stride()),
        BLOCK_M=config.rows, BLOCK_N=config.cols, BLOCK_RHO=BLOCK_RHO, PRECISION=precision(dy.dtype),
    )  # fmt: skip
    return dC


def grad_B(dS: Tensor, P: Tensor, B: Tensor, subspaces: Subspaces, groups: Groups) -> Tensor:
    """Return dB = dS^T P (G, RHO, R) in the dtype of B, over the tokens of each group."""
    _, rho, R = B.shape
    _, _, _, offsets, active, trainable, *_ = subspaces
    G, K, config, BLOCK_RHO = groups.slots.shape[0], offsets.shape[0] - 1, _DB[P.element_size()], block(rho, 64)
    dB = B.new_empty(G, rho, R)
    launch.launch(
        kernels_grouped._grouped_dB_kernel, (G, cdiv(R, config.cols), cdiv(rho, BLOCK_RHO)), config,
        (dS, P, offsets, active, trainable, groups.tokens, groups.slots, groups.starts, dB),
        (),
        (R, rho, K),
        BLOCK_M=config.rows, BLOCK_R=config.cols, BLOCK_RHO=BLOCK_RHO, BLOCK_K=block(K, K * 2),
        PRECISION=precision(P.dtype),
    )  # fmt: skip
    return dB

"""The device kernels for tokens in groups, each with a B, C and masks of its own; conventions as in `kernels.py`.

A tile is up to BLOCK_M tokens that share a slot, a row of `tiles` (T, 3): the slot, -1 for tokens without an adapter,
and where in `tokens` they begin and end. Group g is tokens[starts[g]] to tokens[starts[g + 1]] and has slot slots[g].
"""

import triton
import triton.language as tl

from .kernels import _column_mask, _Ct_tile, _row_span


@triton.jit
def _tile(tiles_ptr, tokens_ptr, BLOCK_M: tl.constexpr):
    """slot, tokens and their mask; a slot that is not one comes as 0, its tokens masked out in `takes`."""
    at = tiles_ptr + tl.program_id(0).to(tl.int64) * 3
    slot = tl.load(at)
    offs = tl.load(at + 1) + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_mask = offs < tl.load(at + 2)
    offs_m = tl.load(tokens_ptr + offs, mask=m_mask, other=0)  # [BLOCK_M] int64
    # Compared lane by lane: Triton's interpreter makes integers of a scalar truth value that it spreads.
    return tl.maximum(slot, 0).to(tl.int64), offs_m, m_mask, m_mask & (slot + 0 * offs >= 0)


@triton.jit
def _of_slot(mask_ptr, slot, K):
    """The masks (K,) of a slot, or none."""
    return mask_ptr + slot * K if mask_ptr is not None else None


@triton.jit(do_not_specialize=["T"])
def _grouped_delta_fwd_kernel(
    P_ptr, B_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, tokens_ptr, tiles_ptr, y_ptr, S_ptr,
    T, N, R, RHO, K, r_max,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_RHO: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += S Ct with S = P B^T, B and C of the tile's slot; P (M, R), B (slots, RHO, R), C (slots, N, r_max), y (M, N).

    The program in column 0 writes S (M, RHO).
    """
    slot, offs_m, m_mask, takes = _tile(tiles_ptr, tokens_ptr, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    active_ptr = _of_slot(active_ptr, slot, K)
    dtype = y_ptr.dtype.element_ty
    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
    delta = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, RHO, BLOCK_RHO):
        offs_rho = start + tl.arange(0, BLOCK_RHO)
        rho_mask = offs_rho < RHO
        S = tl.zeros((BLOCK_M, BLOCK_RHO), tl.float32)
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            r_mask = offs_r < R
            P = tl.load(P_ptr + offs_m[:, None] * R + offs_r[None, :], mask=takes[:, None] & r_mask[None, :], other=0.0)
            B_ptrs = B_ptr + (slot * RHO + offs_rho)[None, :] * R + offs_r[:, None]
            Bt = tl.load(B_ptrs, mask=r_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_R, BLOCK_RHO]
            S = tl.dot(P, Bt.to(P.dtype), S, input_precision=PRECISION)
        if active_ptr is not None:
            S = tl.where(_column_mask(offs_rho, K, offsets_ptr, active_ptr, None, BLOCK_K)[None, :], S, 0.0)
        if S_ptr is not None:
            if tl.program_id(1) == 0:
                S_ptrs = S_ptr + offs_m[:, None] * RHO + offs_rho[None, :]
                tl.store(S_ptrs, S, mask=m_mask[:, None] & rho_mask[None, :])
        Ct = _Ct_tile(C_ptr + slot * N * r_max, offs_rho, offs_n, N, first, last, r_max, dtype)  # [BLOCK_RHO, BLOCK_N]
        delta = tl.dot(S.to(dtype), Ct, delta, input_precision=PRECISION)
    y_ptrs = y_ptr + offs_m[:, None] * N + offs_n[None, :]
    y_mask = takes[:, None] & (offs_n < N)[None, :]
    y = tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    tl.store(y_ptrs, (y + delta).to(dtype), mask=y_mask)


@triton.jit(do_not_specialize=["T"])
def _grouped_delta_bwd_kernel(
    dy_ptr, B_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, tokens_ptr, tiles_ptr, dS_ptr, dP_ptr,
    T, N, R, RHO, K, r_max, stride_dym, stride_dyn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_RHO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dS = dy C and dP = dS B, B and C of the tile's slot; dy (M, N), dS (M, RHO), dP (M, R).

    Program axis 1 walks over blocks of columns of dP; the one in column 0 writes dS. Tokens without an adapter get 0.
    """
    slot, offs_m, m_mask, takes = _tile(tiles_ptr, tokens_ptr, BLOCK_M)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    active_ptr = _of_slot(active_ptr, slot, K)
    dtype = dy_ptr.dtype.element_ty
    dP = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(0, RHO, BLOCK_RHO):
        offs_rho = start + tl.arange(0, BLOCK_RHO)
        rho_mask = offs_rho < RHO
        dS = tl.zeros((BLOCK_M, BLOCK_RHO), tl.float32)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
            dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn
            dy = tl.load(dy_ptrs, mask=takes[:, None] & (offs_n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
            Ct = _Ct_tile(
                C_ptr + slot * N * r_max, offs_rho, offs_n, N, first, last, r_max, dtype
            )  # [BLOCK_RHO, BLOCK_N]
            dS = tl.dot(dy, tl.trans(Ct), dS, input_precision=PRECISION)
        if tl.program_id(1) == 0:
            dS_ptrs = dS_ptr + offs_m[:, None] * RHO + offs_rho[None, :]
            tl.store(dS_ptrs, dS, mask=m_mask[:, None] & rho_mask[None, :])
        if dP_ptr is not None:
            B_ptrs = B_ptr + (slot * RHO + offs_rho)[:, None] * R + offs_r[None, :]
            B = tl.load(B_ptrs, mask=rho_mask[:, None] & (offs_r < R)[None, :], other=0.0)  # [BLOCK_RHO, BLOCK_R]
            dP = tl.dot(dS.to(dtype), B.to(dtype), dP, input_precision=PRECISION)
    if dP_ptr is not None:
        dP_ptrs = dP_ptr + offs_m[:, None] * R + offs_r[None, :]
        tl.store(dP_ptrs, dP.to(dtype), mask=m_mask[:, None] & (offs_r < R)[None, :])


@triton.jit
def _grouped_dC_kernel(
    dy_ptr, S_ptr, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr, tokens_ptr, slots_ptr, starts_ptr, dC_ptr,
    N, RHO, K, r_max, stride_dym, stride_dyn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dC[g, i, j] = sum over tokens m of group g of dy[m, i] S[m, off_k(i) + j]; dC (G, N, r_max), zeros at first."""
    group = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + group)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(2) * BLOCK_RHO
    offs_rho = start + tl.arange(0, BLOCK_RHO)
    active_ptr, trainable_ptr = _of_slot(active_ptr, slot, K), _of_slot(trainable_ptr, slot, K)
    dtype = dy_ptr.dtype.element_ty
    dCt = tl.zeros((BLOCK_RHO, BLOCK_N), tl.float32)
    end = tl.load(starts_ptr + group + 1)
    for m in range(tl.load(starts_ptr + group), end, BLOCK_M):
        offs = m + tl.arange(0, BLOCK_M)
        m_mask = offs < end
        offs_m = tl.load(tokens_ptr + offs, mask=m_mask, other=0)  # [BLOCK_M] int64
        dy_ptrs = dy_ptr + offs_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn
        dy = tl.load(dy_ptrs, mask=m_mask[:, None] & (offs_n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
        S_ptrs = S_ptr + offs_m[:, None] * RHO + offs_rho[None, :]
        S = tl.load(S_ptrs, mask=m_mask[:, None] & (offs_rho < RHO)[None, :], other=0.0)  # [BLOCK_M, BLOCK_RHO]
        dCt = tl.dot(tl.trans(S.to(dtype)), dy, dCt, input_precision=PRECISION)
    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr)
    dC_ptrs = dC_ptr + (group * N + offs_n) * r_max  # [BLOCK_N]
    for j in range(r_max):
        column = first + j
        dC = tl.sum(tl.where(offs_rho[:, None] == column[None, :], dCt, 0.0), 0)  # [BLOCK_N]
        # Each entry has one column of S, hence one block that stores it.
        of_block = (column < last) & (column // BLOCK_RHO * BLOCK_RHO == start)
        tl.store(dC_ptrs + j, dC.to(dC_ptr.dtype.element_ty), mask=of_block)


@triton.jit
def _grouped_dB_kernel(
    dS_ptr, P_ptr, offsets_ptr, active_ptr, trainable_ptr, tokens_ptr, slots_ptr, starts_ptr, dB_ptr, R, RHO, K,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_RHO: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dB[g] = dS^T P over the tokens of group g, zero where masked out; dS (M, RHO), P (M, R), dB (G, RHO, R)."""
    group = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + group)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_rho = tl.program_id(2) * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    r_mask, rho_mask = offs_r < R, offs_rho < RHO
    dtype = P_ptr.dtype.element_ty
    dB = tl.zeros((BLOCK_RHO, BLOCK_R), tl.float32)
    end = tl.load(starts_ptr + group + 1)
    for m in range(tl.load(starts_ptr + group), end, BLOCK_M):
        offs = m + tl.arange(0, BLOCK_M)
        m_mask = offs < end
        offs_m = tl.load(tokens_ptr + offs, mask=m_mask, other=0)  # [BLOCK_M] int64
        P = tl.load(P_ptr + offs_m[:, None] * R + offs_r[None, :], mask=m_mask[:, None] & r_mask[None, :], other=0.0)
        dS_ptrs = dS_ptr + offs_m[:, None] * RHO + offs_rho[None, :]
        dS = tl.load(dS_ptrs, mask=m_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_RHO]
        dB = tl.dot(tl.trans(dS.to(dtype)), P, dB, input_precision=PRECISION)
    active_ptr, trainable_ptr = _of_slot(active_ptr, slot, K), _of_slot(trainable_ptr, slot, K)
    on = _column_mask(offs_rho, K, offsets_ptr, active_ptr, trainable_ptr, BLOCK_K)
    dB_ptrs = dB_ptr + (group * RHO + offs_rho)[:, None] * R + offs_r[None, :]
    dB = tl.where(on[:, None], dB, 0.0).to(dB_ptr.dtype.element_ty)
    tl.store(dB_ptrs, dB, mask=rho_mask[:, None] & r_mask[None, :])

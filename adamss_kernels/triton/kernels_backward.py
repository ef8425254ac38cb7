"""The device kernels of the backward pass; conventions and shared tiles are those of `kernels.py`."""

import triton
import triton.language as tl

from .kernels import _add_product, _column_mask, _Ct_tile, _reads, _row_span, _sum_over_parts, _tile_id


@triton.jit(do_not_specialize=["M"])
def _delta_bwd_kernel(
    dy_ptr, S_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr, dS_ptr, dC_ptr,
    M, N, RHO, r_max, width, stride_dym, stride_dyn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS[m, c] = sum_i dy[m, i] Ct[c, i] and dC[i, j] = sum_m dy[m, i] S[m, off_k(i) + j], in one pass over dy.

    Program axis 0 walks over M, axis 1 over stretches of `width` rows of C, axis 2 over blocks of columns of S. Stretch
    t writes its own partial dS[t] (M, RHO), the block of tokens t its own dC[t] (N, r_max): no atomics.
    """
    pid_m, stretch = tl.program_id(0), tl.program_id(1)
    start = tl.program_id(2) * BLOCK_RHO
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_rho = start + tl.arange(0, BLOCK_RHO)
    m_mask, rho_mask = offs_m < M, offs_rho < RHO
    S_mask = m_mask[:, None] & rho_mask[None, :]
    dtype = dy_ptr.dtype.element_ty
    dS = tl.zeros((BLOCK_M, BLOCK_RHO), tl.float32)
    if dC_ptr is not None:
        S_ptrs = S_ptr + offs_m.to(tl.int64)[:, None] * RHO + offs_rho[None, :]
        S = tl.load(S_ptrs, mask=S_mask, other=0.0).to(dtype)  # [BLOCK_M, BLOCK_RHO]
    for n in range(stretch * width, tl.minimum(stretch * width + width, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
        if _reads(first, last, start, BLOCK_RHO):
            dy_ptrs = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn
            dy = tl.load(dy_ptrs, mask=m_mask[:, None] & (offs_n < N)[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
            if dS_ptr is not None:
                Ct = _Ct_tile(C_ptr, offs_rho, offs_n, first, last, r_max, dtype)  # [BLOCK_RHO, BLOCK_N]
                dS = tl.dot(dy, tl.trans(Ct), dS, input_precision=PRECISION)
            if dC_ptr is not None:
                first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr)
                if _reads(first, last, start, BLOCK_RHO):
                    dCt = tl.dot(tl.trans(S), dy, input_precision=PRECISION)  # [BLOCK_RHO, BLOCK_N]
                    dC_ptrs = dC_ptr + (pid_m.to(tl.int64) * N + offs_n) * r_max  # [BLOCK_N]
                    for j in range(r_max):
                        column = first + j
                        dC = tl.sum(tl.where(offs_rho[:, None] == column[None, :], dCt, 0.0), 0)  # [BLOCK_N]
                        # Each entry has one column of S, hence one block that stores it.
                        tl.store(dC_ptrs + j, dC, mask=(column < last) & (column // BLOCK_RHO * BLOCK_RHO == start))
    if dS_ptr is not None:
        dS_ptrs = dS_ptr + (stretch.to(tl.int64) * M + offs_m)[:, None] * RHO + offs_rho[None, :]
        tl.store(dS_ptrs, dS, mask=S_mask)


@triton.jit
def _sum_dC_kernel(
    parts_ptr, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr, dC_ptr, T, N, r_max,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dC = sum_t parts[t], zero where the row is masked out or has no entry; parts (T, N, r_max), dC (N, r_max)."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.arange(0, BLOCK_J)
    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr)
    # Entries without a column of S were never written, so they must not be read either.
    dC_mask = offs_j[None, :] < (last - first)[:, None]
    offs = offs_n.to(tl.int64)[:, None] * r_max + offs_j[None, :]
    dC = _sum_over_parts(parts_ptr, offs, dC_mask, T, N * r_max)
    tl.store(dC_ptr + offs, dC.to(dC_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_j < r_max)[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_dx_kernel(
    dy_ptr, W_ptr, dS_ptr, Q_ptr, dx_ptr, M, N, D, RHO, stride_dym, stride_dyn, stride_wn, stride_wd,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RHO: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx = [dS | dy] [Q; W]; dS (M, RHO), dy (M, N), Q (RHO, D), W (N, D), dx (M, D)."""
    pid_m, pid_d = _tile_id(M, D, BLOCK_M, BLOCK_D, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = pid_d * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_mask, d_mask = offs_m < M, offs_d < D
    dx = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for start in range(0, RHO, BLOCK_RHO):
        offs_rho = start + tl.arange(0, BLOCK_RHO)
        rho_mask = offs_rho < RHO
        dS_ptrs = dS_ptr + offs_m.to(tl.int64)[:, None] * RHO + offs_rho[None, :]
        dS = tl.load(dS_ptrs, mask=m_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_RHO]
        Q_ptrs = Q_ptr + offs_rho.to(tl.int64)[:, None] * D + offs_d[None, :]
        Q = tl.load(Q_ptrs, mask=rho_mask[:, None] & d_mask[None, :], other=0.0)  # [BLOCK_RHO, BLOCK_D]
        dx = tl.dot(dS.to(Q.dtype), Q, dx, input_precision=PRECISION)
    dy_ptrs = dy_ptr + offs_m.to(tl.int64)[:, None] * stride_dym + offs_n[None, :] * stride_dyn
    W_ptrs = W_ptr + offs_n[:, None] * stride_wn + offs_d.to(tl.int64)[None, :] * stride_wd
    dx = _add_product(dx, dy_ptrs, W_ptrs, m_mask, d_mask, N, stride_dyn, stride_wn, BLOCK_N, EVEN_N, PRECISION)
    dx_ptrs = dx_ptr + offs_m.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=m_mask[:, None] & d_mask[None, :])


@triton.jit(do_not_specialize=["M"])
def _token_product_kernel(
    dS_ptr, z_ptr, G_ptr, M, RHO, Z, height, stride_zm, stride_zz,
    BLOCK_M: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_RHO: tl.constexpr, ONES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """G[t] = dS^T z over the tokens of stretch t, `height` of them; dS (M, RHO), z (M, Z), G (T, RHO, Z).

    With ONES the last column of z is not in memory: it is 1, as in x~ = [x | 1].
    """
    offs_z = tl.program_id(0) * BLOCK_Z + tl.arange(0, BLOCK_Z)
    stretch = tl.program_id(1)
    offs_rho = tl.program_id(2) * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    rho_mask = offs_rho < RHO
    G = tl.zeros((BLOCK_RHO, BLOCK_Z), tl.float32)
    for m in range(stretch * height, tl.minimum(stretch * height + height, M), BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_mask = offs_m < M
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_z.to(tl.int64)[None, :] * stride_zz
        z = tl.load(z_ptrs, mask=m_mask[:, None] & (offs_z < Z - ONES)[None, :], other=0.0)  # [BLOCK_M, BLOCK_Z]
        if ONES:
            z = tl.where((offs_z == Z - 1)[None, :], 1.0, z).to(z.dtype)
        dS_ptrs = dS_ptr + offs_m[:, None] * RHO + offs_rho[None, :]
        dS = tl.load(dS_ptrs, mask=m_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_RHO]
        G = tl.dot(tl.trans(dS.to(z.dtype)), z, G, input_precision=PRECISION)
    G_ptrs = G_ptr + (stretch.to(tl.int64) * RHO + offs_rho)[:, None] * Z + offs_z[None, :]
    tl.store(G_ptrs, G, mask=rho_mask[:, None] & (offs_z < Z)[None, :])


@triton.jit
def _sum_dB_kernel(
    parts_ptr, offsets_ptr, active_ptr, trainable_ptr, dB_ptr, T, K, RHO, Z,
    BLOCK_RHO: tl.constexpr, BLOCK_Z: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dB = sum_t parts[t], zero where the subspace is masked out; parts (T, RHO, Z), dB (RHO, Z)."""
    offs_z = tl.program_id(0) * BLOCK_Z + tl.arange(0, BLOCK_Z)
    offs_rho = tl.program_id(1) * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    on = _column_mask(offs_rho, K, offsets_ptr, active_ptr, trainable_ptr, BLOCK_K)
    dB_mask = (offs_rho < RHO)[:, None] & (offs_z < Z)[None, :]
    offs = offs_rho.to(tl.int64)[:, None] * Z + offs_z[None, :]
    dB = _sum_over_parts(parts_ptr, offs, dB_mask & on[:, None], T, RHO * Z)
    tl.store(dB_ptr + offs, dB.to(dB_ptr.dtype.element_ty), mask=dB_mask)

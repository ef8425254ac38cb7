"""The four device kernels; letters as in docs/notation.md, launchers of the same names in `launch.py`.

Columns of S are padded with zeros to RHO_PAD. A subspace mask enters as the span of columns `[first, last)` of S that
an output row reads: where its subspace is masked out the span is empty. Optional pointers are None at compile time.
Sums are float32; offsets into memory are int64.
"""

import triton
import triton.language as tl


@triton.jit
def _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, mask_ptr, mask2_ptr):
    """first, last = off_k(i), off_k(i)+1; first = last where k(i) is masked out or i >= N."""
    n_mask = offs_n < N
    k = tl.load(row_subspace_ptr + offs_n, mask=n_mask, other=0)  # [BLOCK_N]
    first = tl.load(offsets_ptr + k)  # [BLOCK_N]
    last = tl.load(offsets_ptr + k + 1)  # [BLOCK_N]
    if mask_ptr is not None:
        n_mask = n_mask & tl.load(mask_ptr + k)
    if mask2_ptr is not None:
        n_mask = n_mask & tl.load(mask2_ptr + k)
    return first, tl.where(n_mask, last, first)


@triton.jit
def _column_mask(offs_rho, K, offsets_ptr, mask_ptr, mask2_ptr, BLOCK_K: tl.constexpr):
    """on[c] = mask[k] & mask2[k] for the k with off_k <= c < off_k+1; false beyond RHO = off_K."""
    offs_k = tl.arange(0, BLOCK_K)
    k_mask = offs_k < K
    first = tl.load(offsets_ptr + offs_k, mask=k_mask, other=0)  # [BLOCK_K]
    last = tl.load(offsets_ptr + offs_k + 1, mask=k_mask, other=0)  # [BLOCK_K]
    if mask_ptr is not None:
        k_mask = k_mask & tl.load(mask_ptr + offs_k, mask=k_mask, other=0)
    if mask2_ptr is not None:
        k_mask = k_mask & tl.load(mask2_ptr + offs_k, mask=k_mask, other=0)
    owns = (offs_rho[:, None] >= first[None, :]) & (offs_rho[:, None] < last[None, :])  # [BLOCK_RHO, BLOCK_K]
    return tl.max((owns & k_mask[None, :]).to(tl.int32), 1) > 0  # [BLOCK_RHO]


@triton.jit
def _Ct_tile(C_ptr, offs_rho, offs_n, N, first, last, r_max, dtype: tl.constexpr):
    """Ct[first[i] + j, i] = C[i, j] for first[i] + j < last[i], else 0: block-diagonal (RHO, N)."""
    Ct = tl.zeros((offs_rho.shape[0], offs_n.shape[0]), dtype)  # [BLOCK_RHO, BLOCK_N]
    C_ptrs = C_ptr + offs_n.to(tl.int64) * r_max  # [BLOCK_N]
    # Placed entry by entry, since a tile of pointers would take more registers than there are; two loads are under
    # way at a time, and neither waits for `first` and `last`.
    for j in range(0, r_max, 2):
        for ahead in tl.static_range(2):
            column = first + j + ahead
            C = tl.load(C_ptrs + j + ahead, mask=(offs_n < N) & (r_max - j > ahead + 0 * offs_n), other=0.0)
            place = (offs_rho[:, None] == column[None, :]) & (column < last)[None, :]
            Ct = tl.where(place, C.to(dtype)[None, :], Ct)
    return Ct


@triton.jit
def _sum_of_parts(ptrs, mask, T, size):
    """sum_t of what lies at ptrs + t * size where `mask`, in the order of t."""
    total = tl.zeros(ptrs.shape, tl.float32)
    # Sixteen loads are under way at a time: one by one, each would wait for the last.
    for _ in tl.range(0, T, loop_unroll_factor=16):
        total += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        ptrs += size
    return total


@triton.jit
def _product_BA(
    B_ptr, A_ptr, a_ptr, offs_rho, offs_d, D, R, RHO, stride_ar, stride_ad, stride_a,
    dtype: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """[B A | B a], a being the column after the last one of A, more exact than `dtype`."""
    Q = tl.zeros((offs_rho.shape[0], offs_d.shape[0]), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        r_mask = offs_r < R
        B_ptrs = B_ptr + offs_rho.to(tl.int64)[:, None] * R + offs_r[None, :]
        B = tl.load(B_ptrs, mask=(offs_rho < RHO)[:, None] & r_mask[None, :], other=0.0)  # [BLOCK_RHO, BLOCK_R]
        A_ptrs = A_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + offs_d.to(tl.int64)[None, :] * stride_ad
        A = tl.load(A_ptrs, mask=r_mask[:, None] & (offs_d < D)[None, :], other=0.0).to(dtype)  # [BLOCK_R, BLOCK_N]
        if a_ptr is not None:
            a = tl.load(a_ptr + offs_r.to(tl.int64) * stride_a, mask=r_mask, other=0.0)  # [BLOCK_R]
            A = tl.where((offs_d == D)[None, :], a.to(dtype)[:, None], A)
        # B keeps twice the bits of `dtype`: rounded, and what that leaves out.
        high = B.to(dtype)
        Q = tl.dot(high, A, Q, input_precision="ieee")  # [BLOCK_RHO, BLOCK_N]
        if dtype != tl.float32:
            Q = tl.dot((B.to(tl.float32) - high.to(tl.float32)).to(dtype), A, Q)
    return Q


@triton.jit(do_not_specialize=["M"])
def _prepare_kernel(
    B_ptr, A_ptr, a_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, x_ptr,
    Q_ptr, q_ptr, Ct_ptr, parts_ptr,
    M, N, D, R, K, RHO, r_max, stride_ar, stride_ad, stride_a, stride_xm, stride_xd,
    BLOCK_RHO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Q = B A (RHO_PAD, D), q = B a (RHO_PAD,) and Ct (RHO_PAD, N), zero where pruned and where padded.

    B (RHO, R), A (R, D), or none and Q = B, a (R,), C (N, r_max). Of few tokens x (M, D) parts (T, M, RHO_PAD), whose
    sum is x Q^T, take the place of Q. Program axis 0 walks over columns of Q, then of Ct, axis 1 over their rows.
    """
    block = tl.program_id(0)
    blocks_Q = tl.cdiv(D if a_ptr is None else D + 1, BLOCK_N)
    offs_rho = tl.program_id(1) * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    dtype: tl.constexpr = Ct_ptr.dtype.element_ty
    if block < blocks_Q:
        offs_d = block * BLOCK_N + tl.arange(0, BLOCK_N)
        d_mask = offs_d < D
        if A_ptr is None:
            B_ptrs = B_ptr + offs_rho.to(tl.int64)[:, None] * R + offs_d[None, :]
            Q = tl.load(B_ptrs, mask=(offs_rho < RHO)[:, None] & d_mask[None, :], other=0.0)  # [BLOCK_RHO, BLOCK_N]
        else:
            Q = _product_BA(
                B_ptr, A_ptr, a_ptr, offs_rho, offs_d, D, R, RHO, stride_ar, stride_ad, stride_a, dtype, BLOCK_R
            )
        if active_ptr is not None:
            Q = tl.where(_column_mask(offs_rho, K, offsets_ptr, active_ptr, None, BLOCK_K)[:, None], Q, 0.0)
        if q_ptr is not None:
            tl.store(q_ptr + offs_rho[:, None] + 0 * offs_d[None, :], Q, mask=(offs_d == D)[None, :])
        if Q_ptr is not None:
            tl.store(Q_ptr + offs_rho.to(tl.int64)[:, None] * D + offs_d[None, :], Q.to(dtype), mask=d_mask[None, :])
        if parts_ptr is not None:
            offs_m = tl.arange(0, BLOCK_M)
            m_mask = (offs_m < M)[:, None]
            x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_d.to(tl.int64)[None, :] * stride_xd
            x = tl.load(x_ptrs, mask=m_mask & d_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_N]
            S = tl.dot(x, tl.trans(Q.to(dtype)), input_precision=PRECISION)  # [BLOCK_M, BLOCK_RHO]
            RHO_PAD = BLOCK_RHO * tl.num_programs(1)
            tl.store(parts_ptr + (block * M + offs_m)[:, None] * RHO_PAD + offs_rho[None, :], S, mask=m_mask)
    else:
        offs_n = (block - blocks_Q) * BLOCK_N + tl.arange(0, BLOCK_N)
        first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
        Ct = _Ct_tile(C_ptr, offs_rho, offs_n, N, first, last, r_max, dtype)  # [BLOCK_RHO, BLOCK_N]
        tl.store(Ct_ptr + offs_rho.to(tl.int64)[:, None] * N + offs_n[None, :], Ct, mask=(offs_n < N)[None, :])


@triton.jit
def _products(
    L_ptr, R_ptr, U_ptr, M, F, E, stride_lm, stride_le, stride_re, stride_rf,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, RHO_PAD: tl.constexpr,
    EVEN_E: tl.constexpr, PRECISION: tl.constexpr, WITH_U: tl.constexpr,
):  # fmt: skip
    """L R of the tile that begins here, M rows by F columns, and, with WITH_U, L U^T, else zeros; L is read once."""
    # A base that moves and offsets in 32 bits that do not: half the registers of pointers.
    offs_e = tl.arange(0, BLOCK_E)
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_f = tl.arange(0, BLOCK_F)[None, :]
    offs_rho = tl.arange(0, RHO_PAD)[None, :]
    L_offs = offs_m * stride_lm + offs_e[None, :] * stride_le
    R_offs = offs_e[:, None] * stride_re + offs_f * stride_rf
    U_offs = offs_e[:, None] + offs_rho * E
    Y = tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    S = tl.zeros((BLOCK_M, RHO_PAD), tl.float32)
    for e in range(0, E, BLOCK_E):
        e_mask = offs_e < E - e if not EVEN_E else offs_e >= 0
        L = tl.load(L_ptr + L_offs, mask=(offs_m < M) & e_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_E]
        R = tl.load(R_ptr + R_offs, mask=(offs_f < F) & e_mask[:, None], other=0.0)  # [BLOCK_E, BLOCK_F]
        Y = tl.dot(L, R, Y, input_precision=PRECISION)
        if WITH_U:
            Ut = tl.load(U_ptr + U_offs, mask=e_mask[:, None] & (offs_rho >= 0), other=0.0)  # [BLOCK_E, RHO_PAD]
            S = tl.dot(L, Ut, S, input_precision=PRECISION)
            U_ptr += BLOCK_E
        L_ptr += BLOCK_E * stride_le
        R_ptr += BLOCK_E * stride_re
    return Y, S


@triton.jit
def _finish_tile(
    Y, S, V_ptr, bias_ptr, Y_ptr, M, F, stride,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, RHO_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y + S V + bias of the tile that begins here, M rows by F columns, stored; rows of V and Y are `stride` apart."""
    offs_m, offs_rho = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, RHO_PAD)[:, None]
    offs_f = tl.arange(0, BLOCK_F)[None, :]
    V = tl.load(V_ptr + (offs_rho * stride + offs_f), mask=(offs_f < F) & (offs_rho >= 0), other=0.0)
    Y = tl.dot(S, V, Y, input_precision=PRECISION)  # [BLOCK_M, BLOCK_F]
    if bias_ptr is not None:
        Y += tl.load(bias_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)
    tl.store(Y_ptr + (offs_m * stride + offs_f), Y.to(Y_ptr.dtype.element_ty), mask=(offs_m < M) & (offs_f < F))


@triton.jit(do_not_specialize=["M", "T", "run"])
def _low_rank_gemm_kernel(
    L_ptr, R_ptr, U_ptr, parts_ptr, u_ptr, V_ptr, bias_ptr, inner_ptr, Y_ptr,
    M, T, run, E, F, columns, stride_lm, stride_le, stride_re, stride_rf,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_E: tl.constexpr, RHO_PAD: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_E: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = L R + (L U^T + u) V + bias; L (M, E), R (E, F), U (RHO_PAD, E), u (RHO_PAD,), V (RHO_PAD, F), Y (M, F).

    Forward: x, W^T, Q, q, Ct and y; for dx: dy, W, Ct, none, Q and dx. The inner product is S, or dS: `columns` of it
    are written to inner (M, columns) where that is wanted.

    A program has `run` tiles of one block of rows, side by side. The first also sums L U^T, or with `parts`
    (T, M, RHO_PAD) adds them up, and the others reuse it from registers.
    """
    chunks = tl.cdiv(tl.cdiv(F, BLOCK_F), run)
    # GROUP_M blocks of rows go together, so that they share R in the L2 cache.
    group = tl.program_id(0) // (GROUP_M * chunks) * GROUP_M
    within = tl.program_id(0) - group * chunks
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group, GROUP_M)
    chunk = within // height
    m = (group + within % height) * BLOCK_M
    first = chunk * run * BLOCK_F
    # From here on everything begins at the tile.
    left = M - m
    L_ptr += m.to(tl.int64) * stride_lm
    R_ptr += first.to(tl.int64) * stride_rf
    V_ptr += first
    Y_ptr += m.to(tl.int64) * F + first
    if bias_ptr is not None:
        bias_ptr += first
    Y, S = _products(
        L_ptr, R_ptr, U_ptr, left, F - first, E, stride_lm, stride_le, stride_re, stride_rf,
        BLOCK_M, BLOCK_F, BLOCK_E, RHO_PAD, EVEN_E, PRECISION, parts_ptr is None,
    )  # fmt: skip
    offs_m = tl.arange(0, BLOCK_M)[:, None]
    offs_rho = tl.arange(0, RHO_PAD)[None, :]
    if parts_ptr is not None:
        parts_ptrs = parts_ptr + (m + offs_m) * RHO_PAD + offs_rho
        S = _sum_of_parts(parts_ptrs, (offs_m < left) & (offs_rho >= 0), T, M * RHO_PAD)
    if u_ptr is not None:
        S += tl.load(u_ptr + offs_rho)
    if inner_ptr is not None:
        if chunk == 0:
            inner_ptrs = inner_ptr + (m.to(tl.int64) + offs_m) * columns + offs_rho
            tl.store(inner_ptrs, S.to(inner_ptr.dtype.element_ty), mask=(offs_m < left) & (offs_rho < columns))
    inner = S.to(L_ptr.dtype.element_ty)
    _finish_tile(Y, inner, V_ptr, bias_ptr, Y_ptr, left, F - first, F, BLOCK_M, BLOCK_F, RHO_PAD, PRECISION)
    for f in range(first + BLOCK_F, tl.minimum(first + run * BLOCK_F, F), BLOCK_F):
        R_ptr += BLOCK_F * stride_rf
        V_ptr += BLOCK_F
        Y_ptr += BLOCK_F
        if bias_ptr is not None:
            bias_ptr += BLOCK_F
        Y, _ = _products(
            L_ptr, R_ptr, None, left, F - f, E, stride_lm, stride_le, stride_re, stride_rf,
            BLOCK_M, BLOCK_F, BLOCK_E, RHO_PAD, EVEN_E, PRECISION, False,
        )  # fmt: skip
        _finish_tile(Y, inner, V_ptr, bias_ptr, Y_ptr, left, F - f, F, BLOCK_M, BLOCK_F, RHO_PAD, PRECISION)


@triton.jit
def _token_product(
    z_ptr, s_ptr, parts_ptr, block, M, Z, width, columns, stride_zm, stride_zz,
    BLOCK_M: tl.constexpr, BLOCK_Z: tl.constexpr, RHO_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """parts[t] = z^T s over `width` tokens, those of split t; z (M, Z), s (M, columns), parts (T, Z, RHO_PAD)."""
    split = tl.program_id(1)
    offs_z = block * BLOCK_Z + tl.arange(0, BLOCK_Z)
    offs_rho = tl.arange(0, RHO_PAD)
    z_mask, rho_mask = offs_z < Z, offs_rho < columns
    part = tl.zeros((BLOCK_Z, RHO_PAD), tl.float32)
    for m in range(split * width, tl.minimum(split * width + width, M), BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)
        m_mask = offs_m < M
        z_ptrs = z_ptr + offs_m[:, None] * stride_zm + offs_z.to(tl.int64)[None, :] * stride_zz
        z = tl.load(z_ptrs, mask=m_mask[:, None] & z_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_Z]
        s_ptrs = s_ptr + offs_m[:, None] * columns + offs_rho[None, :]
        s = tl.load(s_ptrs, mask=m_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_M, RHO_PAD]
        part = tl.dot(tl.trans(z), s.to(z.dtype), part, input_precision=PRECISION)
    parts_ptrs = parts_ptr + (split.to(tl.int64) * Z + offs_z)[:, None] * RHO_PAD + offs_rho[None, :]
    tl.store(parts_ptrs, part, mask=z_mask[:, None])


@triton.jit(do_not_specialize=["M", "width"])
def _token_products_kernel(
    dy_ptr, S_ptr, dy_parts_ptr, z_ptr, dS_ptr, z_parts_ptr,
    M, width, N, Z, RHO, stride_dym, stride_dyn, stride_zm, stride_zz,
    BLOCK_M: tl.constexpr, BLOCK_Z: tl.constexpr, RHO_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Parts of dy^T S (N, RHO_PAD) and of z^T dS (Z, RHO_PAD), z being P, or x where there is no basis.

    dy (M, N), S (M, RHO), z (M, Z), dS (M, RHO_PAD). Program axis 0 walks over columns of dy, then of z, axis 1 over
    splits of the tokens.
    """
    block = tl.program_id(0)
    blocks_dy = 0 if dy_parts_ptr is None else tl.cdiv(N, BLOCK_Z)
    if block < blocks_dy:
        if dy_parts_ptr is not None:
            _token_product(
                dy_ptr, S_ptr, dy_parts_ptr, block, M, N, width, RHO, stride_dym, stride_dyn,
                BLOCK_M, BLOCK_Z, RHO_PAD, PRECISION,
            )  # fmt: skip
    else:
        if z_parts_ptr is not None:
            _token_product(
                z_ptr, dS_ptr, z_parts_ptr, block - blocks_dy, M, Z, width, RHO_PAD, stride_zm, stride_zz,
                BLOCK_M, BLOCK_Z, RHO_PAD, PRECISION,
            )  # fmt: skip


@triton.jit
def _finish_dC(
    block, parts_ptr, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr, dC_ptr, T, N, r_max, stride,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """dC[i, j] = sum_t parts[t, i, off_k(i) + j]; parts (T, N, stride)."""
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = tl.arange(0, BLOCK_J)
    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr)
    column = first[:, None] + offs_j[None, :]  # [BLOCK_N, BLOCK_J]
    ptrs = parts_ptr + offs_n.to(tl.int64)[:, None] * stride + column
    dC = _sum_of_parts(ptrs, column < last[:, None], T, N * stride)
    dC_ptrs = dC_ptr + offs_n.to(tl.int64)[:, None] * r_max + offs_j[None, :]
    tl.store(dC_ptrs, dC.to(dC_ptr.dtype.element_ty), mask=(offs_n < N)[:, None] & (offs_j < r_max)[None, :])


@triton.jit
def _finish_dB(
    block, parts_ptr, offsets_ptr, active_ptr, trainable_ptr, dB_ptr, T, R, K, RHO, stride,
    BLOCK_R: tl.constexpr, BLOCK_RHO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dB = (sum_t parts[t])^T; parts (T, R, stride)."""
    blocks_rho = tl.cdiv(RHO, BLOCK_RHO)
    offs_r = block // blocks_rho * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_rho = block % blocks_rho * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    r_mask = (offs_r < R)[:, None]
    on = _column_mask(offs_rho, K, offsets_ptr, active_ptr, trainable_ptr, BLOCK_K)
    ptrs = parts_ptr + offs_r.to(tl.int64)[:, None] * stride + offs_rho[None, :]
    dB = _sum_of_parts(ptrs, r_mask & on[None, :], T, R * stride)  # [BLOCK_R, BLOCK_RHO]
    dB_ptrs = dB_ptr + offs_rho.to(tl.int64)[None, :] * R + offs_r[:, None]
    tl.store(dB_ptrs, dB.to(dB_ptr.dtype.element_ty), mask=r_mask & (offs_rho < RHO)[None, :])


@triton.jit(do_not_specialize=["T"])
def _finish_kernel(
    row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr, dy_parts_ptr, z_parts_ptr, dC_ptr, dB_ptr,
    T, N, R, K, RHO, r_max, stride_dy, stride_z,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_RHO: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dC (N, r_max) and dB (RHO, R) from parts of dy^T S and z^T dS, zero where not active and trainable.

    Programs walk over rows of dC, then over dB.
    """
    block = tl.program_id(0)
    blocks_dC = 0 if dC_ptr is None else tl.cdiv(N, BLOCK_N)
    if block < blocks_dC:
        if dC_ptr is not None:
            _finish_dC(
                block, dy_parts_ptr, row_subspace_ptr, offsets_ptr, active_ptr, trainable_ptr, dC_ptr,
                T, N, r_max, stride_dy, BLOCK_N, BLOCK_J,
            )  # fmt: skip
    else:
        if dB_ptr is not None:
            _finish_dB(
                block - blocks_dC, z_parts_ptr, offsets_ptr, active_ptr, trainable_ptr, dB_ptr,
                T, R, K, RHO, stride_z, BLOCK_N, BLOCK_RHO, BLOCK_K,
            )  # fmt: skip

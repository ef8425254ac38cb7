"""The device kernels; letters as in docs/notation.md, launchers of the same names in `launch.py`.

A subspace mask enters as the span of columns `[first, last)` of S that an output row reads: where its subspace is
masked out the span is empty, so the row's column of C^T is zero and a tile without any span is skipped. Optional
pointers are None at compile time. Sums are float32; offsets into memory are int64.
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
    """on[c] = mask[k] & mask2[k] for the k with off_k <= c < off_k+1."""
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
def _Ct_tile(C_ptr, offs_rho, offs_n, first, last, r_max, dtype: tl.constexpr):
    """Ct[first[i] + j, i] = C[i, j] for first[i] + j < last[i], else 0: block-diagonal (RHO, N)."""
    Ct = tl.zeros((offs_rho.shape[0], offs_n.shape[0]), dtype)  # [BLOCK_RHO, BLOCK_N]
    C_ptrs = C_ptr + offs_n.to(tl.int64) * r_max  # [BLOCK_N]
    # Placed entry by entry: a tile of pointers would take more registers than the accumulator leaves.
    for j in range(r_max):
        column = first + j
        C = tl.load(C_ptrs + j, mask=column < last, other=0.0).to(dtype)  # [BLOCK_N]
        Ct = tl.where(offs_rho[:, None] == column[None, :], C[None, :], Ct)
    return Ct


@triton.jit
def _reads(first, last, start, BLOCK_RHO: tl.constexpr):
    """Whether any row of the tile reads a column in [start, start + BLOCK_RHO)."""
    return tl.max(((first < last) & (first < start + BLOCK_RHO) & (last > start)).to(tl.int32), 0) > 0


@triton.jit
def _tile_id(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile; GROUP_M rows of tiles go together, so that they share W in the L2."""
    pid = tl.program_id(0)
    num_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * num_n)
    size = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP_M, GROUP_M)
    within = pid - group * GROUP_M * num_n
    return group * GROUP_M + within % size, within // size


@triton.jit
def _add_product(
    acc, l_ptrs, r_ptrs, l_mask, r_mask, D, stride_ld, stride_rd,
    BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + L R for a tile of rows of L (M, D) and a tile of columns of R (D, N)."""
    offs_d = tl.arange(0, BLOCK_D)
    for d in range(0, D, BLOCK_D):
        d_mask = offs_d < D - d if not EVEN_D else offs_d >= 0
        L = tl.load(l_ptrs, mask=l_mask[:, None] & d_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        R = tl.load(r_ptrs, mask=d_mask[:, None] & r_mask[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        acc = tl.dot(L, R, acc, input_precision=PRECISION)
        l_ptrs += BLOCK_D * stride_ld
        r_ptrs += BLOCK_D * stride_rd
    return acc


@triton.jit
def _input_projection_kernel(
    B_ptr, A_ptr, a_ptr, offsets_ptr, active_ptr, Q_ptr, q_ptr,
    K, D, R, RHO, stride_ar, stride_ad, stride_a,
    BLOCK_RHO: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[Q | q] = B [A | a], zero where the column's subspace is pruned; B (RHO, R), A (R, D), a (R,), Q (RHO, D)."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_rho = tl.program_id(1) * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    acc = tl.zeros((BLOCK_RHO, BLOCK_D), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        r_mask = offs_r < R
        B_mask = (offs_rho < RHO)[:, None] & r_mask[None, :]
        B = tl.load(B_ptr + offs_rho[:, None] * R + offs_r[None, :], mask=B_mask, other=0.0)  # [BLOCK_RHO, BLOCK_R]
        A_ptrs = A_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + offs_d.to(tl.int64)[None, :] * stride_ad
        A = tl.load(A_ptrs, mask=r_mask[:, None] & (offs_d < D)[None, :], other=0.0)  # [BLOCK_R, BLOCK_D]
        A = A.to(tl.float32)
        if a_ptr is not None:
            a = tl.load(a_ptr + offs_r.to(tl.int64) * stride_a, mask=r_mask, other=0.0)  # [BLOCK_R]
            A = tl.where((offs_d == D)[None, :], a.to(tl.float32)[:, None], A)
        # The parameters' own precision counts here, and the product is tiny: no tf32.
        acc = tl.dot(B.to(tl.float32), A, acc, input_precision="ieee")  # [BLOCK_RHO, BLOCK_D]
    if active_ptr is not None:
        on = _column_mask(offs_rho, K, offsets_ptr, active_ptr, None, BLOCK_K)
        acc = tl.where(on[:, None], acc, 0.0)
    rho_mask = (offs_rho < RHO)[:, None]
    Q_ptrs = Q_ptr + offs_rho.to(tl.int64)[:, None] * D + offs_d[None, :]
    tl.store(Q_ptrs, acc.to(Q_ptr.dtype.element_ty), mask=rho_mask & (offs_d < D)[None, :])
    if a_ptr is not None:
        q_ptrs = q_ptr + offs_rho[:, None] + 0 * offs_d[None, :]
        tl.store(q_ptrs, acc, mask=rho_mask & (offs_d == D)[None, :])


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    x_ptr, Q_ptr, q_ptr, A_ptr, a_ptr, S_ptr, P_ptr,
    M, D, R, RHO, split_size, stride_xm, stride_xd, stride_ar, stride_ad, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_RHO: tl.constexpr,
    EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S = x Q^T + q and P = x A^T + a; x (M, D), Q (RHO, D), A (R, D), S (M, RHO), P (M, R).

    Program axis 1 walks over column blocks of S and P side by side, axis 2 over splits of D: split t covers
    `split_size` columns and writes its own partial S[t], P[t].
    """
    split = tl.program_id(2)
    start = split * split_size
    end = tl.minimum(start + split_size, D)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_rho = tl.program_id(1) * BLOCK_RHO + tl.arange(0, BLOCK_RHO)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_mask, rho_mask, r_mask = offs_m < M, offs_rho < RHO, offs_r < R
    from_d = (start + offs_d).to(tl.int64)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + from_d[None, :] * stride_xd
    Q_ptrs = Q_ptr + offs_rho.to(tl.int64)[None, :] * D + from_d[:, None]
    A_ptrs = A_ptr + offs_r.to(tl.int64)[None, :] * stride_ar + from_d[:, None] * stride_ad
    S = tl.zeros((BLOCK_M, BLOCK_RHO), tl.float32)
    P = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for d in range(start, end, BLOCK_D):
        d_mask = offs_d < D - d if not EVEN_D else offs_d >= 0
        x = tl.load(x_ptrs, mask=m_mask[:, None] & d_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        Qt = tl.load(Q_ptrs, mask=d_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_D, BLOCK_RHO]
        S = tl.dot(x, Qt, S, input_precision=PRECISION)
        if P_ptr is not None:
            At = tl.load(A_ptrs, mask=d_mask[:, None] & r_mask[None, :], other=0.0)  # [BLOCK_D, BLOCK_R]
            P = tl.dot(x, At.to(x.dtype), P, input_precision=PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        Q_ptrs += BLOCK_D
        A_ptrs += BLOCK_D * stride_ad
    out_m = (split.to(tl.int64) * M + offs_m)[:, None]
    # Everything is linear, so one split adds the constant terms.
    if q_ptr is not None:
        if split == 0:
            S += tl.load(q_ptr + offs_rho, mask=rho_mask, other=0.0)[None, :]
    tl.store(S_ptr + out_m * RHO + offs_rho[None, :], S, mask=m_mask[:, None] & rho_mask[None, :])
    if P_ptr is not None:
        if a_ptr is not None:
            if split == 0:
                a = tl.load(a_ptr + offs_r.to(tl.int64) * stride_a, mask=r_mask, other=0.0)  # [BLOCK_R]
                P += a.to(tl.float32)[None, :]
        P_ptrs = P_ptr + out_m * R + offs_r[None, :]
        tl.store(P_ptrs, P.to(P_ptr.dtype.element_ty), mask=m_mask[:, None] & r_mask[None, :])


@triton.jit
def _fused_products(
    x_ptrs, W_ptrs, Q_ptrs, A_ptrs, m_mask, n_mask, rho_mask, r_mask, start, end, D, stride_xd, stride_wd, stride_ad,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_RHO: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    WITH_S: tl.constexpr, WITH_P: tl.constexpr,
):  # fmt: skip
    """x W^T, x Q^T and x A^T over columns [start, end) of x, read once; what is not asked for is zero."""
    offs_d = tl.arange(0, BLOCK_D)
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    S = tl.zeros((BLOCK_M, BLOCK_RHO), tl.float32)
    P = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for d in range(start, end, BLOCK_D):
        d_mask = offs_d < D - d if not EVEN_D else offs_d >= 0
        x = tl.load(x_ptrs, mask=m_mask[:, None] & d_mask[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
        Wt = tl.load(W_ptrs, mask=d_mask[:, None] & n_mask[None, :], other=0.0)  # [BLOCK_D, BLOCK_N]
        y = tl.dot(x, Wt, y, input_precision=PRECISION)
        if WITH_S:
            Qt = tl.load(Q_ptrs, mask=d_mask[:, None] & rho_mask[None, :], other=0.0)  # [BLOCK_D, BLOCK_RHO]
            S = tl.dot(x, Qt, S, input_precision=PRECISION)
        if WITH_P:
            At = tl.load(A_ptrs, mask=d_mask[:, None] & r_mask[None, :], other=0.0)  # [BLOCK_D, BLOCK_R]
            P = tl.dot(x, At.to(x.dtype), P, input_precision=PRECISION)
        x_ptrs += BLOCK_D * stride_xd
        W_ptrs += BLOCK_D * stride_wd
        Q_ptrs += BLOCK_D
        A_ptrs += BLOCK_D * stride_ad
    return y, S, P


@triton.jit(do_not_specialize=["M"])
def _linear_fwd_kernel(
    x_ptr, W_ptr, bias_ptr, Q_ptr, q_ptr, A_ptr, a_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr,
    y_ptr, S_ptr, P_ptr,
    M, N, D, R, RHO, r_max, split_size, stride_xm, stride_xd, stride_wn, stride_wd, stride_ar, stride_ad, stride_a,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_RHO: tl.constexpr, GROUP_M: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias + S Ct with S = x Q^T + q, in one pass over x; y (M, N), S (M, RHO), P = x A^T + a (M, R).

    BLOCK_RHO covers RHO. The tile in column n writes slice n of P, BLOCK_R wide, since it has x in hand anyway; the
    one in column 0 writes S. Program axis 1 splits D: split t adds `split_size` columns and writes its own y[t].
    """
    pid_m, pid_n = _tile_id(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    split = tl.program_id(1)
    start = split * split_size
    end = tl.minimum(start + split_size, D)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_rho = tl.arange(0, BLOCK_RHO)
    offs_r = pid_n * BLOCK_R + tl.arange(0, BLOCK_R)
    m_mask, n_mask, rho_mask, r_mask = offs_m < M, offs_n < N, offs_rho < RHO, offs_r < R
    from_d = (start + offs_d).to(tl.int64)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + from_d[None, :] * stride_xd
    W_ptrs = W_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + from_d[:, None] * stride_wd
    Q_ptrs = Q_ptr + offs_rho.to(tl.int64)[None, :] * D + from_d[:, None]
    A_ptrs = A_ptr + offs_r.to(tl.int64)[None, :] * stride_ar + from_d[:, None] * stride_ad

    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
    reads_S = _reads(first, last, 0, BLOCK_RHO)
    if S_ptr is not None:
        reads_S = reads_S | (pid_n == 0)
    if reads_S:
        y, S, P = _fused_products(
            x_ptrs, W_ptrs, Q_ptrs, A_ptrs, m_mask, n_mask, rho_mask, r_mask, start, end, D, stride_xd, stride_wd,
            stride_ad, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_RHO, EVEN_D, PRECISION, True, P_ptr is not None,
        )  # fmt: skip
    else:
        y, S, P = _fused_products(
            x_ptrs, W_ptrs, Q_ptrs, A_ptrs, m_mask, n_mask, rho_mask, r_mask, start, end, D, stride_xd, stride_wd,
            stride_ad, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_RHO, EVEN_D, PRECISION, False, P_ptr is not None,
        )  # fmt: skip

    # Everything is linear, so one split adds the constant terms.
    if q_ptr is not None:
        if split == 0:
            S += tl.load(q_ptr + offs_rho, mask=rho_mask, other=0.0)[None, :]
    if S_ptr is not None:
        if pid_n == 0:
            S_ptrs = S_ptr + offs_m.to(tl.int64)[:, None] * RHO + offs_rho[None, :]
            tl.store(S_ptrs, S, mask=m_mask[:, None] & rho_mask[None, :])
    if P_ptr is not None:
        if a_ptr is not None:
            a = tl.load(a_ptr + offs_r.to(tl.int64) * stride_a, mask=r_mask, other=0.0)  # [BLOCK_R]
            P += a.to(tl.float32)[None, :]
        P_ptrs = P_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
        tl.store(P_ptrs, P.to(P_ptr.dtype.element_ty), mask=m_mask[:, None] & r_mask[None, :])
    if reads_S:
        # Found again rather than kept in registers over the loop.
        first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
        dtype = x_ptr.dtype.element_ty
        Ct = _Ct_tile(C_ptr, offs_rho, offs_n, first, last, r_max, dtype)  # [BLOCK_RHO, BLOCK_N]
        y = tl.dot(S.to(dtype), Ct, y, input_precision=PRECISION)
    if bias_ptr is not None:
        if split == 0:
            y += tl.load(bias_ptr + offs_n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    y_ptrs = y_ptr + (split.to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit(do_not_specialize=["M"])
def _linear_from_s_kernel(
    x_ptr, W_ptr, bias_ptr, S_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, y_ptr,
    M, N, D, RHO, r_max, stride_xm, stride_xd, stride_wn, stride_wd,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_RHO: tl.constexpr,
    GROUP_M: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = S Ct + bias + x W^T, the accumulator starting from the update; S (M, RHO), x (M, D), W (N, D), y (M, N)."""
    pid_m, pid_n = _tile_id(M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    m_mask, n_mask = offs_m < M, offs_n < N
    y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    y = _add_update(
        y, S_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, offs_m, offs_n, M, N, RHO, r_max,
        x_ptr.dtype.element_ty, BLOCK_RHO, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_d[None, :] * stride_xd
    W_ptrs = W_ptr + offs_n.to(tl.int64)[None, :] * stride_wn + offs_d[:, None] * stride_wd
    y = _add_product(y, x_ptrs, W_ptrs, m_mask, n_mask, D, stride_xd, stride_wd, BLOCK_D, EVEN_D, PRECISION)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _add_update(
    y, S_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, offs_m, offs_n, M, N, RHO, r_max,
    dtype: tl.constexpr, BLOCK_RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y + S Ct, a block of columns of S at a time; blocks that no active row of the tile reads are skipped."""
    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
    for start in range(0, RHO, BLOCK_RHO):
        if _reads(first, last, start, BLOCK_RHO):
            offs_rho = start + tl.arange(0, BLOCK_RHO)
            S_mask = (offs_m < M)[:, None] & (offs_rho < RHO)[None, :]
            S_ptrs = S_ptr + offs_m.to(tl.int64)[:, None] * RHO + offs_rho[None, :]
            S = tl.load(S_ptrs, mask=S_mask, other=0.0)  # [BLOCK_M, BLOCK_RHO]
            Ct = _Ct_tile(C_ptr, offs_rho, offs_n, first, last, r_max, dtype)  # [BLOCK_RHO, BLOCK_N]
            y = tl.dot(S.to(dtype), Ct, y, input_precision=PRECISION)
    return y


@triton.jit(do_not_specialize=["M"])
def _delta_fwd_kernel(
    y_ptr, S_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, M, N, RHO, r_max,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_RHO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y += S Ct in place; y (M, N), S (M, RHO). A tile without an active row is neither read nor written."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = _row_span(offs_n, N, row_subspace_ptr, offsets_ptr, active_ptr, None)
    if _reads(first, last, 0, RHO):
        y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        y_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
        y = tl.load(y_ptrs, mask=y_mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N]
        y = _add_update(
            y, S_ptr, C_ptr, row_subspace_ptr, offsets_ptr, active_ptr, offs_m, offs_n, M, N, RHO, r_max,
            y_ptr.dtype.element_ty, BLOCK_RHO, PRECISION,
        )  # fmt: skip
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=y_mask)


@triton.jit
def _sum_over_parts(parts_ptr, offs, mask, T, E):
    """sum_t parts[t] at `offs` where `mask`, else 0; parts (T, E)."""
    # Of hundreds of parts, one by one, each would wait for the load of the last and round the whole sum.
    total = tl.zeros(offs.shape, tl.float32)
    for _ in range(T // 8):
        eight = tl.zeros(offs.shape, tl.float32)
        for _ in tl.static_range(8):
            eight += tl.load(parts_ptr + offs, mask=mask, other=0.0)
            parts_ptr += E
        total += eight
    for _ in range(T % 8):
        total += tl.load(parts_ptr + offs, mask=mask, other=0.0)
        parts_ptr += E
    return total


@triton.jit
def _sum_parts_kernel(parts_ptr, total_ptr, T, E, BLOCK_E: tl.constexpr):
    """total = sum_t parts[t]; parts (T, E), total (E,)."""
    offs_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    e_mask = offs_e < E
    total = _sum_over_parts(parts_ptr, offs_e, e_mask, T, E)
    tl.store(total_ptr + offs_e, total.to(total_ptr.dtype.element_ty), mask=e_mask)

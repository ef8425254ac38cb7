"""The fused CUDA backend for Hopper GPUs without one: what its kernels around wgmma prepare and finish, as host C++."""

from __future__ import annotations

import ctypes

import pytest
import torch

from adamss_kernels import SubspaceLayout, ops
from adamss_kernels.cuda import hopper
from adamss_kernels.layout import block_diagonal, column_mask, gather_index

CASES = {
    "30 columns of S": {"M": 70, "D": 40, "N": 300, "R": 100, "ranks": (3,) * 10},
    "more than 32 columns with the bias": {"M": 9, "D": 40, "N": 70, "R": 100, "ranks": (1,) * 32},
    "60 columns of S": {"M": 9, "D": 31, "N": 257, "R": 129, "ranks": (5,) * 12},
    "rank beyond what is loaded ahead": {"M": 3, "D": 33, "N": 64, "R": 5, "ranks": (9, 1, 16)},
    "one subspace": {"M": 1, "D": 1, "N": 16, "R": 1, "ranks": (1,)},
    "more of R than one step": {"M": 5, "D": 70, "N": 24, "R": 300, "ranks": (2, 1, 3)},
}
MASKS = ["", "active", "trainable", "both"]


@pytest.fixture
def watch(twin):
    """Say where the next fused calls prepare into: Q, q, C^T, S, P; which parts they finish; and where G is."""
    function = twin.functions.twin_watch
    function.argtypes = (*(ctypes.c_void_p,) * 8, ctypes.c_int64, ctypes.c_void_p)

    def call(*tensors, splits=0, G=None):
        function(*(t if t is None else t.data_ptr() for t in tensors), splits, G if G is None else G.data_ptr())

    yield call
    call(*(None,) * 8)


@pytest.fixture(params=CASES)
def case(request):
    sizes = CASES[request.param]
    M, D, N, R, ranks = (sizes[name] for name in ("M", "D", "N", "R", "ranks"))
    K, bf16 = len(ranks), torch.bfloat16
    rows = torch.cat((torch.arange(K), torch.randint(0, K, (N - K,)))).to(torch.int32)
    return {
        "x": torch.randn(M, D).to(bf16),
        "weight": torch.randn(N, D).to(bf16),
        "bias": torch.randn(N).to(bf16),
        "basis": torch.randn(R, D + 1).to(bf16)[:, :D],
        "basis_bias": torch.randn(R).to(bf16),
        "B": torch.randn(sum(ranks), R),
        "C": torch.randn(N, max(ranks)),
        "layout": SubspaceLayout(rows, ranks),
    }


def masks(name, K):
    active = torch.arange(K) % 3 != 1 if name in ("active", "both") else None
    trainable = torch.arange(K) % 2 == 0 if name in ("trainable", "both") else None
    return active, trainable


def operands(case, mask, with_basis=True):
    """weight, bias, B, C, basis and a, row map, offsets, active and trainable."""
    layout = case["layout"]
    basis, a = (case["basis"], case["basis_bias"]) if with_basis else (None, None)
    B = case["B"] if with_basis else torch.randn(layout.rho, case["x"].shape[1])
    rows = layout.row_subspace, layout.offsets, *masks(mask, layout.num_subspaces)
    return case["weight"], case["bias"], B, case["C"], basis, a, rows


def nan(*shape, dtype=torch.bfloat16):
    return torch.full(shape, torch.nan, dtype=dtype)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("with_basis", [True, False], ids=["basis", "no basis"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_prepare_pads_projects_and_masks(twin, watch, case, mask, with_basis, direction):
    M, D, N = *case["x"].shape, case["weight"].shape[0]
    layout, rho = case["layout"], case["layout"].rho
    weight, bias, B, C, basis, a, rows = operands(case, mask, with_basis)
    R, forward = B.shape[1], direction == "forward"
    padded = -(-(rho + forward) // 32) * 32  # a bias takes one more
    S, P = torch.randn(M, rho), torch.randn(M, R).to(torch.bfloat16)
    Q, Ct, S_, P_ = nan(padded, D), nan(padded, N), nan(M, padded), nan(M, -(-R // 8) * 8)
    q = nan(padded, dtype=torch.float32)
    watch(Q, q, Ct, S_, P_, None, None, None)
    if forward:
        twin.library.fused_forward(case["x"], weight, bias, B, C, basis, a, *rows[:3], True)
    else:
        dy = torch.randn(M, N).to(torch.bfloat16)
        twin.library.fused_backward(dy, None, S, P, weight, B, C, basis, a, *rows, True, True)
        assert torch.equal(S_[:, :rho], S.to(torch.bfloat16))
        assert not S_[:, rho:].any()
        assert torch.equal(P_[:, :R], P)
        assert not P_[:, R:].any()
    active = rows[2]
    on = torch.ones(rho, dtype=torch.bool) if active is None else column_mask(active, layout.offsets, rho)
    exact_Q = (B @ case["basis"].float() if with_basis else B) * on[:, None]
    assert torch.allclose(Q[:rho].float(), exact_Q, rtol=2**-7, atol=1e-3)
    assert not Q[rho:].any()
    exact_q = B @ case["basis_bias"].float() * on if with_basis else torch.zeros(rho)
    assert torch.allclose(q[:rho], exact_q, rtol=1e-5, atol=1e-4)
    exact_Ct = block_diagonal(case["C"], layout.row_subspace, layout.offsets, rho) * on[:, None]
    assert torch.equal(Ct[:rho], exact_Ct.to(torch.bfloat16))
    if forward:
        assert q[rho:].tolist() == [1.0] + [0.0] * (padded - rho - 1)
        assert torch.equal(Ct[rho], case["bias"])
    assert not Ct[rho + forward :].any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("through_x", [True, False], ids=["x", "P"])
def test_finish_adds_parts_and_masks(twin, watch, case, mask, through_x):
    M, D, N = *case["x"].shape, case["weight"].shape[0]
    layout, rho = case["layout"], case["layout"].rho
    weight, _, B, C, basis, a, rows = operands(case, mask)
    R, padded, splits = B.shape[1], -(-rho // 32) * 32, 11
    Z = D if through_x else R
    dy_parts, z_parts, sums = (torch.randn(splits, *shape) for shape in ((N, padded), (Z, padded), (padded,)))
    G = nan(D + 1, padded, dtype=torch.float32)
    watch(*(None,) * 5, dy_parts, z_parts, sums, splits=splits, G=G)
    x, P = (case["x"], None) if through_x else (None, torch.randn(M, R).to(torch.bfloat16))
    dy, S = torch.randn(M, N).to(torch.bfloat16), torch.randn(M, rho)
    _, dB, dC = twin.library.fused_backward(dy, x, S, P, weight, B, C, basis, a, *rows, True, True)
    learns = torch.ones(layout.num_subspaces, dtype=torch.bool)
    for m in rows[2:]:
        learns &= True if m is None else m
    columns = column_mask(learns, layout.offsets, rho)
    dense = dy_parts.sum(0)[:, :rho].double() * columns
    dense = torch.cat((dense, dense.new_zeros(N, 1)), 1)
    exact_dC = dense.gather(1, gather_index(layout.row_subspace, layout.offsets, dC.shape[1]))
    torch.testing.assert_close(dC.double(), exact_dC, rtol=1e-5, atol=1e-5)
    exact_dB = z_parts.double().sum(0).T[:rho]
    if through_x:
        g = sums.double().sum(0)[:rho]
        exact_dB = exact_dB @ case["basis"].double().T + torch.outer(g, case["basis_bias"].double())
    torch.testing.assert_close(dB.double(), exact_dB * columns[:, None], rtol=1e-4, atol=1e-3)


def test_auto_takes_the_fused_kernels_on_hopper_from_65_tokens_on(monkeypatch):
    def choose(dtype, has_few_tokens=False):
        return ops.choose_backend("auto", torch.device("cuda"), dtype, has_few_tokens)

    monkeypatch.delenv("ADAMSS_BACKEND", raising=False)
    monkeypatch.setattr(ops, "_chosen", ops._chosen.__wrapped__)
    for name in ("triton", "cuda"):
        monkeypatch.setattr(ops.implementation(name), "why_unavailable", lambda device_type=None, dtype=None: None)
    monkeypatch.setattr(hopper, "is_here", lambda: True)
    assert [choose(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)] == ["cuda", "cuda", "triton"]
    assert choose(torch.bfloat16, has_few_tokens=True) == "triton"
    monkeypatch.setattr(hopper, "is_here", lambda: False)
    assert choose(torch.bfloat16) == "triton"


def test_what_the_fused_kernels_cannot_read_goes_around_cublas(monkeypatch):
    monkeypatch.setattr(hopper, "_is_hopper", lambda _: True)
    x, weight = torch.zeros(128, 64, dtype=torch.bfloat16), torch.zeros(48, 64, dtype=torch.bfloat16)
    bias = torch.zeros(48)
    assert hopper.takes(x, weight, 30, bias)
    assert hopper.takes(x, weight, 64)
    refused = {
        "64 columns of S and the bias": (x, weight, 64, bias),
        "few tokens": (x[:64], weight, 30, bias),
        "float32": (x.float(), weight, 30, bias),
        "rows that start anywhere": (torch.zeros(128, 65, dtype=torch.bfloat16)[:, 1:], weight, 30, bias),
        "columns first": (x, weight.T.contiguous().T, 30, bias),
        "an odd width": (x, torch.zeros(44, 64, dtype=torch.bfloat16), 30, None),
        "one row for all": (x[:1].expand(128, 64), weight, 30, bias),
    }
    for what, operands in refused.items():
        assert not hopper.takes(*operands), what

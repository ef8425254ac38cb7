"""The CUDA backend without a GPU: its own kernels as host C++ (tests/cuda_twin), and their launches."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from pathlib import Path

import pytest
import torch
from accuracy import naive, relative_error
from conftest import make_problem
from torch import nn

from adamss_kernels import adamss_linear, cuda, ops
from adamss_kernels.compiled import cuda_library
from adamss_kernels.layout import block_diagonal, column_mask
from adamss_kernels.subspaces import Subspaces

ROOT = Path(__file__).parent.parent
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
STATUS_INVALID_CONFIGURATION = 9


SHAPES = {
    "tiny": {"M": 1, "D": 3, "N": 2, "R": 2, "ranks": (1, 1)},
    "rows of whole packs": {"M": 70, "D": 24, "N": 272, "R": 8, "ranks": (3,) * 5},
    "nothing divides": {"M": 67, "D": 37, "N": 301, "R": 9, "ranks": (2, 1, 3)},
    "one subspace": {"M": 35, "D": 20, "N": 40, "R": 6, "ranks": (2,)},
    "rank over the four columns of one thread": {"M": 9, "D": 16, "N": 48, "R": 20, "ranks": (9, 1, 16)},
    "more columns of S than a block has": {"M": 3, "D": 30, "N": 150, "R": 12, "ranks": (7,) * 20},
    "more columns of S than shared memory has": {"M": 3, "D": 4, "N": 64, "R": 3, "ranks": (60,) * 64},
    "more subspaces than lanes": {"M": 4, "D": 8, "N": 90, "R": 5, "ranks": (1, 2) * 20},
}
MASKS_AND_MODES = [
    ("", "projection"),
    ("", "input"),
    ("active", "projection"),
    ("trainable", "input"),
    ("both", "projection"),
    ("both", "input"),
    ("none", "projection"),
]


def masks(name, K):
    active = torch.arange(K) % 3 != 1 if name in ("active", "both") else None
    trainable = torch.arange(K) % 2 == 0 if name in ("trainable", "both") else None
    return (torch.zeros(K, dtype=torch.bool), None) if name == "none" else (active, trainable)


CASES = [
    (shape, dtype, mask, mode)
    for shape, dtype, (mask, mode) in itertools.product(SHAPES, DTYPES, MASKS_AND_MODES)
    # Large, and there for the form without shared memory alone.
    if not (shape == "more columns of S than shared memory has" and mask)
]


@pytest.mark.parametrize(("shape", "dtype", "mask", "mode"), CASES)
def test_the_kernels_keep_the_numerics_contract(twin, shape, dtype, mask, mode):
    """Errors of y and of every gradient are at most twice plain PyTorch's plus one rounding; masks are obeyed."""
    dtype, sizes = DTYPES[dtype], SHAPES[shape]
    acc = torch.promote_types(dtype, torch.float32)
    problem = make_problem(**sizes).to(dtype, acc)
    exact, plain = problem.to(torch.float64), problem.to(dtype)
    layout = problem.layout
    K = layout.num_subspaces
    active, trainable = masks(mask, K)
    dy = torch.randn(sizes["M"], sizes["N"]).to(dtype)

    options = {"active": active, "trainable": trainable, "save_for_backward": mode, "backend": "cuda"}
    y = adamss_linear(*problem.operands, **options)
    y.backward(dy)
    y_exact, y_plain = (fast_formula(p, active) for p in (exact, plain))
    y_exact.backward(dy.double())
    y_plain.backward(dy)
    # Against itself float64 has no exact answer: there, a rounding for each term of the longest sum.
    terms = sum(sizes[letter] for letter in "MDNR") if dtype == torch.float64 else 1
    unit = terms * torch.finfo(dtype).eps / 2
    assert relative_error(y, y_exact) <= 2 * relative_error(y_plain, y_exact) + unit
    learns = torch.ones(K, dtype=torch.bool) if trainable is None else trainable
    keep_B = learns.repeat_interleave(torch.tensor(layout.ranks))[:, None]
    keep_C = learns[layout.row_subspace.long()][:, None]
    for name, keep in (("x", True), ("B", keep_B), ("C", keep_C)):
        got, want, base = (getattr(p, name).grad for p in (problem, exact, plain))
        if not (want * keep).any():
            assert not got.any(), name
            continue
        error, allowed = relative_error(got, want * keep), 2 * relative_error(base * keep, want * keep) + unit
        assert error <= allowed, (name, error, allowed)


def fast_formula(problem, active):
    """`naive` as three products, for shapes where its Python loop would take long."""
    x, weight, bias, basis, basis_bias, B, C, layout = problem.operands
    S = (x @ basis.T + basis_bias) @ B.T
    if active is not None:
        S = S * column_mask(active, layout.offsets, layout.rho)
    Ct = block_diagonal(C, layout.row_subspace, layout.offsets, layout.rho)
    return x @ weight.T + bias + S @ Ct.to(x.dtype)


def test_the_formula_of_these_tests_is_the_one_of_the_others():
    problem = make_problem()
    active = torch.tensor([True, False, True])
    torch.testing.assert_close(fast_formula(problem, active), naive(problem, active))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_result_depends_on_the_order_of_threads_and_blocks(twin, dtype):
    """A race, a missing barrier or an unordered sum would change bits with the order in which threads run."""
    problem = make_problem(M=70, D=16, N=200, R=6, ranks=(3, 2, 5, 1)).to(DTYPES[dtype], torch.promote_types(
        DTYPES[dtype], torch.float32))  # fmt: skip
    dy = torch.randn(70, 200).to(DTYPES[dtype])
    runs = []
    for seed in range(4):
        twin.set(seed=seed)
        y = adamss_linear(*problem.operands, backend="cuda")
        runs.append((y, *torch.autograd.grad(y, (problem.x, problem.B, problem.C), dy)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


GRADIENTS = {
    "transposed": lambda M, N, dtype: torch.randn(N, M).to(dtype).t(),
    "expanded from one number": lambda M, N, dtype: torch.ones((), dtype=dtype).expand(M, N),
    "a slice of wider rows": lambda M, N, dtype: torch.randn(M, N + 8).to(dtype)[:, 3 : N + 3],
    "every other column": lambda M, N, dtype: torch.randn(M, 2 * N).to(dtype)[:, ::2],
}


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_strides_do_not_matter(twin, dtype, gradient):
    dtype = DTYPES[dtype]
    M, N, D = 66, 144, 20
    problem = make_problem(M=M, D=D, N=N, R=6, ranks=(2, 3)).to(dtype, torch.float32)
    dy = GRADIENTS[gradient](M, N, dtype)
    results = []
    for dense in (True, False):
        x, weight, bias, basis, a, B, C, layout = (t.detach() if isinstance(t, torch.Tensor) else t
                                                   for t in problem.operands)  # fmt: skip
        if not dense:
            # As PEFT keeps them: A and a are columns of one matrix; B and C may be anything.
            both = torch.cat((basis, a[:, None]), 1)
            basis, a = both[:, :D], both[:, D]
            x, B, C = x.t().contiguous().t(), B.t().contiguous().t(), torch.cat((C, C), 1)[:, : C.shape[1]]
        leaves = [t.requires_grad_() for t in (x, B, C)]
        y = adamss_linear(x, weight, bias, basis, a, B, C, layout, backend="cuda")
        results.append((y, *torch.autograd.grad(y, leaves, dy.contiguous() if dense else dy)))
    unit = torch.finfo(dtype).eps / 2
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 4 * unit


@pytest.mark.parametrize("A_dtype", [torch.float32, torch.float16, torch.float64])
def test_a_basis_and_parameters_of_another_dtype_are_taken(twin, A_dtype):
    problem = make_problem(M=6, D=12, N=20, R=4, ranks=(2, 1)).to(torch.bfloat16)
    problem.basis, problem.basis_bias = problem.basis.to(A_dtype), problem.basis_bias.to(A_dtype)
    exact = problem.to(torch.float64)
    y, expected = adamss_linear(*problem.operands, backend="cuda"), naive(exact)
    assert relative_error(y, expected) <= 3 * torch.finfo(torch.bfloat16).eps
    got = torch.autograd.grad(y.float().sum(), (problem.B, problem.C))
    assert [t.dtype for t in got] == [torch.bfloat16] * 2
    for value, want in zip(got, torch.autograd.grad(expected.sum(), (exact.B, exact.C)), strict=True):
        assert relative_error(value, want) <= 3 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "needs", [[True] * 5, [True, False, False, False, False], [False, False, False, True, False], [False] * 4 + [True]]
)
@pytest.mark.parametrize("M", [0, 5])
@pytest.mark.parametrize("keep_P", [True, False])
def test_outputs_are_what_the_fakes_declare(twin, needs, M, keep_P):
    problem = make_problem(M=M, dtype=torch.bfloat16)
    x, weight, bias, B, C, subspaces = problem.raw()
    for keep_S in (True, False):
        made = cuda.forward(x, weight, bias, B, C, subspaces, keep_S, keep_P)
        declared = ops._forward_fake(x, weight, bias, B, C, *subspaces[:5], keep_S, keep_P)
        assert [(t.shape, t.stride(), t.dtype) for t in made] == [(t.shape, t.stride(), t.dtype) for t in declared]
    _, S, P = cuda.forward(x, weight, bias, B, C, subspaces, True, keep_P)
    dy = torch.randn(M, weight.shape[0]).to(torch.bfloat16)
    backward = (dy, x, S, P if keep_P else None, weight, B, C)
    made, declared = (
        cuda.backward(*backward, subspaces, needs),
        ops._backward_fake(*backward, *subspaces[:6], needs),
    )
    assert [(t.shape, t.stride(), t.dtype) for t in made] == [(t.shape, t.stride(), t.dtype) for t in declared]


def test_a_frozen_B_that_changes_unseen_by_its_version_counts_in_the_next_call(twin):
    problem = make_problem(dtype=torch.float32)
    for name in ("x", "B", "C"):
        setattr(problem, name, nn.Parameter(getattr(problem, name), requires_grad=False))
    before, version = adamss_linear(*problem.operands, backend="cuda"), problem.B._version
    problem.B.data.mul_(2)
    assert problem.B._version == version
    after = adamss_linear(*problem.operands, backend="cuda")
    bare = torch.nn.functional.linear(problem.x, problem.weight, problem.bias)
    torch.testing.assert_close(after - bare, 2 * (before - bare), rtol=1e-4, atol=1e-4)


def boxed(t, fill):
    """A copy of t inside a larger allocation full of `fill`, and a function that says whether that is untouched."""
    margin = 64
    box = torch.full((t.numel() + 2 * margin,), fill, dtype=t.dtype)
    box[margin : margin + t.numel()] = t.reshape(-1)
    before = box.clone()

    def is_untouched():
        outside = torch.ones(box.shape, dtype=torch.bool)
        outside[margin : margin + t.numel()] = False
        return bool(torch.equal(box[outside].nan_to_num(7), before[outside].nan_to_num(7)))

    return box[margin : margin + t.numel()].view(t.shape), is_untouched


@pytest.mark.parametrize("N", [272, 301])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_tensors_is_read_or_written(twin, dtype, N, monkeypatch):
    """Operands, outputs and scratch lie in NaN: a read beyond them spoils a result, a write beyond them is seen."""
    dtype = DTYPES[dtype]
    problem = make_problem(M=67, D=20, N=N, R=6, ranks=(3, 1, 2)).to(dtype, torch.promote_types(dtype, torch.float32))
    checks = []

    def box(t, fill=float("nan")):
        inside, is_untouched = boxed(t.detach(), fill)
        checks.append(is_untouched)
        return inside

    def new_empty(t, *size, dtype=None):
        shape = size[0] if isinstance(size[0], (tuple, torch.Size)) else size
        return box(torch.full(shape if isinstance(shape, (tuple, torch.Size)) else (shape,), float("nan"),
                              dtype=dtype or t.dtype))  # fmt: skip

    masks = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    *operands, subspaces = problem.raw(*masks)
    x, weight, bias, B, C = map(box, operands)
    basis, basis_bias, *rows = subspaces[:4]
    subspaces = Subspaces(box(basis), box(basis_bias), *(box(t, 10**6) for t in rows), *masks)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(cuda.F, "linear", lambda *args: box(linear(*args)))
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    y, S, P = cuda.forward(x, weight, bias, B, C, subspaces, True, True)
    dy = box(torch.randn(67, N).to(dtype))
    gradients = cuda.backward(dy, None, S, P, weight, B, C, subspaces, [True, False, False, True, True])
    results = (y, S, P, *(t for t in gradients if t.numel()))
    assert all(torch.isfinite(t).all() for t in results)
    assert all(check() for check in checks)


def guarded(t):
    """A copy of t that ends where memory that nobody may touch begins."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    area = mmap.mmap(-1, (pages + 1) * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(area)) + pages * page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    inside = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=pages * page - size)
    return inside.copy_(t.reshape(-1)).view(t.shape)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("N", [136, 301])
@pytest.mark.parametrize("shape", ["nothing divides", "more columns of S than shared memory has"])
def test_not_a_byte_beyond_the_last_is_read(twin, shape, N):
    ranks = SHAPES[shape]["ranks"]
    M, K, rho, r_max = 67, len(ranks), sum(ranks), max(ranks)
    rows = guarded((torch.arange(N) % K).to(torch.int32))
    offsets = guarded(torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32))
    masks = [guarded(torch.ones(K, dtype=torch.uint8)) for _ in "ab"]
    layout = cuda_library.Layout(N, K, *(t.data_ptr() for t in (rows, offsets, *masks)))
    plan = twin.library.delta_bwd_plan(2, M, N, rho, 2)
    y, dS = guarded(torch.zeros(M, N, dtype=torch.bfloat16)), guarded(torch.zeros(M, rho, dtype=torch.bfloat16))
    S, C, dC = guarded(torch.zeros(M, rho)), guarded(torch.zeros(N, r_max)), guarded(torch.zeros(N, r_max))
    parts = guarded(torch.zeros(plan.stretches, M, rho)), guarded(torch.zeros(plan.parts, N, r_max))
    at = {name: t.data_ptr() for name, t in {"y": y, "S": S, "C": C}.items()}
    backward = (t.data_ptr() for t in (S, C, dS, parts[0], dC, parts[1]))
    forward_args = cuda_library.DeltaFwdArgs(0, None, 2, M, rho, r_max, at["y"], N, at["S"], at["C"], layout)
    backward_args = cuda_library.DeltaBwdArgs(0, None, 2, M, rho, r_max, at["y"], N, 1, *backward, plan, layout)
    child = os.fork()
    if child == 0:
        # Nothing but the library runs here: torch's threads did not come along.
        twin.library.delta_fwd(forward_args)
        twin.library.delta_bwd(backward_args)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_rows_of_pruned_subspaces_are_not_written(twin):
    # A bfloat16 -0.0 that were read and written again would come back as 0.0.
    rows = torch.tensor([0] * 8 + [1] * 8, dtype=torch.int32)
    y = torch.full((3, 16), -0.0, dtype=torch.bfloat16)
    S, C = torch.zeros(3, 2), torch.ones(16, 1)
    offsets, active = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([True, False])
    args = (3, 2, 1, y.data_ptr(), 16, S.data_ptr(), C.data_ptr(), cuda.layout_of(rows, offsets, active, None))
    twin.library.delta_fwd(cuda_library.DeltaFwdArgs(0, None, 2, *args))
    assert torch.signbit(y[:, 8:]).all()
    assert not torch.signbit(y[:, :8]).any()


def test_a_failed_launch_names_kernel_shape_and_device(twin):
    problem = make_problem(M=5, dtype=torch.float32)
    twin.set(fail=STATUS_INVALID_CONFIGURATION)
    message = r"input_projection failed on cuda:0 for .*RHO=6, R=5, D=13.*: invalid configuration argument"
    with pytest.raises(RuntimeError, match=message):
        adamss_linear(*problem.operands, backend="cuda")
    y = adamss_linear(*problem.operands, backend="cuda")
    twin.set(fail=STATUS_INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError, match=r"delta_bwd failed on cuda:0 for M=5, RHO=6, r_max=3, N=11, K=3: invalid"):
        torch.autograd.grad(y.sum(), problem.C)


def bwd_args(dtype, M, N, rho, r_max, plan):
    layout = cuda_library.Layout(N, 10, *[None] * 4)
    # Addresses that nothing reads: launches are only recorded.
    return cuda_library.DeltaBwdArgs(0, None, dtype, M, rho, r_max, 16, N, 1, 16, 16, 16, 16, 16, 16, plan, layout)


@pytest.mark.parametrize("dtype", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("M", "N", "rho", "r_max"),
    [
        (1, 1, 1, 1),
        (16384, 4096, 30, 3),
        ((1 << 17) + 8, 16400, 3, 2),  # M N beyond 2^31
        (1 << 22, 1 << 18, 64, 2),  # more tiles than gridDim.y counts, in both directions
        ((1 << 31) + 5, 8, 2, 1),  # more tokens than an int
        (7, (1 << 31) + 64, 2, 1),  # more rows of C than an int
        (64, 64, 20000, 400),  # nothing fits shared memory
    ],
)
def test_every_launch_stays_within_the_limits_of_the_grid(twin, dtype, M, N, rho, r_max):
    """The twin refuses what a driver refuses; here the grid also has to cover all of M, N and RHO."""
    size_X = {0: 4, 1: 8, 2: 2, 3: 2}[dtype]
    size_T = 8 if dtype == 1 else 4
    twin.set(record=True)
    layout = cuda_library.Layout(N, 10, *[None] * 4)
    twin.library.delta_fwd(cuda_library.DeltaFwdArgs(0, None, dtype, M, rho, r_max, 16, N, 16, 16, layout))
    ((blocks, threads, shared),) = twin.launches()
    assert blocks * 64 * 32 * (16 // size_X) >= M * N
    assert shared <= 48 * 1024 and threads == 256
    if shared:
        assert shared >= (4 * rho + r_max * 32 * (16 // size_X)) * size_T

    plan = twin.library.delta_bwd_plan(dtype, M, N, rho, 132)
    assert plan.width % (256 // size_X) == 0
    assert (plan.stretches - 1) * plan.width < N <= plan.stretches * plan.width
    assert plan.parts == -(-M // 64) * (128 * size_X // 256)
    twin.set(record=True)
    twin.library.delta_bwd(bwd_args(dtype, M, N, rho, r_max, plan))
    launches = twin.launches()
    assert launches[0][0] == -(-M // 64) * -(-rho * size_T // 192) * plan.stretches
    # With the tile of dy and its indices, which the kernel declares, it fits what every GPU gives a block.
    assert launches[0][2] + 64 * (256 + max(4, size_X)) + 4 * 256 // size_X <= 48 * 1024
    assert len(launches) == 2 + (plan.stretches > 1)
    assert launches[-1][0] * 32 >= N * r_max
    if plan.stretches > 1:
        assert launches[1][0] * 256 >= M * rho


def test_a_grid_beyond_the_limit_is_refused_by_name(twin):
    twin.set(record=True)
    M, N = 1 << 34, 1 << 20
    with pytest.raises(RuntimeError, match=r"delta_fwd failed on cuda:0 for M=17179869184.*more than 2\^31 - 1 blocks"):
        layout = cuda_library.Layout(N, 10, *[None] * 4)
        twin.library.delta_fwd(cuda_library.DeltaFwdArgs(0, None, 2, M, 30, 3, 16, N, 16, 16, layout))
    with pytest.raises(RuntimeError, match=r"delta_bwd failed .*more than 2\^31 - 1 blocks"):
        plan = cuda_library.Plan(100, 128, 1)
        twin.library.delta_bwd(bwd_args(2, M, N, 30, 3, plan))
    assert twin.launches() == []


def test_the_plan_fills_the_gpu(twin):
    plan = twin.library.delta_bwd_plan
    assert plan(2, 64, 4096, 30, 132).stretches == 32  # every tile of one row of tiles
    assert plan(2, 4096, 4096, 30, 132).stretches == 8
    assert plan(2, 1 << 20, 4096, 30, 132).stretches == 1
    assert plan(2, 0, 4096, 30, 132).parts == 0

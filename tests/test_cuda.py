"""The CUDA backend without a GPU: its own kernels as host C++ (tests/cuda_twin), and their launches."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from accuracy import naive, relative_error
from conftest import make_problem
from torch import nn

from adamss_kernels import adamss_linear, cuda, ops
from adamss_kernels.compiled import cuda_library, of_torch
from adamss_kernels.cuda import hopper
from adamss_kernels.layout import block_diagonal, column_mask
from adamss_kernels.subspaces import Subspaces

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
    check_numerics(SHAPES[shape], DTYPES[dtype], mask, mode)


@pytest.mark.parametrize(("mask", "mode"), MASKS_AND_MODES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("ranks", [(3,) * 5, (5, 3) * 4], ids=["15 columns of S", "32 columns of S"])
def test_the_operands_of_the_fused_kernels_arrive(twin, monkeypatch, ranks, dtype, mask, mode):
    """Base product and update in one, with loops in place of the kernels that a GPU alone can run."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda _: True)
    monkeypatch.setattr(cuda.F, "linear", refuse_base(cuda.F.linear, 272))
    check_numerics({"M": 70, "D": 24, "N": 272, "R": 9, "ranks": ranks}, DTYPES[dtype], mask, mode)
    # prepare, and in backward prepare and finish, and where x was kept what follows
    assert len(twin.launches()) == 3 + (mode == "input" and mask != "none")


@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("A_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_strides_and_dtypes_do_not_matter_to_the_fused_kernels(twin, monkeypatch, A_dtype, mode):
    monkeypatch.setattr(hopper, "_is_hopper", lambda _: True)
    bf16, (M, N, D) = torch.bfloat16, (66, 144, 24)
    problem = make_problem(M=M, D=D, N=N, R=7, ranks=(2, 3)).to(bf16, torch.float32)
    dy = torch.randn(M, N + 8).to(bf16)[:, :N]
    results = []
    for dense in (True, False):
        x, weight, bias, basis, a, B, C, layout = (t.detach() if isinstance(t, torch.Tensor) else t
                                                   for t in problem.operands)  # fmt: skip
        B, C = B.to(bf16).float(), C.to(bf16).float()
        if not dense:
            both = torch.cat((basis, a[:, None]), 1).to(A_dtype)
            basis, a, bias = both[:, :D], both[:, D], bias.repeat_interleave(2)[::2]
            x, weight = (torch.cat((t, t[:, :8]), 1)[:, :D] for t in (x, weight))
            B, C = B.t().contiguous().t().to(bf16), C.to(bf16).t().contiguous().t()
        leaves = [t.requires_grad_() for t in (x, B, C)]
        y = adamss_linear(x, weight, bias, basis, a, B, C, layout, save_for_backward=mode, backend="cuda")
        results.append((y, *torch.autograd.grad(y, leaves, dy.contiguous() if dense else dy)))
    assert len(twin.launches()) == 2 * (3 + (mode == "input"))
    for got, want in zip(*results, strict=True):
        assert relative_error(got.float(), want.float()) <= 4 * torch.finfo(bf16).eps


def refuse_base(linear, N):
    """`linear`, but not for the base product, which has N columns."""

    def call(x, weight, bias=None):
        assert weight.shape[0] != N
        return linear(x, weight, bias)

    return call


def check_numerics(sizes, dtype, mask, mode):
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
    """Operands, outputs and scratch lie in NaN: a read beyond them spoils a result, a write beyond them is seen.

    What the operators make ends, besides, where reading is an end to the process.
    """
    dtype = DTYPES[dtype]
    problem = make_problem(M=67, D=20, N=N, R=6, ranks=(3, 1, 2)).to(dtype, torch.promote_types(dtype, torch.float32))
    checks = []

    def box(t, fill=float("nan")):
        inside, is_untouched = boxed(t.detach(), fill)
        checks.append(is_untouched)
        return inside

    masks = torch.tensor([True, True, False]), torch.tensor([True, False, True])
    *operands, subspaces = problem.raw(*masks)
    x, weight, bias, B, C = map(box, operands)
    basis, basis_bias, *rows = subspaces[:4]
    subspaces = Subspaces(box(basis), box(basis_bias), *(box(t, 10**6) for t in rows), *masks)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(cuda.F, "linear", lambda *args: box(linear(*args)))
    twin.functions.twin_memory(1)
    y, S, P = cuda.forward(x, weight, bias, B, C, subspaces, True, True)
    dy = box(torch.randn(67, N).to(dtype))
    gradients = cuda.backward(dy, None, S, P, weight, B, C, subspaces, [True, False, False, True, True])
    results = (y, S, P, *(t for t in gradients if t.numel()))
    assert all(torch.isfinite(t).all() for t in results)
    assert all(check() for check in checks)
    assert twin.functions.twin_guarded() >= 8


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
    offsets = torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int32)
    rows = guarded((torch.arange(N) % K).to(torch.int32)), guarded(offsets)
    active, trainable = (guarded(torch.ones(K, dtype=torch.bool)) for _ in "ab")
    y = guarded(torch.zeros(M, N, dtype=torch.bfloat16))
    S, C = guarded(torch.zeros(M, rho)), guarded(torch.zeros(N, r_max))
    child = os.fork()
    if child == 0:
        # Little but the library runs here: torch's threads did not come along.
        twin.functions.twin_memory(1)
        twin.library.delta_fwd(y, S, C, *rows, active)
        twin.library.delta_bwd(y, S, C, *rows, active, trainable, rho, True)
        os._exit(0 if twin.functions.twin_guarded() >= 3 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_rows_of_pruned_subspaces_are_not_written(twin):
    # A bfloat16 -0.0 that were read and written again would come back as 0.0.
    rows = torch.tensor([0] * 8 + [1] * 8, dtype=torch.int32)
    y = torch.full((3, 16), -0.0, dtype=torch.bfloat16)
    S, C = torch.zeros(3, 2), torch.ones(16, 1)
    offsets, active = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([True, False])
    twin.library.delta_fwd(y, S, C, rows, offsets, active)
    assert torch.signbit(y[:, 8:]).all()
    assert not torch.signbit(y[:, :8]).any()


def test_a_failed_launch_names_kernel_shape_and_device(twin):
    # The number of a tensor's device on the CPU is -1.
    problem = make_problem(M=5, dtype=torch.float32)
    twin.set(fail=STATUS_INVALID_CONFIGURATION)
    message = r"input_projection failed on cuda:-1 for RHO=6, R=5, D=13, N=0, K=3: invalid configuration argument"
    with pytest.raises(RuntimeError, match=message):
        adamss_linear(*problem.operands, backend="cuda")
    y = adamss_linear(*problem.operands, backend="cuda")
    twin.set(fail=STATUS_INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError, match=r"delta_bwd failed on cuda:-1 for M=5, RHO=6, r_max=3, N=11, K=3: invalid"):
        torch.autograd.grad(y.sum(), problem.C)


def plan_of(twin, *sizes):
    """Stretches of rows of C, their width, and parts of dC, for a dtype's number, M, N, RHO and multiprocessors."""
    out = (ctypes.c_int64 * 3)()
    twin.functions.twin_plan(*map(ctypes.c_int64, sizes), out)
    return tuple(out)


def launch(twin, kernel, *sizes):
    """Launch `delta_fwd` or `delta_bwd` on nothing: a dtype's number, M, N, RHO, r_max and the plan."""
    function = getattr(twin.functions, f"twin_{kernel}")
    function.restype = ctypes.c_char_p
    return function(*map(ctypes.c_int64, sizes))


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
    assert launch(twin, "delta_fwd", dtype, M, N, rho, r_max) is None
    ((blocks, threads, shared, _),) = twin.launches()
    assert blocks * 64 * 32 * (16 // size_X) >= M * N
    assert shared <= 48 * 1024 and threads == 256
    if shared:
        assert shared >= (4 * rho + r_max * 32 * (16 // size_X)) * size_T

    stretches, width, parts = plan = plan_of(twin, dtype, M, N, rho, 132)
    assert width % (256 // size_X) == 0
    assert (stretches - 1) * width < N <= stretches * width
    assert parts == -(-M // 64) * (128 * size_X // 256)
    twin.set(record=True)
    assert launch(twin, "delta_bwd", dtype, M, N, rho, r_max, *plan) is None
    launches = twin.launches()
    assert launches[0][0] == -(-M // 64) * -(-rho * size_T // 192) * stretches
    # With the tile of dy and its indices, which the kernel declares, it fits what every GPU gives a block.
    assert launches[0][2] + 64 * (256 + max(4, size_X)) + 4 * 256 // size_X <= 48 * 1024
    assert len(launches) == 2 + (stretches > 1)
    assert launches[-1][0] * 32 >= N * r_max
    if stretches > 1:
        assert launches[1][0] * 256 >= M * rho


def test_a_grid_beyond_the_limit_is_refused_by_name(twin):
    twin.set(record=True)
    M, N = 1 << 34, 1 << 20
    y, S = (torch.zeros(1, 1, dtype=dtype).expand(M, n) for dtype, n in ((torch.bfloat16, N), (torch.float32, 30)))
    rows, offsets = torch.zeros(1, dtype=torch.int32).expand(N), torch.zeros(11, dtype=torch.int32)
    message = r"delta_fwd failed on cuda:-1 for M=17179869184, RHO=30, r_max=3, N=1048576, K=10: more than 2\^31 - 1 bl"
    with pytest.raises(RuntimeError, match=message):
        twin.library.delta_fwd(y, S, torch.zeros(N, 3), rows, offsets, None)
    assert launch(twin, "delta_bwd", 2, M, N, 30, 3, 100, 128, 1) == b"more than 2^31 - 1 blocks of threads"
    assert twin.launches() == []


def test_the_plan_fills_the_gpu(twin):
    assert plan_of(twin, 2, 64, 4096, 30, 132)[0] == 32  # every tile of one row of tiles
    assert plan_of(twin, 2, 4096, 4096, 30, 132)[0] == 8
    assert plan_of(twin, 2, 1 << 20, 4096, 30, 132)[0] == 1
    assert plan_of(twin, 2, 0, 4096, 30, 132)[2] == 0


def test_kernels_run_on_the_device_and_stream_of_their_tensors_and_leave_the_current_device(twin):
    assert twin.functions.twin_device() == 0
    problem = make_problem(dtype=torch.float32)
    y = adamss_linear(*problem.operands, trainable=torch.tensor([True, False, True]), backend="cuda")
    torch.autograd.grad(y.sum(), (problem.x, problem.B, problem.C))
    assert {device for *_, device in twin.launches()} == {-1}
    assert twin.functions.twin_stream() == 1000 - 1
    assert twin.functions.twin_device() == 0
    twin.set(fail=STATUS_INVALID_CONFIGURATION)
    with pytest.raises(RuntimeError):
        adamss_linear(*problem.operands, backend="cuda")
    assert twin.functions.twin_device() == 0


def test_a_lack_of_memory_is_torchs_own_error(twin):
    problem = make_problem(dtype=torch.float32)
    twin.functions.twin_memory(2)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory.*input_projection needs 6 x 13 elements"):
        adamss_linear(*problem.operands, backend="cuda")


def test_a_torch_that_lacks_a_function_is_named(twin_file, tmp_path):
    # A copy: other tests use the functions that the twin has found.
    copy = shutil.copy(twin_file, tmp_path / "copy.so")
    with pytest.raises(OSError, match=rf"torch {re.escape(torch.__version__)} does not export aoti_torch_create_cuda"):
        # It exports what every torch does, and nothing for CUDA.
        cuda_library.open_library(copy, "adamss_elsewhere", "CPU", of_torch("c10"))
    with pytest.raises(OSError, match="has not loaded .*libtorch_cuda.so"):
        cuda_library.open_library(copy, "adamss_elsewhere", "CPU", tmp_path / "libtorch_cuda.so")
    with pytest.raises(OSError, match="not a library"):
        (tmp_path / "not a library").write_text("")
        cuda_library.open_library(tmp_path / "not a library")


def test_the_operators_stand_beside_those_of_the_package_and_take_tensors_of_cuda_alone(twin_file):
    code = """
import sys
from pathlib import Path
import torch
from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear
from adamss_kernels.compiled import cuda_library
path = Path(sys.argv[1])
library = cuda_library.open_library(path, libtorch_cuda=path)
assert torch.ops.adamss_kernels.cuda_mask_rows and torch.ops.adamss_kernels.cuda_forward
layer = FusedAdaMSSLinear.from_linear(torch.nn.Linear(8, 6), AdaMSSConfig(r=4, num_subspaces=2))
layer(torch.randn(3, 8)).sum().backward()
rows, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
try:
    library.mask_rows(torch.zeros(1, 1), rows, offsets, None, None)
except NotImplementedError as error:
    assert "'CPU' backend" in str(error)
else:
    raise AssertionError("a kernel ran on the CPU's memory")
"""
    done = subprocess.run([sys.executable, "-c", code, twin_file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

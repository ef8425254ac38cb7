"""What only a GPU can show: every backend by name against float64, graphs, compilation, addresses beyond 2**31.

With ADAMSS_TEST_DEVICE=cpu the same tests run on the CPU with tiny shapes (Triton's under TRITON_INTERPRET=1), so that
they do not run for the first time on a GPU; what needs CUDA itself is skipped there.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import make_problem
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adamss_kernels import adamss_linear, ops
from adamss_kernels.layout import block_diagonal, column_mask

DEVICE = os.environ.get("ADAMSS_TEST_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not ON_GPU, reason="needs CUDA itself")
BACKENDS = ("reference", "cpu", "triton", "cuda")
# (M, D, N, R, ranks): each shape class, alignment of nothing, many columns of S, more rank than width.
SHAPES = (
    [
        (1, 4096, 4096, 100, (3,) * 10),
        (16, 768, 768, 100, (1,) * 10),
        (200, 1024, 3072, 100, (1,) * 32),
        (1000, 776, 520, 60, (2, 1, 3)),
        (777, 333, 555, 100, (3,) * 10),
        (4096, 1024, 4096, 100, (3,) * 10),
        (2048, 2048, 2048, 100, (16,) * 9),
        (300, 1536, 768, 100, (4,) * 12),
        (3000, 768, 768, 100, (1,) * 10),
        (64, 48, 96, 80, (1, 2)),
    ]
    if ON_GPU
    else [(40, 48, 64, 20, (2, 1)), (33, 50, 41, 30, (1, 3))]
)
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16-fp32": (torch.bfloat16, torch.float32),
}


def backend_or_skip(name, dtype):
    reason = ops.implementation(name).why_unavailable(DEVICE, dtype)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    return name


def problem_on_device(M, D, N, R, ranks, dtype, param_dtype):
    """Operands drawn afresh: a run covers other data than the last; the seed is in the failure message."""
    problem = make_problem(M, D, N, R, ranks, seed=torch.seed() % 2**63)
    for name in ("x", "weight", "bias", "basis", "basis_bias", "B", "C"):
        tensor = getattr(problem, name)
        to = param_dtype if name in "BC" else dtype
        setattr(problem, name, tensor.detach().to(DEVICE, to).requires_grad_(tensor.requires_grad))
    layout = problem.layout
    problem.layout = layout.with_tensors(layout.row_subspace.to(DEVICE), layout.offsets.to(DEVICE))
    return problem


def plain(problem, active=None):
    """The formula in plain PyTorch, every product in the dtype of x."""
    x, weight, bias, basis, basis_bias, B, C, layout = problem.operands
    S = F.linear(F.linear(x, basis, basis_bias), B.to(x.dtype))
    if active is not None:
        S = S * column_mask(active, layout.offsets, layout.rho)
    Ct = block_diagonal(C, layout.row_subspace, layout.offsets, layout.rho)
    return F.linear(x, weight, bias) + S @ Ct.to(x.dtype)


def gradients(y, problem, dy):
    return (y, *torch.autograd.grad(y, (problem.x, problem.B, problem.C), dy.to(y.dtype)))


@pytest.fixture
def as_users_run(backend):
    """PyTorch's own scatter, which the reference needs, synchronises in the deterministic mode that tests run in."""
    if backend == "reference":
        torch.use_deterministic_algorithms(False)


def warm_up(run):
    """Call `run` on a side stream, as a capture will."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)


def relative_error(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_plain_pytorchs_plus_one_rounding(backend, mode, masked, dtypes, shape):
    dtype, param_dtype = DTYPES[dtypes]
    problem = problem_on_device(*shape, dtype, param_dtype)
    seed = torch.initial_seed()
    active = torch.arange(problem.layout.num_subspaces, device=DEVICE) % 2 == 0 if masked else None
    dy = torch.randn(shape[0], shape[2], device=DEVICE).to(dtype)
    options = {"active": active, "save_for_backward": mode, "backend": backend_or_skip(backend, dtype)}
    got = gradients(adamss_linear(*problem.operands, **options), problem, dy)
    baseline = gradients(plain(problem, active), problem, dy)
    wide = problem.to(torch.float64)
    exact = gradients(plain(wide, active), wide, dy)
    unit = torch.finfo(dtype).eps / 2
    for name, value, base, true in zip(("y", "dx", "dB", "dC"), got, baseline, exact, strict=True):
        assert relative_error(value, true) <= 2 * relative_error(base, true) + unit, (name, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_give_the_same_bits(backend):
    problem = problem_on_device(*SHAPES[-1], torch.float32, torch.float32)
    dy = torch.randn(SHAPES[-1][0], SHAPES[-1][2], device=DEVICE)
    name = backend_or_skip(backend, torch.float32)
    runs = [gradients(adamss_linear(*problem.operands, backend=name), problem, dy) for _ in range(3)]
    for values in zip(*runs, strict=True):
        assert all(torch.equal(values[0], value) for value in values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_any_number_of_tokens(backend):
    problem = problem_on_device(*SHAPES[-1], torch.float32, torch.float32)
    name = backend_or_skip(backend, torch.float32)

    def function(x):
        return adamss_linear(x, *problem.operands[1:], backend=name).square()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="inductor" if ON_GPU else "aot_eager")
    for M in (5, 9, 33):
        x = torch.randn(M, SHAPES[-1][1], device=DEVICE, requires_grad=True)
        got, want = (f(x) for f in (compiled, function))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, want)))


@needs_cuda
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_frozen_adapter_compiles_into_cuda_graphs(backend):
    problem = problem_on_device(*SHAPES[1], torch.bfloat16, torch.float32)
    name = backend_or_skip(backend, torch.bfloat16)
    for letter in "xBC":
        setattr(problem, letter, torch.nn.Parameter(getattr(problem, letter), requires_grad=False))
    compiled = torch.compile(lambda x: adamss_linear(x, *problem.operands[1:], backend=name), mode="reduce-overhead")
    # Warm-up, capture, replay; what is kept of a frozen B must not lie in the graphs' memory.
    for _ in range(4):
        x = torch.randn_like(problem.x)
        assert torch.equal(compiled(x).clone(), adamss_linear(x, *problem.operands[1:], backend=name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing_and_autocast(backend):
    problem = problem_on_device(*SHAPES[-1], torch.float32, torch.float32)
    low = torch.bfloat16 if ON_GPU or backend != "triton" else torch.float16
    name = backend_or_skip(backend, low)

    def function(x):
        return adamss_linear(x, *problem.operands[1:], backend=name)

    with torch.autocast(DEVICE, dtype=low):
        y = checkpoint(function, problem.x, use_reentrant=False)
        assert y.dtype == low
        torch.testing.assert_close(y, function(problem.x))
    dx = torch.autograd.grad(y.float().sum(), problem.x)[0]
    assert dx.dtype == torch.float32
    assert torch.isfinite(dx).all()


@needs_cuda
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_cuda_graph_follows_changed_operands_and_masks(backend, shape):
    problem = problem_on_device(*shape, torch.bfloat16, torch.float32)
    active = torch.ones(problem.layout.num_subspaces, dtype=torch.bool, device=DEVICE)
    dy = torch.randn(shape[0], shape[2], device=DEVICE, dtype=torch.bfloat16)
    name = backend_or_skip(backend, torch.bfloat16)

    def run():
        return gradients(adamss_linear(*problem.operands, active=active, backend=name), problem, dy)

    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        problem.x.normal_()
        problem.B.mul_(0.5)
        active[0] = False
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


@needs_cuda
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_frozen_adapter_in_a_cuda_graph_follows_the_next_eager_call(backend):
    problem = problem_on_device(*SHAPES[0], torch.bfloat16, torch.float32)
    name = backend_or_skip(backend, torch.bfloat16)
    for letter in "xBC":
        setattr(problem, letter, torch.nn.Parameter(getattr(problem, letter), requires_grad=False))
    run = lambda: adamss_linear(*problem.operands, backend=name)  # noqa: E731
    warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    graph.replay()
    assert torch.equal(y, run())
    problem.B.mul_(2)
    expected = run()
    graph.replay()
    assert torch.equal(y, expected)


@needs_cuda
@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_does_not_synchronise(backend):
    problem = problem_on_device(*SHAPES[1], torch.bfloat16, torch.float32)
    name = backend_or_skip(backend, torch.bfloat16)
    active = torch.ones(problem.layout.num_subspaces, dtype=torch.bool, device=DEVICE)
    dy = torch.randn(SHAPES[1][0], SHAPES[1][2], device=DEVICE, dtype=torch.bfloat16)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            y = adamss_linear(*problem.operands, active=active, trainable=active, backend=name)
            torch.autograd.grad(y, (problem.x, problem.B, problem.C), dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_addresses_beyond_two_to_the_31(backend):
    if ON_GPU and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free memory")
    dtype = torch.bfloat16 if ON_GPU else torch.float16
    name = backend_or_skip(backend, dtype)
    M, D, N = ((1 << 17) + 8, 64, 16400) if ON_GPU else (120, 16, 80)
    problem = problem_on_device(M, D, N, 10, (2, 1), dtype, torch.float32)
    seed = torch.initial_seed()
    dy = torch.randn(M, N, device=DEVICE, dtype=dtype)
    y, dx, dB, dC = gradients(adamss_linear(*problem.operands, backend=name), problem, dy)
    assert all(torch.isfinite(t).all() for t in (dx, dB, dC))
    # Tokens are independent of one another, so that the last ones can be had from themselves alone.
    problem.x = problem.x[-100:].detach().requires_grad_()
    base = gradients(plain(problem), problem, dy[-100:])
    wide = problem.to(torch.float64)
    exact = gradients(plain(wide), wide, dy[-100:])
    for got, plain_error, true in zip((y, dx), map(relative_error, base, exact), exact, strict=False):
        assert relative_error(got[-100:], true) <= 2 * plain_error + torch.finfo(dtype).eps / 2, seed

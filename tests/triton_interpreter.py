"""The Triton backend under Triton's interpreter; not collected with the rest, since that needs a process of its own.

TRITON_INTERPRET is read when Triton's decorators run, so `make test` starts pytest on this file with it set:

    TRITON_INTERPRET=1 pytest tests/triton_interpreter.py
"""

from __future__ import annotations

import inspect

import pytest
import torch
from accuracy import relative_error
from conftest import make_layer, make_problem
from grouped_operands import BATCHES, groups_of, make_operands, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

import adamss_kernels.triton as backend
from adamss_kernels import adamss_linear, available_backends, ops
from adamss_kernels.functional import fused_linear
from adamss_kernels.layout import block_diagonal, column_mask
from adamss_kernels.subspaces import Subspaces
from adamss_kernels.triton import kernels, launch, tuning

CASES = {
    "several tiles": {"M": 35, "D": 37, "N": 71, "R": 7},
    "whole tiles": {"M": 16, "D": 32, "N": 64, "R": 16},
    "three dimensions": {"M": (2, 3, 5), "D": 16, "N": 33},
    "singleton clusters": {"N": 3, "ranks": (1, 1, 1)},
    "one subspace": {"ranks": (2,)},
    "basis wider than the input": {"D": 4, "R": 5},
    "one token": {"M": 1, "N": 40},
    "no token": {"M": 0},
    "one feature": {"D": 1, "R": 1, "ranks": (1, 1, 1)},
    "wide rank": {"N": 40, "R": 20, "ranks": (16, 9, 2)},
    "more columns of S than registers hold": {"N": 50, "R": 6, "ranks": (16, 16, 16, 16, 9)},
    "few tokens, several blocks of columns": {"M": 11, "D": 150, "N": 70, "R": 9},
}
MASKS = {
    "pruned": ((True, False, True), None),
    "frozen": (None, (False, True, True)),
    "pruned and frozen": ((True, True, False), (True, False, False)),
    "none": ((False, False, False), (False, False, False)),
}
LAUNCHED: set[str] = set()


@pytest.fixture(autouse=True)
def _record_launches(monkeypatch):
    original = launch.launch

    def recording(kernel, *args, **constants):
        LAUNCHED.add(kernel.fn.__name__)
        original(kernel, *args, **constants)

    monkeypatch.setattr(launch, "launch", recording)


def prefer(form, monkeypatch):
    """Take a form for every shape and dtype; "fused" where registers hold S."""

    def choose(direction, dtype, arch, shape, rho, precision):
        return form if rho <= tuning.MAX_RHO else "torch"

    monkeypatch.setattr(tuning, "form", choose)


@pytest.fixture(params=tuning.FORMS)
def form(request, monkeypatch):
    """Every form in turn."""
    prefer(request.param, monkeypatch)


def plain(problem, active=None):
    """The formula in plain PyTorch, every product in the dtype of x."""
    x, weight, bias, basis, basis_bias, B, C, layout = problem.operands
    S = F.linear(F.linear(x, basis, basis_bias), B.to(x.dtype))
    if active is not None:
        S = S * column_mask(active, layout.offsets, layout.rho)
    return F.linear(x, weight, bias) + S @ block_diagonal(C, layout.row_subspace, layout.offsets, layout.rho).to(
        x.dtype
    )


def values_and_gradients(function, problem, dy, trainable=None):
    """y and the gradients of x, B and C, those of untrained subspaces zeroed."""
    y = function(problem)
    grads = torch.autograd.grad(y, (problem.x, problem.B, problem.C), dy.to(y.dtype), materialize_grads=True)
    if trainable is not None:
        columns = column_mask(trainable, problem.layout.offsets, problem.layout.rho)
        rows = trainable[problem.layout.row_subspace.long()]
        grads = (grads[0], grads[1] * columns[:, None], grads[2] * rows[:, None])
    return dict(zip(("y", "dx", "dB", "dC"), (y, *grads), strict=True))


def run_all(problem, dtype, param_dtype=None, active=None, trainable=None, **options):
    """What the backend, plain PyTorch and float64 compute, and the magnitude of the terms that each value sums."""
    problem = problem.to(dtype, param_dtype)
    active, trainable = (None if mask is None else torch.tensor(mask) for mask in (active, trainable))
    learns = trainable if active is None or trainable is None else active & trainable
    dy = torch.randn(*problem.x.shape[:-1], problem.weight.shape[0]).to(dtype)
    exact = problem.to(torch.float64)
    tensors = (t if t is None else t.detach().abs().requires_grad_(t.requires_grad) for t in exact.operands[:-1])
    magnitude = type(exact)(*tensors, exact.layout)

    def fused(p):
        return adamss_linear(*p.operands, active=active, trainable=trainable, backend="triton", **options)

    got = values_and_gradients(fused, problem, dy)
    others = ((problem, dy), (exact, dy), (magnitude, dy.abs()))
    baseline, exact, magnitude = (values_and_gradients(lambda p: plain(p, active), p, g, learns) for p, g in others)
    for name, value in got.items():
        assert (value.dtype, value.shape) == (baseline[name].dtype, baseline[name].shape), name
    return got, baseline, exact, magnitude


def assert_close(problem, dtype, param_dtype=None, **options):
    """Elementwise, within the bound of error analysis: roundings on the way times the magnitude of what is summed.

    On the way from operands to result lie at most eight roundings to `dtype` (Q, P, B, S, C, dS, base, result), and
    sums in float32 over no more terms than the dimensions add up to.
    """
    got, _, exact, magnitude = run_all(problem, dtype, param_dtype, **options)
    terms = sum(problem.weight.shape) + sum(problem.B.shape) + problem.x.shape[:-1].numel()
    unit = 4 * torch.finfo(dtype).eps + terms * torch.finfo(torch.float32).eps / 2
    for name, value in got.items():
        error = (value - exact[name]).abs()
        assert (error <= unit * magnitude[name]).all(), (name, error.max(), unit)


def test_every_cpu_dtype_says_whether_it_can():
    assert available_backends()["triton"] == "available"
    assert backend.why_unavailable("cpu", torch.float16) is None
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match="triton"):
            ops.choose_backend("triton", torch.device("cpu"), dtype)


@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients(form, case, mode):
    dtype = torch.float16 if case == "several tiles" else torch.float32
    assert_close(make_problem(**CASES[case]), dtype, save_for_backward=mode)


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(torch.float32, None), (torch.float16, None), (torch.float16, torch.float32)],
    ids=["fp32", "fp16", "fp16-fp32"],
)
@pytest.mark.parametrize("mode", ["projection", "input"])
def test_error_is_at_most_twice_plain_pytorchs_plus_one_rounding(form, mode, dtype, param_dtype):
    problem = make_problem(M=67, D=96, N=80, R=24, ranks=(3, 1, 2, 4))
    got, baseline, exact, _ = run_all(problem, dtype, param_dtype, save_for_backward=mode)
    for name, value in got.items():
        error, allowed = ((t[name] - exact[name]).norm() / exact[name].norm() for t in (got, baseline))
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2, (name, value.dtype)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("mode", ["projection", "input"])
def test_masks(form, masks, mode):
    active, trainable = MASKS[masks]
    problem = make_problem(M=19, D=20, N=70, R=6)
    assert_close(problem, torch.float32, active=active, trainable=trainable, save_for_backward=mode)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_wide_parameters_over_a_narrow_layer(form, bias):
    assert_close(make_problem(M=18, D=33, N=40, bias=bias), torch.float16, torch.float32)


def test_no_gradient_needed(form):
    problem = make_problem(M=20, D=37, N=45).to(torch.float32)
    with torch.no_grad():
        y = adamss_linear(*problem.operands, backend="triton")
    torch.testing.assert_close(y, plain(problem).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [("x",), ("B",), ("C",), ("x", "C"), ("B", "C")])
def test_only_the_gradients_asked_for(form, wanted):
    problem = make_problem(M=18, D=20, N=24).to(torch.float32)
    for name in ("x", "B", "C"):
        getattr(problem, name).requires_grad_(name in wanted)
    leaves = [getattr(problem, name) for name in wanted]
    got = torch.autograd.grad(adamss_linear(*problem.operands, backend="triton").square().sum(), leaves)
    expected = torch.autograd.grad(plain(problem).square().sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_weight_and_bias_gradients(form):
    problem = make_problem(M=9, D=10, N=12).to(torch.float32)
    leaves = [problem.weight.requires_grad_(), problem.bias.requires_grad_()]
    got = torch.autograd.grad(adamss_linear(*problem.operands, backend="triton").square().sum(), leaves)
    expected = torch.autograd.grad(plain(problem).square().sum(), leaves)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_strided_operands(form):
    problem = make_problem(M=19, D=18, N=34, R=6).to(torch.float32)
    augmented = torch.cat((problem.basis, problem.basis_bias[:, None]), 1)
    problem.basis, problem.basis_bias = augmented[:, :-1], augmented[:, -1]  # PEFT's layout
    problem.weight = problem.weight.T.contiguous().T
    problem.bias = problem.bias.repeat_interleave(2)[::2]
    problem.x = torch.randn(18, 38)[:, ::2].T.requires_grad_()
    problem.B, problem.C = (t.detach().T.contiguous().T.requires_grad_() for t in (problem.B, problem.C))
    dy = torch.randn(1, 34).expand(19, 34)
    for mode in ("projection", "input"):
        y = adamss_linear(*problem.operands, save_for_backward=mode, backend="triton")
        expected = plain(problem)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        got = torch.autograd.grad(y, (problem.x, problem.B, problem.C), dy)
        expected = torch.autograd.grad(expected, (problem.x, problem.B, problem.C), dy)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_same_inputs_same_bits(form):
    problem = make_problem(M=37, D=50, N=40).to(torch.float32)
    dy = torch.randn(37, 40)
    runs = [values_and_gradients(lambda p: adamss_linear(*p.operands, backend="triton"), problem, dy) for _ in range(2)]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize("length", [1, 2, 64])
def test_every_division_of_the_work_adds_up(length, monkeypatch):
    """`length` tiles of y share an inner product, and as many steps of tokens are summed in one part."""
    prefer("fused", monkeypatch)
    config = tuning.Config(16, 16, 16, group=3)
    monkeypatch.setattr(tuning, "config", lambda *key: config)
    monkeypatch.setattr(tuning, "run_length", lambda *sizes: length)
    monkeypatch.setattr(
        tuning, "split_tokens", lambda arch, M, rows, blocks: (tuning.cdiv(M, length * rows), length * rows)
    )
    assert_close(make_problem(M=69, D=50, N=90), torch.float32)


def test_a_sum_of_many_parts_rounds_as_seldom_as_torchs():
    problem = make_problem(R=5, ranks=(2, 1, 3), bias=False)
    _, _, _, B, C, subspaces = problem.to(torch.float32).raw(None, None)
    parts = torch.randn(64, 5, 6)
    exact, plain_sum = parts.sum(0, dtype=torch.float64).T, parts.sum(0).T
    dB, _ = launch.finish(None, parts, B, C, subspaces)
    errors = [(total - exact).norm() / exact.norm() for total in (dB, plain_sum)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(parts.dtype).eps / 2


class Launches(TorchDispatchMode):
    """Names of our kernels, which do not run, and of torch's operators in between."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.seen = []
        monkeypatch.setattr(launch, "launch", lambda kernel, *args, **constants: self.seen.append(kernel.fn.__name__))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.is_work(func):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))

    @staticmethod
    def is_work(func):
        """Whether it computes: what only allocates or looks at memory differently launches nothing."""
        return not func.is_view and "empty" not in func.name()


@pytest.mark.parametrize(
    ("M", "keep_P", "forward", "backward"), [(7, False, 2, 5), (40, False, 2, 5), (40, True, 3, 4)]
)
def test_launches_of_a_layer(M, keep_P, forward, backward, monkeypatch):
    """Base included: with P one product more, forward where it is kept, backward where it is not."""
    prefer("fused", monkeypatch)
    x, weight, bias, B, C, subspaces = make_problem(M, 32, 48).to(torch.float32).raw(None, None)
    x, B, C, dy = (t.detach() for t in (x, B, C, torch.randn(M, 48)))
    with Launches(monkeypatch) as launches:
        backend.forward(x, weight, bias, B, C, subspaces, False, False)
    assert launches.seen == ["_prepare_kernel", "_low_rank_gemm_kernel"]
    with Launches(monkeypatch) as launches:
        _, S, P = backend.forward(x, weight, bias, B, C, subspaces, True, keep_P)
    assert len(launches.seen) == forward, launches.seen
    kept = (None, S, P) if keep_P else (x, S, None)
    with Launches(monkeypatch) as launches:
        backend.backward(dy, *kept, weight, B, C, subspaces, [True, False, False, True, True])
    assert len(launches.seen) == backward, launches.seen


def test_float32_is_fused_where_torchs_own_products_are_tf32(monkeypatch):
    monkeypatch.setattr(launch, "precision", lambda dtype: "tf32")
    LAUNCHED.clear()
    assert_close(make_problem(M=20, D=32, N=48), torch.float32)
    assert "_low_rank_gemm_kernel" in LAUNCHED


@given(
    M=st.integers(0, 40), D=st.integers(1, 40), N=st.integers(3, 70), R=st.integers(1, 30),
    ranks=st.lists(st.integers(1, 16), min_size=1, max_size=3).map(tuple), bias=st.booleans(),
    form=st.sampled_from(tuning.FORMS), data=st.data(),
)  # fmt: skip
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(M, D, N, R, ranks, bias, form, data):
    masks = [data.draw(st.none() | st.tuples(*[st.booleans()] * len(ranks))) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        prefer(form, patch)
        problem = make_problem(M, D, N, R, ranks, bias)
        assert_close(problem, torch.float32, active=masks[0], trainable=masks[1])


def test_frozen_B_projected_in_inference_mode_can_change_outside():
    problem = make_problem(M=3, D=20, N=24).to(torch.float32)
    problem.x, problem.B, problem.C = (nn.Parameter(t, requires_grad=False) for t in (problem.x, problem.B, problem.C))
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            problem.B.mul_(2)
            y = adamss_linear(*problem.operands, backend="triton")
            torch.testing.assert_close(y, plain(problem), rtol=1e-5, atol=1e-5)


def test_layer_trains_and_compiles():
    layer = make_layer(backend="triton")
    x = torch.randn(5, 24, requires_grad=True)
    expected = layer(x)
    assert layer.B.grad is None
    expected.sum().backward()
    grad = layer.B.grad.clone()
    layer.B.grad = None
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        y = compiled(torch.cat((x, x))[:rows])
        torch.testing.assert_close(y, torch.cat((expected, expected))[:rows])
    compiled(x).sum().backward()
    torch.testing.assert_close(layer.B.grad, grad)


@pytest.mark.parametrize("M", [0, 17])
@pytest.mark.parametrize("keep", [(False, False), (True, True), (True, False)])
def test_operators_do_what_they_declare(form, M, keep):
    ones = torch.ones(3, dtype=torch.bool)
    x, weight, bias, B, C, subspaces = make_problem(M, 20, 24).to(torch.float32).raw(ones, ones)
    forward, backward = ops.OPERATORS["triton"]
    args = (x, weight, bias, B, C, *subspaces[:5], *keep)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(forward, args, test_utils=checks)
    if not keep[0]:
        return
    _, S, P = forward(*args)
    for needs in ((True, True, True), (True, False, False), (False, True, True), (False, False, True)):
        args = (
            torch.randn(M, 24), None if keep[1] else x, S, P if keep[1] else None, weight, B, C, *subspaces[:4],
            None, ones, [needs[0], False, False, *needs[1:]],
        )  # fmt: skip
        torch.library.opcheck(backward, args, test_utils=checks)


@pytest.mark.parametrize("pruned", [False, True])
def test_without_a_basis_B_takes_x_itself(form, pruned):
    """As in LoRA, with the subspaces' masks."""
    problem = make_problem(M=5, D=12, N=24, R=12, bias=False).to(torch.float32)
    mask = torch.tensor([True, False, True]) if pruned else None
    identity = torch.eye(12)
    rows = (problem.layout.row_subspace, problem.layout.offsets)
    dy = torch.randn(5, 24)

    def values(basis, **options):
        leaves = (problem.x, problem.B, problem.C)
        y = fused_linear(
            problem.x, problem.weight, None, problem.B, problem.C, Subspaces(basis, None, *rows, mask, mask), **options
        )
        return (y, *torch.autograd.grad(y, leaves, dy))

    for got, expected in zip(values(None, backend="triton"), values(identity, backend="reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_kernel_runs_and_has_a_launcher_of_its_name(monkeypatch):
    prefer("fused", monkeypatch)
    LAUNCHED.clear()
    problem = make_problem(M=33, D=20, N=24).to(torch.float32)
    adamss_linear(*problem.operands, backend="triton").sum().backward()
    defined = {
        name
        for name, value in vars(kernels).items()
        if isinstance(value, InterpretedFunction) and name.endswith("_kernel")
    }
    assert defined == LAUNCHED
    for name in defined:
        assert inspect.isfunction(getattr(launch, name.removeprefix("_").removesuffix("_kernel")))


# --- tokens in groups -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_P", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "batch", ["rows side by side and apart", "one adapter has nearly all rows", "the base alone", "no row", "no token"]
)
def test_each_token_of_a_group_gets_what_its_adapter_alone_would_give(batch, dtype, masked, keep_P):
    rows, M = BATCHES[batch]
    groups = groups_of(rows, M)
    operands = make_operands(rows, M, dtype, torch.float32, masked=masked, N=40, R=20, D=24, ranks=(2, 1, 3))
    *tensors, subspaces = operands
    wide = [None if t is None else t.double() for t in (*tensors, *subspaces[:2])]
    exact_operands = (*wide[:5], subspaces._replace(basis=wide[5], basis_bias=wide[6]))
    dy = torch.randn(M, 40).to(dtype)
    exact = run(None, exact_operands, groups, keep_P, dy.double())
    plain = run(None, operands, groups, keep_P, dy)
    for name, got in run("triton", operands, groups, keep_P, dy).items():
        assert (got.dtype, got.shape) == (plain[name].dtype, plain[name].shape)
        if not got.numel() or not exact[name].any():
            assert not got.any(), name
        elif name != "S":  # only what backward makes of it counts
            allowed = 2 * relative_error(plain[name], exact[name]) + torch.finfo(got.dtype).eps
            assert relative_error(got, exact[name]) <= allowed, name


def test_groups_whose_columns_take_several_blocks():
    rows, M = [1, 0, 1], 9
    operands = make_operands(rows, M, torch.float32, torch.float32, N=50, R=6, D=8, ranks=(16, 16, 16, 16, 9))
    groups, dy = groups_of(rows, M), torch.randn(9, 50)
    expected = run(None, operands, groups, False, dy)
    for name, got in run("triton", operands, groups, False, dy).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-4, atol=1e-4)

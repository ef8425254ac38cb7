"""`adamss_linear` is the formula, and its gradients are the formula's, for every backend that this machine can run."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import naive, relative_error
from conftest import CPU_BACKENDS, make_problem

from adamss_kernels import adamss_linear
from adamss_kernels.ops import choose_backend, implementation

MASKS = {
    "unmasked": (None, None),
    "pruned": (torch.tensor([True, False, True]), None),
    "frozen": (None, torch.tensor([False, True, True])),
    "pruned-and-frozen": (torch.tensor([True, True, False]), torch.tensor([True, False, False])),
    "none": (torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)),
}
CASES = {
    "dynamic ranks": {"ranks": (2, 1, 3)},
    "singleton clusters": {"N": 3, "ranks": (1, 1, 1)},
    "one subspace": {"ranks": (2,)},
    "more subspaces than rows asked for": {"N": 2, "ranks": (1, 1)},
    "basis as wide as the input": {"R": 13},
    "basis wider than the input": {"D": 4, "R": 5},
    "one token": {"M": 1},
    "no token": {"M": 0},
    "one feature": {"D": 1, "R": 1, "ranks": (1, 1, 1)},
    "wide rank": {"N": 40, "R": 20, "ranks": (16, 9)},
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_the_formulas(backend, mode, bias, case):
    problem = make_problem(bias=bias, **CASES[case])
    expected = problem.to(torch.float64)
    y = adamss_linear(*problem.operands, save_for_backward=mode, backend=backend)
    y_expected = naive(expected)
    torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y_expected)
    y.backward(dy)
    y_expected.backward(dy)
    for name in ("x", "B", "C"):
        torch.testing.assert_close(getattr(problem, name).grad, getattr(expected, name).grad, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("masks", MASKS)
def test_gradients_pass_gradcheck(backend, mode, bias, masks):
    active, trainable = MASKS[masks]
    problem = make_problem(bias=bias)
    frozen_too = [t.requires_grad_() for t in (problem.weight, problem.bias) if t is not None]

    def function(x, B, C, *_):
        return adamss_linear(
            x, *problem.operands[1:5], B, C, problem.layout, active=active, save_for_backward=mode, backend=backend
        )

    assert torch.autograd.gradcheck(function, (problem.x, problem.B, problem.C, *frozen_too))
    if trainable is not None:
        y = adamss_linear(
            *problem.operands, active=active, trainable=trainable, save_for_backward=mode, backend=backend
        )
        full = adamss_linear(*problem.operands, active=active, save_for_backward=mode, backend=backend)
        assert torch.equal(y, full)
        dy = torch.randn_like(y)
        leaves = (problem.x, problem.B, problem.C)
        dx, dB, dC = torch.autograd.grad(y, leaves, dy)
        dx_full, dB_full, dC_full = torch.autograd.grad(full, leaves, dy)
        torch.testing.assert_close(dx, dx_full, rtol=1e-12, atol=1e-12)
        layout = problem.layout
        for k in range(layout.num_subspaces):
            rows, columns = layout.rows(k), slice(int(layout.offsets[k]), int(layout.offsets[k + 1]))
            for got, expected in ((dB[columns], dB_full[columns]), (dC[rows], dC_full[rows])):
                expected = expected if trainable[k] else torch.zeros_like(expected)
                torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 if trainable[k] else 0)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_pruned_subspaces_contribute_nothing_even_when_not_finite(backend):
    problem = make_problem()
    active = torch.tensor([True, False, True])
    expected = naive(problem, active)
    layout = problem.layout
    with torch.no_grad():
        problem.B[int(layout.offsets[1]) : int(layout.offsets[2])] = float("nan")
    y = adamss_linear(*problem.operands, active=active, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dB, dC = torch.autograd.grad(y.sum(), (problem.B, problem.C))
    for gradient in (dB, dC):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
def test_only_the_gradients_asked_for_are_computed(backend, mode, needs):
    problem = make_problem()
    full = torch.autograd.grad(naive(problem).sum(), (problem.x, problem.B, problem.C))
    for tensor, need in zip((problem.x, problem.B, problem.C), needs, strict=True):
        tensor.requires_grad_(need)
    y = adamss_linear(*problem.operands, save_for_backward=mode, backend=backend)
    assert y.requires_grad == any(needs)
    if any(needs):
        y.sum().backward()
    for tensor, need, expected in zip((problem.x, problem.B, problem.C), needs, full, strict=True):
        if need:
            torch.testing.assert_close(tensor.grad, expected, rtol=1e-11, atol=1e-11)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 3), (2, 0, 4), (2, 3, 2)])
def test_x_may_have_any_number_of_leading_dimensions(backend, shape):
    problem = make_problem(M=shape)
    y = adamss_linear(*problem.operands, backend=backend)
    assert y.shape == (*shape, problem.weight.shape[0])
    torch.testing.assert_close(y, naive(problem), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert problem.x.grad.shape == problem.x.shape


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_operands_need_not_be_contiguous(backend):
    problem = make_problem(M=6)
    # Every second entry of a longer mask: its neighbours say the opposite.
    active = torch.tensor([True, False, False, True, True, False])[::2]
    expected = naive(problem, active)
    x, weight, bias, basis, basis_bias, B, C, layout = problem.operands
    strided = [t.detach().repeat_interleave(2, dim=-1)[..., ::2] for t in (x, weight, bias, basis, basis_bias)]
    B_t, C_t = (t.detach().T.contiguous().T.requires_grad_() for t in (B, C))
    x_s = strided[0].requires_grad_()
    y = adamss_linear(x_s, *strided[1:], B_t, C_t, layout, active=active, trainable=active, backend=backend)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    # An expanded gradient has stride 0.
    y.sum().backward()
    expected.sum().backward()
    for got, want in ((x_s.grad, problem.x.grad), (B_t.grad, B.grad), (C_t.grad, C.grad)):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=["fp32", "bf16", "bf16-fp32", "fp16-fp32"],
)
def test_error_is_at_most_twice_plain_pytorchs_plus_one_rounding(backend, mode, dtype, param_dtype):
    if implementation(backend).why_unavailable("cpu", dtype) is not None:
        with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run {dtype}"):
            choose_backend(backend, torch.device("cpu"), dtype)
        return
    # The operands are rounded first, so that only the arithmetic is compared.
    problem = make_problem(M=67, D=96, N=80, R=24, ranks=(3, 1, 2, 4)).to(dtype, param_dtype)
    exact = problem.to(torch.float64)
    plain = problem.to(dtype)
    dy = torch.randn(67, 80).to(dtype)
    y = adamss_linear(*problem.operands, save_for_backward=mode, backend=backend)
    assert y.dtype == dtype
    y.backward(dy)
    y_exact, y_plain = naive(exact), naive(plain)
    y_exact.backward(dy.double())
    y_plain.backward(dy)
    unit = torch.finfo(dtype).eps / 2
    assert relative_error(y, y_exact) <= 2 * relative_error(y_plain, y_exact) + unit
    for name in ("x", "B", "C"):
        got, want, base = (getattr(p, name).grad for p in (problem, exact, plain))
        assert got.dtype == getattr(problem, name).dtype
        assert relative_error(got, want) <= 2 * relative_error(base, want) + unit, name


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_same_inputs_give_the_same_bits(backend):
    problem = make_problem(M=200, D=64, N=48, R=16, dtype=torch.float32)
    runs = []
    for _ in range(3):
        y = adamss_linear(*problem.operands, backend=backend)
        runs.append((y, *torch.autograd.grad(y.square().sum(), (problem.x, problem.B, problem.C))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))

"""The update alone, added in place to what a base of another library has computed: by kernels and by plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from accuracy import naive, relative_error
from conftest import make_problem

from adamss_kernels import available_backends
from adamss_kernels.added_update import add_update
from adamss_kernels.ops import UPDATE_OPERATORS
from adamss_kernels.subspaces import Subspaces

BACKENDS = ["reference"] + [b for b in UPDATE_OPERATORS if available_backends()[b] == "available"]
# The second's rows of S fit no registers; no N is whole ones.
RANKS = {"few": (2, 1, 3), "many": (20, 37, 19)}
MASKS = {
    "unmasked": (None, None),
    "pruned": (torch.tensor([True, False, True]), None),
    "frozen": (torch.tensor([True, True, False]), torch.tensor([False, True, True])),
}


def drawn(problem, dtype: torch.dtype) -> list[torch.Tensor]:
    """What the base has computed, and dy: values of dtype, in the problem's."""
    g = torch.Generator().manual_seed(5)
    shape = (*problem.x.shape[:-1], problem.C.shape[0])
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype).to(problem.x.dtype) for _ in "yd"]


def run(problem, masks, save_for_backward: str, backend: str, dtype=torch.float64) -> list[torch.Tensor]:
    """y and the gradients of what the base computed, x, B and C; y is in the memory that was given."""
    x, _, _, basis, basis_bias, B, C, layout = problem.operands
    subspaces = Subspaces(basis, basis_bias, layout.row_subspace, layout.offsets, *masks)
    of_base, dy = drawn(problem, dtype)
    of_base.requires_grad_()
    y = of_base * 1
    memory, version = y.data_ptr(), y._version
    y = add_update(y, x, B, C, subspaces, save_for_backward, backend)
    assert y.data_ptr() == memory and y._version > version
    return [y.detach(), *torch.autograd.grad(y, (of_base, x, B, C), dy)]


@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("M", [1, 7, 70, (2, 0), (3, 5)])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_kernels_compute_what_plain_pytorch_does(backend, M, ranks, masks, mode):
    problem = make_problem(M=M, N=83, R=9, ranks=RANKS[ranks], bias=mode == "input")
    got, want = (run(problem, MASKS[masks], mode, b) for b in (backend, "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_rounds_once(backend, ranks, dtype):
    problem = make_problem(M=37, N=83, R=9, ranks=RANKS[ranks], dtype=dtype)
    exact = run(problem.to(torch.float64), MASKS["unmasked"], "input", "reference", dtype)
    # Without a base weight the formula is the update itself.
    plain = problem.to(dtype)
    plain.weight, plain.bias = torch.zeros_like(plain.weight), None
    of_base, dy = drawn(plain, dtype)
    y = of_base + naive(plain)
    y.backward(dy)
    unit = torch.finfo(dtype).eps / 2
    got = run(problem, MASKS["unmasked"], "input", backend)
    for a, b, c in zip(got, (y.detach(), dy, plain.x.grad, plain.B.grad, plain.C.grad), exact, strict=True):
        assert relative_error(a, c) <= 2 * relative_error(b, c) + unit


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_operators_keep_what_their_schema_promises(backend):
    x, _, _, basis, basis_bias, B, C, layout = (
        t.detach() if isinstance(t, torch.Tensor) else t for t in make_problem().operands
    )
    forward, backward = UPDATE_OPERATORS[backend]
    rows = (layout.row_subspace, layout.offsets, None)
    y = torch.randn(7, 11, dtype=torch.float64)
    tests = ("test_schema", "test_faketensor")
    for keep in ((True, True), (False, False)):
        torch.library.opcheck(forward, (y, x, B, C, basis, basis_bias, *rows, *keep), test_utils=tests)
    S, P = forward(y, x, B, C, basis, basis_bias, *rows, True, True)
    needs = [True, False, False, True, True]
    torch.library.opcheck(backward, (y, None, S, P, B, C, basis, basis_bias, *rows, None, needs), test_utils=tests)

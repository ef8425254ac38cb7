"""The operators keep torch's rules for operators, and one function chooses the backend."""

from __future__ import annotations

import pytest
import torch
from conftest import CPU_BACKENDS, make_problem

from adamss_kernels import adamss_linear, available_backends
from adamss_kernels.ops import OPERATORS, _chosen, choose_backend

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("keep_S", [True, False])
@pytest.mark.parametrize("keep_P", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [True, False])
def test_forward_passes_opcheck(backend, keep_S, keep_P, dtype, masked):
    active = torch.tensor([True, False, True]) if masked else None
    *operands, subspaces = make_problem(dtype=dtype).raw(active)
    torch.library.opcheck(OPERATORS[backend].forward, (*operands, *subspaces[:5], keep_S, keep_P))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("needs", [[True] * 5, [True, False, False, True, True], [False, False, False, True, False]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_passes_opcheck(backend, projection, needs, dtype):
    mask = torch.tensor([True, False, True])
    x, weight, bias, B, C, subspaces = make_problem(dtype=dtype).raw(mask, mask)
    forward, backward = OPERATORS[backend]
    _, S, P = forward(x, weight, bias, B, C, *subspaces[:5], True, projection)
    dy = torch.randn(x.shape[0], weight.shape[0], dtype=dtype)
    args = (dy, x, S, P if projection else None, weight, B, C, *subspaces[:6], needs)
    torch.library.opcheck(backward, args)


def test_every_backend_has_a_pair_of_one_schema():
    schemas = [[str(op._schema).replace(f"{name}_", "") for op in pair] for name, pair in OPERATORS.items()]
    assert all(schema == schemas[0] for schema in schemas)
    assert set(OPERATORS) == set(available_backends())


def test_auto_is_overridden_by_the_environment(monkeypatch):
    _chosen.cache_clear()
    monkeypatch.setenv("ADAMSS_BACKEND", "reference")
    assert choose_backend("auto", CPU, torch.float32) == "reference"
    _chosen.cache_clear()
    monkeypatch.setenv("ADAMSS_BACKEND", "abacus")
    with pytest.raises(ValueError, match="expected 'auto' or one of .* got 'abacus'"):
        choose_backend("auto", CPU, torch.float32)
    _chosen.cache_clear()


def test_an_explicit_backend_runs_or_raises():
    for name, state in available_backends().items():
        if state == "available":
            assert choose_backend(name, CPU, torch.float32) == name
        else:
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run torch.float32 on cpu"):
                adamss_linear(*make_problem(dtype=torch.float32).operands, backend=name)


@pytest.mark.parametrize(
    ("argument", "change", "error", "message"),
    [
        ("x", lambda t: t[:, :-1], ValueError, r"x: expected shape \(..., 13\), got \(7, 12\)"),
        ("x", lambda t: t.float(), TypeError, "x: expected the dtype of weight, torch.float64, got torch.float32"),
        ("x", lambda t: t.long(), TypeError, "x: expected a floating-point tensor, got torch.int64"),
        ("weight", lambda t: t[:-1], ValueError, r"weight: expected shape \(11, D\).* got \(10, 13\)"),
        ("bias", lambda t: t[:-1], ValueError, r"bias: expected shape \(11,\), got \(10,\)"),
        ("basis", lambda t: t[:, :-1], ValueError, r"basis: expected shape \(R, 13\), got \(5, 12\)"),
        ("basis_bias", lambda t: t[:-1], ValueError, r"basis_bias: expected shape \(5,\), got \(4,\)"),
        ("B", lambda t: t[:-1], ValueError, r"B: expected shape \(6, 5\), got \(5, 5\)"),
        ("C", lambda t: t[:, :-1], ValueError, r"C: expected shape \(11, 3\), got \(11, 2\)"),
    ],
)
def test_bad_operands_are_named(argument, change, error, message):
    problem = make_problem()
    setattr(problem, argument, change(getattr(problem, argument).detach()))
    with pytest.raises(error, match=message):
        adamss_linear(*problem.operands)


def test_bad_options_are_named():
    operands = make_problem().operands
    with pytest.raises(ValueError, match=r"active: expected shape \(3,\), got \(4,\)"):
        adamss_linear(*operands, active=torch.ones(4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"trainable: expected a bool tensor, got torch.float32"):
        adamss_linear(*operands, trainable=torch.ones(3))
    with pytest.raises(ValueError, match="save_for_backward: expected one of .* got 'everything'"):
        adamss_linear(*operands, save_for_backward="everything")
    with pytest.raises(ValueError, match="backend: expected .* got 'abacus'"):
        adamss_linear(*operands, backend="abacus")

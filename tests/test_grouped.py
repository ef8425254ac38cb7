"""The grouped operators give each token what its own adapter alone would, forward and backward, on every backend."""

from __future__ import annotations

import functools

import pytest
import torch
from accuracy import relative_error
from conftest import CPU_BACKENDS
from grouped_operands import BATCHES, groups_of, make_operands, run

from adamss_kernels import reference
from adamss_kernels.mixed_batch import MixedBatch
from adamss_kernels.ops import GROUPED_BACKENDS, GROUPED_OPERATORS, choose_backend
from adamss_kernels.subspaces import Subspaces

BACKENDS = [name for name in CPU_BACKENDS if name in GROUPED_BACKENDS]
CPU = torch.device("cpu")

SHAPES = {
    "small": {"ranks": (2, 1, 3)},
    "r = 1": {"D": 50, "N": 70, "R": 20, "ranks": (1,) * 10},
    "more columns than registers hold": {"D": 40, "N": 90, "R": 12, "ranks": (7,) * 10},
}


@functools.cache
def one_by_one(batch, shape, masked):
    """Operands, groups, dy, and what `run` returns of them, a token at a time: each by `reference` of its adapter."""
    rows, M = BATCHES[batch]
    groups = groups_of(rows, M)
    operands = make_operands(rows, M, torch.float64, torch.float64, masked=masked, **SHAPES[shape])
    dy = torch.randn(M, operands[1].shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return operands, groups, dy, _one_by_one(operands, groups, dy)


def _one_by_one(operands, groups, dy):
    x, weight, bias, B, C, subspaces = operands
    M, G = x.shape[0], len(groups.slots)
    out = {
        "y": torch.nn.functional.linear(x, weight, bias),
        "S": x.new_zeros(M, B.shape[1]),
        "dx": dy @ weight,
        "dB": B.new_zeros(G, *B.shape[1:]),
        "dC": C.new_zeros(G, *C.shape[1:]),
    }
    for g, slot in enumerate(groups.slots.tolist()):
        masks = (None if mask is None else mask[slot] for mask in (subspaces.active, subspaces.trainable))
        own = Subspaces(*subspaces[:4], *masks)
        for token in groups.tokens[groups.starts[g] : groups.starts[g + 1]].tolist():
            at = slice(token, token + 1)
            out["y"][at], S, _ = reference.forward(x[at], weight, bias, B[slot], C[slot], own, True, False)
            out["S"][at] = S
            needs = [True, False, False, True, True]
            dx, _, _, dB, dC = reference.backward(dy[at], x[at], S, None, weight, B[slot], C[slot], own, needs)
            out["dx"][at] = dx
            out["dB"][g] += dB
            out["dC"][g] += dC
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep_P", [True, False])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_each_token_gets_what_its_adapter_alone_would_give(backend, keep_P, masked, shape, batch):
    operands, groups, dy, expected = one_by_one(batch, shape, masked)
    for name, got in run(backend, operands, groups, keep_P, dy).items():
        torch.testing.assert_close(got, expected[name], rtol=1e-11, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep_P", [True, False])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
@pytest.mark.parametrize("batch", ["a row each", "rows side by side and apart", "alternating"])
def test_error_is_at_most_twice_that_of_plain_pytorch(backend, keep_P, bias, dtype, param_dtype, batch):
    rows, M = BATCHES[batch]
    groups, shape = groups_of(rows, M), {"D": 64, "N": 48, "R": 16, "ranks": (2, 1, 3, 3)}
    dy = torch.randn(M, 48, dtype=torch.float64).to(dtype)
    given = make_operands(rows, M, dtype, param_dtype, bias=bias, masked=True, **shape)
    *tensors, subspaces = given
    wide = [None if t is None else t.double() for t in (*tensors, *subspaces[:2])]
    exact_operands = (*wide[:5], subspaces._replace(basis=wide[5], basis_bias=wide[6]))
    exact = run(None, exact_operands, groups, keep_P, dy.double())
    plain = run(None, given, groups, keep_P, dy)
    for name, got in run(backend, given, groups, keep_P, dy).items():
        assert got.dtype == plain[name].dtype
        if name == "S":  # only what backward makes of it counts
            continue
        allowed = 2 * relative_error(plain[name], exact[name]) + torch.finfo(got.dtype).eps
        assert relative_error(got, exact[name]) <= allowed, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [None, 6])
def test_operators_pass_opcheck(backend, dtype, capacity):
    rows, M = [3, -1, 0, 3, 3, 0], 12
    groups = groups_of(rows, M, capacity)
    x, weight, bias, B, C, subspaces = make_operands([*rows, 5], M, dtype, torch.float32, masked=True)
    forward, backward = GROUPED_OPERATORS[backend]
    operands = (x, weight, bias, B, C, *subspaces[:5], *groups)
    torch.library.opcheck(forward, (*operands, True, True))
    torch.library.opcheck(forward, (*operands, False, False))
    _, S, P = forward(*operands, True, True)
    dy = torch.randn(M, weight.shape[0], dtype=dtype)
    for kept, needs in (((x, S, P), [True] * 5), ((x, S, None), [True, False, False, True, False])):
        torch.library.opcheck(backward, (dy, *kept, weight, B, C, *subspaces[:6], *groups, needs))


def test_groups_list_every_token_once_and_those_of_the_base_last():
    groups = groups_of([3, -1, 0, 3], 8)
    assert groups.slots.tolist() == [0, 3]
    assert groups.tokens.tolist() == [4, 5, 0, 1, 6, 7, 2, 3]
    assert groups.starts.tolist() == [0, 2, 6]


def test_groups_are_made_once_for_all_layers_of_a_batch():
    batch = MixedBatch(["a", None], {"a": 0})
    assert batch.groups(2, 10, CPU) is batch.groups(2, 10, CPU)
    assert batch.groups(2, 20, CPU) is not batch.groups(2, 10, CPU)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend):
    rows, M = BATCHES["alternating"]
    operands, groups = make_operands(rows, M, torch.float32, torch.float32), groups_of(rows, M)
    dy = torch.randn(M, operands[1].shape[0])
    first, second = (run(backend, operands, groups, False, dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_backend_without_grouped_kernels_is_refused_by_name():
    with pytest.raises(RuntimeError, match="cannot run"):
        choose_backend("cuda", CPU, torch.float32, is_grouped=True)

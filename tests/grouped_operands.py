"""Mixed batches, and operands for the grouped operators, which several test files share."""

from __future__ import annotations

import torch
from conftest import make_problem

from adamss_kernels import reference
from adamss_kernels.mixed_batch import Groups, MixedBatch
from adamss_kernels.ops import GROUPED_OPERATORS

CPU = torch.device("cpu")

BATCHES = {
    "a row each": ([0, 1, 2, 3, 4], 5),
    "rows side by side and apart": ([3, -1, 0, 3, 3, 0], 24),
    "one adapter has nearly all rows": ([1] * 70 + [0, 2], 72),
    "alternating": ([1, 0] * 20, 40),
    "the base alone": ([-1, -1], 4),
    "no row": ([], 0),
    "no token": ([0, 1], 0),
    "two hundred adapters": (list(range(199, -1, -1)), 200),
}


def groups_of(rows: list[int], M: int, capacity: int | None = None) -> Groups:
    names = [None if slot < 0 else str(slot) for slot in rows]
    return MixedBatch(names, {str(slot): slot for slot in rows}).groups(len(rows), M, CPU, capacity)


def make_operands(rows, M, dtype, param_dtype, bias=True, masked=False, **shape):
    """x, weight, bias, stacked B and C, subspaces with stacked masks, of a problem drawn in float64."""
    problem = make_problem(M=M, bias=bias, **shape).to(dtype)
    slots, g = max([*rows, 0]) + 2, torch.Generator().manual_seed(1)
    B, C = (torch.randn(slots, *t.shape, generator=g, dtype=torch.float64) for t in (problem.B, problem.C))
    masks = [torch.rand(slots, problem.layout.num_subspaces, generator=g) < 0.7 if masked else None for _ in range(2)]
    x, weight, bias_, _, _, subspaces = problem.raw(*masks)
    return x, weight, bias_, B.to(param_dtype), C.to(param_dtype), subspaces


def run(backend, operands, groups, keep_P, dy):
    """y, S, dx, dB and dC, by the operators of a backend or by the specification."""
    x, weight, bias, B, C, subspaces = operands
    needs = [True, False, False, True, True]
    if backend is None:
        y, S, P = reference.grouped_forward(x, weight, bias, B, C, subspaces, groups, True, keep_P)
        kept = (None, S, P) if keep_P else (x, S, None)
        found = reference.grouped_backward(dy, *kept, weight, B, C, subspaces, groups, needs)
    else:
        forward, backward = GROUPED_OPERATORS[backend]
        y, S, P = forward(x, weight, bias, B, C, *subspaces[:5], *groups, True, keep_P)
        kept = (None, S, P) if keep_P else (x, S, None)
        found = backward(dy, *kept, weight, B, C, *subspaces[:6], *groups, needs)
    return {"y": y, "S": S, "dx": found[0], "dB": found[3], "dC": found[4]}

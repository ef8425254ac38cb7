"""What results are measured against: the formula, one row at a time, and the distance from it."""

from __future__ import annotations

import torch
from torch import Tensor


def naive(problem, active: Tensor | None = None) -> Tensor:
    """The formula of docs/notation.md, one output row at a time."""
    x, weight, bias, basis, basis_bias, B, C, layout = problem.operands
    P = x @ basis.T + (0 if basis_bias is None else basis_bias)
    S = P @ B.T
    columns = []
    for i, k in enumerate(layout.row_subspace.tolist()):
        y_i = x @ weight[i] + (0 if bias is None else bias[i])
        if active is None or active[k]:
            offset = int(layout.offsets[k])
            for j in range(layout.ranks[k]):
                y_i = y_i + S[..., offset + j] * C[i, j]
        columns.append(y_i)
    return torch.stack(columns, dim=-1)


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()

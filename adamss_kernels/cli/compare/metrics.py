"""How well a fitted matrix has the entries, the singular values and the effective rank of its target."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_values(matrix: Tensor) -> Tensor:
    """Return the singular values of a matrix (N, D), largest first: (min(N, D),) float64."""
    return torch.linalg.svdvals(matrix.double())


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values that are scaled to sum 1 (Roy and Vetterli 2007); 0 for zeros."""
    if not values.sum() > 0:
        return 0.0
    p = values / values.sum()
    return float(torch.special.entr(p).sum().exp())


def errors(fitted: Tensor, target: Tensor, got: Tensor, want: Tensor) -> dict[str, float]:
    """Return the effective rank of the fitted matrix, of singular values `got`, and its distances from the target.

    "nuclear_rms" is the root mean square difference of the sorted singular values from the target's, `want`, as the
    published text describes; "nuclear_mean_absolute" the mean absolute difference, as the published code computes.
    "frobenius" is the Frobenius norm of the difference of the matrices over that of the target.
    """
    return {
        "effective_rank": effective_rank(got),
        "nuclear_rms": float((got - want).square().mean().sqrt()),
        "nuclear_mean_absolute": float((got - want).abs().mean()),
        "frobenius": float((fitted.double() - target.double()).norm() / target.double().norm()),
    }

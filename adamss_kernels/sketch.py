"""Sketches of matrices: a few numbers from which the distance between two matrices can be estimated."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SIZE = 8
SKETCH_SHAPE = (_SIZE, _SIZE)


def sketch(matrix: Tensor) -> Tensor:
    """Return L^T X R for fixed random signs L (N, 8) and R (D, 8): (8, 8) float64 on the CPU.

    Linear in X, so the sketch of a difference is the difference of sketches; each entry has mean square ||X||_F^2
    (Alon, Matias, Szegedy 1996), and 64 of them estimate the norm within about 10 %.

    Args:
        matrix: X (N, D), any floating dtype and device.
    """
    N, D = matrix.shape
    left, right = _signs(N, 1), _signs(D, 2)
    total = torch.zeros(_SIZE, _SIZE, dtype=torch.float64, device="cpu")
    # A block of rows at a time: a float64 copy of a large weight would be four times its size.
    for start in range(0, N, 1024):
        rows = matrix.detach()[start : start + 1024].to("cpu", torch.float64)
        total += left[start : start + 1024].T @ (rows @ right)
    return total


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Estimate ||X - Y||_F / ||Y||_F from the sketches of X and Y; infinite when only X is not zero."""
    difference, norm = (found - expected).norm().item(), expected.norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else float("inf")


def _signs(rows: int, stream: int) -> Tensor:
    # RandomState's streams are frozen for good, which torch's and numpy's newer generators do not promise.
    bits = np.random.RandomState(20251000 + stream).randint(0, 2, size=(rows, _SIZE))
    return torch.from_numpy(bits).double() * 2 - 1

"""Sketches of matrices: a few numbers from which the distance between two matrices can be estimated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distributed import full_tensor, is_sharded

_SIZE = 8
SKETCH_SHAPE = (_SIZE, _SIZE)


def sketch(matrix: Tensor) -> Tensor:
    """Return L^T X R for fixed random signs L (N, 8) and R (D, 8): (8, 8) float64 on the CPU.

    Linear in X, so the sketch of a difference is the difference of sketches; each entry has mean square ||X||_F^2
    (Alon, Matias, Szegedy 1996), and 64 of them estimate the norm within about 10 %. Sums over a row are taken in
    float32, or float64 for float64; their rounding moves the sketch by about 1e-7 of its norm.

    Args:
        matrix: X (N, D), any floating dtype and device.
    """
    N, D = matrix.shape
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    left, right = random_signs(N, _SIZE, stream=1), random_signs(D, _SIZE, stream=2).to(dtype)
    total = torch.zeros(_SIZE, _SIZE, dtype=torch.float64, device="cpu")
    # A block of rows at a time: a float32 copy of a large weight would be twice its size.
    for start in range(0, N, 1024):
        rows = matrix.detach()[start : start + 1024].to("cpu", dtype)
        total += left[start : start + 1024].T @ (rows @ right).double()
    return total


def sketch_linear(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the sketch of [weight | bias]: (8, 8) float64 on the CPU.

    Args:
        weight: W (N, D). Of a DTensor each rank takes its part, and the parts are summed (a collective call).
        bias: (N,), sharded over the same ranks, or None.
    """
    if not is_sharded(weight):
        return sketch(weight.detach() if bias is None else torch.cat((weight.detach(), bias.detach()[:, None]), 1))
    N, D = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    left, right = random_signs(N, _SIZE, stream=1), random_signs(D + (bias is not None), _SIZE, stream=2)
    rows = weight.detach().to(dtype) @ _replicated(right[:D].to(dtype), weight)
    total = full_tensor(_replicated(left.T, weight) @ rows.double()).cpu()
    if bias is not None:
        total += (left.T @ full_tensor(bias.detach()).cpu().double())[:, None] * right[D]
    return total


def _replicated(whole: Tensor, example: Tensor) -> Tensor:
    """Return `whole`, which all ranks hold, as a DTensor on the mesh of `example`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh: Any = example.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(whole.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=False)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Estimate ||X - Y||_F / ||Y||_F from the sketches of X and Y; infinite when only X is not zero."""
    difference, norm = (found - expected).norm().item(), expected.norm().item()
    if difference == 0:
        return 0.0
    return difference / norm if norm > 0 else float("inf")


def random_signs(rows: int, columns: int, *, stream: int) -> Tensor:
    """Return fixed random signs (rows, columns) float64 on the CPU; other streams are independent."""
    # RandomState's streams are frozen for good, which torch's and numpy's newer generators do not promise.
    bits = np.random.RandomState(20251000 + stream).randint(0, 2, size=(rows, columns))
    return torch.from_numpy(bits).double() * 2 - 1

"""The part of a weight's singular value decomposition that a Spectral Adapter tunes."""

from __future__ import annotations

import torch
from torch import Tensor


def singular_window(weight: Tensor, rank: int, window: str | int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U1 (N, r), S1 (r,) and V1 (D, r), r consecutive singular columns of W, r = min(rank, N, D).

    Args:
        weight: W (N, D); decomposed in float32, or in float64 if it is float64. On `meta` only shapes come back.
        rank: Columns asked for.
        window: "top" for the largest singular values, "bottom" for the smallest, or the index of the first column.

    Raises:
        ValueError: `window` leaves no room for r columns, or W has a value that is not finite.
    """
    N, D = weight.shape
    r = min(rank, N, D)
    first = {"top": 0, "bottom": min(N, D) - r}.get(window, window) if isinstance(window, str) else window
    if type(first) is not int or not 0 <= first <= min(N, D) - r:
        raise ValueError(f"window: expected 'top', 'bottom' or an index in [0, {min(N, D) - r}], got {window!r}")
    matrix = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if matrix.is_meta:
        return matrix.new_empty(N, r), matrix.new_empty(r), matrix.new_empty(D, r)
    if not torch.isfinite(torch.stack(torch.aminmax(matrix))).all():
        raise ValueError("weight: expected finite values, found NaN or infinity")
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    columns = slice(first, first + r)
    return U[:, columns].contiguous(), S[columns].clone(), Vh[columns].T.contiguous()

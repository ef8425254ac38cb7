"""What the Spectral Adapters share: the singular columns of a weight that they tune."""

from __future__ import annotations

import torch
from torch import Tensor

from .low_rank import LowRankLinear


class SpectralLinear(LowRankLinear):
    """A layer that tunes r = min(rank, N, D) singular columns of W.

    Attributes:
        U1: (N, r) frozen buffer.
        S1: (r,) frozen buffer.
        V1: (D, r) frozen buffer.
    """

    U1: Tensor
    S1: Tensor
    V1: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int = 8, window: str | int = "top") -> None:
        """Decompose W; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            rank: Singular columns that are tuned.
            window: Which ones: "top", "bottom" or the index of the first; see `singular_window`.
        """
        super().__init__(weight, bias, rank=rank, window=window)
        for name, tensor in zip(("U1", "S1", "V1"), singular_window(weight, rank, window), strict=True):
            self.register_buffer(name, tensor)


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

"""Spectral Adapter, additive: trainable offsets of singular vectors (Zhang and Pilanci 2024, arXiv:2405.13952)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .spectrum import SpectralLinear


class SpectralAdditiveLinear(SpectralLinear):
    """W + dW = (U1 + dU) S1 (V1 + dV)^T + the rest of W, for r singular columns U1, S1, V1 of W.

    As dW = [dU S1 | U1 S1] @ [V1 + dV | dV]^T it has rank 2 r at most, and W is never put together again. dU (N, r) and
    dV (D, r) start at zero: r (N + D) parameters, r = min(rank, N, D).
    """

    method = "spectral_additive"

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int = 8, window: str | int = "top") -> None:
        """Decompose W and take parameters; see `SpectralLinear`."""
        super().__init__(weight, bias, rank=rank, window=window)
        self.dU = nn.Parameter(torch.zeros_like(self.U1))
        self.dV = nn.Parameter(torch.zeros_like(self.V1))
        self.bind_subspace(2 * self.S1.shape[0])

    def factors(self) -> tuple[Tensor, Tensor, None]:
        """Return (2 r, D) and (N, 2 r), whose product is dW; no difference of large terms is taken."""
        right = torch.cat((self.V1 + self.dV, self.dV), dim=1)
        left = torch.cat((self.dU * self.S1, self.U1 * self.S1), dim=1)
        return right.t(), left, None

    def update_matrix(self) -> Tensor:
        """Return the update of W (N, D), at least float32, as a function of the parameters."""
        acc = torch.promote_types(self.dU.dtype, torch.float32)
        right, left, _ = self.factors()
        return left.to(acc) @ right.to(acc)

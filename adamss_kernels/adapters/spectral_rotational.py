"""Spectral Adapter, rotational: singular vectors turned by trainable rotations (Zhang and Pilanci 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .spectrum import SpectralLinear


class SpectralRotationalLinear(SpectralLinear):
    """W + dW = U1 Q_A diag(S1 c) (V1 Q_B)^T + the rest of W, for r singular columns U1, S1, V1 of W (arXiv:2405.13952).

    Q = (I - K) (I + K)^-1 with the skew K = (R - R^T) / 2 (Cayley). R_A and R_B (r, r) start at zero and c (r,) at one:
    2 r^2 + r parameters, r = min(rank, N, D).

    dW = U1 M V1^T with M = Q_A diag(S1 c) Q_B^T - diag(S1) (r, r) is AdaMSS's form with one subspace: basis V1^T, B = M
    and C = U1. It runs on the same kernels, which can keep x V1 instead of x for backward.
    """

    method = "spectral_rotational"

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int = 8, window: str | int = "top") -> None:
        """Decompose W and take parameters; see `SpectralLinear`."""
        super().__init__(weight, bias, rank=rank, window=window)
        r = self.S1.shape[0]
        self.R_A = nn.Parameter(self.zeros(r, r))
        self.R_B = nn.Parameter(self.zeros(r, r))
        self.c = nn.Parameter(self.zeros(r) + 1)
        self.bind_subspace(r)

    def core(self) -> Tensor:
        """Return M = Q_A diag(S1 c) Q_B^T - diag(S1): (r, r), at least float32."""
        acc = torch.promote_types(self.c.dtype, torch.float32)
        S1 = self.S1.to(acc)
        Q_A, Q_B = _cayley(self.R_A.to(acc)), _cayley(self.R_B.to(acc))
        return (Q_A * (S1 * self.c.to(acc))) @ Q_B.t() - torch.diag(S1)

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return M (r, r), U1 (N, r) and V1^T (r, D), whose product is dW."""
        return self.core(), self.U1, self.V1.t()

    def update_matrix(self) -> Tensor:
        """Return the update of W (N, D), at least float32, as a function of the parameters."""
        M = self.core()
        return self.U1.to(M.dtype) @ M @ self.V1.to(M.dtype).t()


def _cayley(R: Tensor) -> Tensor:
    """Return the rotation (I - K) (I + K)^-1 of the skew part K of R (r, r); the two factors commute."""
    K = (R - R.t()) / 2
    identity = torch.eye(R.shape[0], dtype=R.dtype, device=R.device)
    Q: Tensor = torch.linalg.solve(identity + K, identity - K)
    return Q

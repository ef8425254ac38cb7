"""LoRA: a trainable product of two thin matrices (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layer import kaiming
from .low_rank import LowRankLinear


class LoRALinear(LowRankLinear):
    """dW = (alpha / rank) B A, with A (rank, D) Kaiming uniform and B (N, rank) zero: rank (N + D) parameters."""

    method = "lora"

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int = 8, alpha: float | None = None) -> None:
        """Assemble a layer; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            rank: Columns of B.
            alpha: Numerator of the scaling; None for `rank`, which makes the scaling 1.
        """
        alpha = rank if alpha is None else alpha
        super().__init__(weight, bias, rank=rank, alpha=alpha)
        self.scaling = alpha / rank
        self.A = nn.Parameter(kaiming(self.zeros(rank, self.in_features)))
        self.B = nn.Parameter(self.zeros(self.out_features, rank))
        self.bind_subspace(rank)

    def factors(self) -> tuple[Tensor, Tensor, None]:
        """Return scaling A (rank, D) and B (N, rank), whose product is dW."""
        return self.A if self.scaling == 1 else self.scaling * self.A, self.B, None

    def update_matrix(self) -> Tensor:
        """Return the update of W (N, D), at least float32, as a function of the parameters."""
        acc = torch.promote_types(self.A.dtype, torch.float32)
        return self.scaling * (self.B.to(acc) @ self.A.to(acc))

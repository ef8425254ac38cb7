"""RandLoRA: frozen random low-rank bases with trainable diagonal scales (Albert et al. 2025, arXiv:2502.00987)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .tiles import TILE, TiledLinear, TiledUpdate


class RandLoRALinear(TiledLinear):
    """dW = scaling sum_k basis_a[k] diag(A[k]) basis_b diag(B[k]), transposed where N < D.

    basis_a (num_bases, max(N, D), rank) and basis_b (rank, min(N, D)) are frozen: uniform and divided by their standard
    deviation. A (num_bases, rank) starts at 1 / num_bases and B (num_bases, min(N, D)) at zero:
    num_bases (rank + min(N, D)) parameters. The frozen bases are a little larger than W.
    """

    method = "randlora"
    tensor_names = ("A", "B", "basis_a", "basis_b")

    basis_a: Tensor
    basis_b: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rank: int = 32,
        num_bases: int | None = None,
        scaling: float = 1.0,
        basis_seed: int = 0,
    ) -> None:
        """Assemble a layer; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            rank: Rank of each basis.
            num_bases: None for ceil(min(N, D) / rank) + 1; PEFT takes one less.
            scaling: A constant factor of the update.
            basis_seed: Seed of the frozen bases; layers of one shape and seed have the same.
        """
        super().__init__(weight, bias, rank=rank, num_bases=num_bases, scaling=scaling, basis_seed=basis_seed)
        small, large = sorted(weight.shape)
        count = num_bases or -(-small // rank) + 1
        generator = torch.Generator().manual_seed(basis_seed)
        for name, shape in (("basis_a", (count, large, rank)), ("basis_b", (rank, small))):
            basis = self.zeros(*shape)
            if not basis.is_meta:
                draw = torch.empty(shape, dtype=torch.float64, device="cpu").uniform_(-1, 1, generator=generator)
                basis.copy_(draw / draw.std(correction=0))
            self.register_buffer(name, basis)
        self.A = nn.Parameter(self.zeros(count, rank) + 1 / count)
        self.B = nn.Parameter(self.zeros(count, small))
        # Tiles run along the smaller side, where the columns of B are.
        axis = 0 if self.out_features < self.in_features else 1
        self.update = TiledUpdate(_build, _pull_back, axis, TILE, (*weight.shape, scaling))


def _build(start: int, stop: int, tensors: list[Tensor], constants: tuple[Any, ...]) -> Tensor:
    A, B, basis_a, basis_b = tensors
    N, D, scaling = constants
    # [num_bases, rank, columns], then every basis at once in one GEMM over num_bases * rank.
    scaled = (scaling * A)[:, :, None] * basis_b[:, start:stop] * B[:, None, start:stop]
    tile = torch.mm(basis_a.transpose(0, 1).flatten(1), scaled.flatten(0, 1))
    return tile.t() if N < D else tile


def _pull_back(
    start: int, stop: int, G: Tensor, tensors: list[Tensor], grads: list[Tensor | None], constants: tuple[Any, ...]
) -> None:
    A, B, basis_a, basis_b = tensors
    dA, dB, *_ = grads
    N, D, scaling = constants
    G = G.t() if N < D else G
    scaled = torch.matmul(basis_a.transpose(1, 2), G) * (scaling * basis_b[:, start:stop])
    if dA is not None:
        dA += (scaled * B[:, None, start:stop]).sum(2)
    if dB is not None:
        dB[:, start:stop] = (scaled * A[:, :, None]).sum(1)

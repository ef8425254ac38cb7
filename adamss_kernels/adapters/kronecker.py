"""Kronecker adapter: the Kronecker product of two small matrices (Edalati et al. 2022, arXiv:2212.10650)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import kaiming
from .tiles import TILE, TiledLinear, TiledUpdate


class KroneckerLinear(TiledLinear):
    """dW = A (x) B, cut to (N, D): dW[i, j] = A[i // p, j // q] B[i % p, j % q].

    B (p, q) is zero and p = ceil(N / rank), q = ceil(D / rank_in); A (ceil(N / p), ceil(D / q)) is Kaiming uniform.
    ceil(N / p) ceil(D / q) + p q parameters, which is rank^2 + N D / rank^2 where rank = rank_in divides both sides.
    """

    method = "kronecker"
    tensor_names = ("A", "B")

    def __init__(self, weight: Tensor, bias: Tensor | None, *, rank: int = 8, rank_in: int | None = None) -> None:
        """Assemble a layer; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            rank: Rows of A; fewer where that suffices to cover N.
            rank_in: Columns of A, likewise; None for `rank`.
        """
        super().__init__(weight, bias, rank=rank, rank_in=rank_in)
        N, D = weight.shape
        p, q = -(-N // min(rank, N)), -(-D // min(rank_in or rank, D))
        self.A = nn.Parameter(kaiming(self.zeros(-(-N // p), -(-D // q))))
        self.B = nn.Parameter(self.zeros(p, q))
        # Whole blocks to a tile.
        self.update = TiledUpdate(_build, _pull_back, 0, p * max(1, TILE // p), (N, D))


def _build(start: int, stop: int, tensors: list[Tensor], constants: tuple[Any, ...]) -> Tensor:
    A, B = tensors
    _, D = constants
    p = B.shape[0]
    tile = torch.kron(A[start // p : -(-stop // p)], B)
    return tile[: stop - start, :D].contiguous()


def _pull_back(
    start: int, stop: int, G: Tensor, tensors: list[Tensor], grads: list[Tensor | None], constants: tuple[Any, ...]
) -> None:
    A, B = tensors
    dA, dB = grads
    p, q = B.shape
    blocks = slice(start // p, -(-stop // p))
    height = (blocks.stop - blocks.start) * p
    # [blocks, p, columns of A, q]
    G = F.pad(G, (0, A.shape[1] * q - G.shape[1], 0, height - G.shape[0])).view(-1, p, A.shape[1], q)
    if dA is not None:
        dA[blocks] = torch.einsum("apbq,pq->ab", G, B)
    if dB is not None:
        dB += torch.einsum("apbq,ab->pq", G, A[blocks])

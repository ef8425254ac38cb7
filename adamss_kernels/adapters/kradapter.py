"""KRAdapter: a column-wise Khatri-Rao product, of full rank almost surely (Albert et al. 2025, arXiv:2508.00230)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer import kaiming
from .tiles import TILE, TiledLinear, TiledUpdate


class KRAdapterLinear(TiledLinear):
    """dW[i, b r + a] = scaling v[i, b] u[i, a] cut to max(N, D) columns, transposed where N > D.

    With r = floor(sqrt(min(N, D))), u (min(N, D), r) is zero and v (min(N, D), ceil(max(N, D) / r)) is Kaiming uniform:
    min(N, D) (r + ceil(max(N, D) / r)) parameters. Scaling and the slope of v's distribution are the published ones.
    """

    method = "kradapter"
    tensor_names = ("u", "v")

    def __init__(self, weight: Tensor, bias: Tensor | None, *, scaling: float = 2.0) -> None:
        """Assemble a layer; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            scaling: A constant factor of the update.
        """
        super().__init__(weight, bias, scaling=scaling)
        small, large = sorted(weight.shape)
        r = math.isqrt(small)
        self.u = nn.Parameter(self.zeros(small, r))
        self.v = nn.Parameter(kaiming(self.zeros(small, -(-large // r)), a=5))
        # Tiles run along the smaller side, where the rows of u and v are.
        axis = 0 if self.out_features == small else 1
        self.update = TiledUpdate(_build, _pull_back, axis, TILE, (*weight.shape, scaling))


def _build(start: int, stop: int, tensors: list[Tensor], constants: tuple[Any, ...]) -> Tensor:
    u, v = (t[start:stop] for t in tensors)
    N, D, scaling = constants
    tile = ((scaling * v)[:, :, None] * u[:, None, :]).flatten(1)
    return tile[:, :D] if N <= D else tile[:, :N].t()


def _pull_back(
    start: int, stop: int, G: Tensor, tensors: list[Tensor], grads: list[Tensor | None], constants: tuple[Any, ...]
) -> None:
    u, v = (t[start:stop] for t in tensors)
    du, dv = grads
    N, D, scaling = constants
    G = G if N <= D else G.t()
    G = scaling * F.pad(G, (0, v.shape[1] * u.shape[1] - G.shape[1])).unflatten(1, (v.shape[1], u.shape[1]))
    if du is not None:
        du[start:stop] = torch.bmm(v[:, None, :], G)[:, 0]
    if dv is not None:
        dv[start:stop] = torch.bmm(G, u[:, :, None])[:, :, 0]

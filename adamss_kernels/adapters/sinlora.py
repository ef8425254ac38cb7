"""SinLoRA: the sine of a low-rank product, which has full rank (Ji et al. 2024, arXiv:2403.19243)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .layer import kaiming
from .tiles import TILE, TiledLinear, TiledUpdate


class SinLoRALinear(TiledLinear):
    """dW = alpha sin(omega B A), with A (rank, D) Kaiming uniform and B (N, rank) zero.

    rank (N + D) parameters, and 2 more where omega and alpha train.
    """

    method = "sinlora"
    tensor_names = ("A", "B", "omega", "alpha")

    omega: Tensor
    alpha: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rank: int = 8,
        omega: float = 20.0,
        alpha: float = 1.0,
        learn_sine: bool = False,
    ) -> None:
        """Assemble a layer; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            rank: Columns of B.
            omega: Frequency of the sine.
            alpha: Amplitude of the sine.
            learn_sine: Whether omega and alpha train.
        """
        super().__init__(weight, bias, rank=rank, omega=omega, alpha=alpha, learn_sine=learn_sine)
        self.A = nn.Parameter(kaiming(self.zeros(rank, self.in_features)))
        self.B = nn.Parameter(self.zeros(self.out_features, rank))
        for name, value in (("omega", omega), ("alpha", alpha)):
            tensor = self.zeros() + value
            if learn_sine:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.update = TiledUpdate(_build, _pull_back, 0, TILE, tuple(weight.shape))


def _build(start: int, stop: int, tensors: list[Tensor], constants: tuple[Any, ...]) -> Tensor:
    A, B, omega, alpha = tensors
    return (torch.mm(B[start:stop], A) * omega).sin_() * alpha


def _pull_back(
    start: int, stop: int, G: Tensor, tensors: list[Tensor], grads: list[Tensor | None], constants: tuple[Any, ...]
) -> None:
    A, B, omega, alpha = tensors
    dA, dB, domega, dalpha = grads
    Z = torch.mm(B[start:stop], A)
    if dalpha is not None:
        dalpha += (G * (Z * omega).sin_()).sum()
    dZ = G * (Z * omega).cos_() * alpha
    if domega is not None:
        domega += (dZ * Z).sum()
    dZ *= omega
    if dA is not None:
        dA += torch.mm(B[start:stop].t(), dZ)
    if dB is not None:
        dB[start:stop] = torch.mm(dZ, A.t())

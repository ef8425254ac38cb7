"""An update B A without its basis A: what a compact checkpoint keeps in place of both, and how B comes back.

The basis can be rebuilt from the base weight, but only nearly: the bits of an SVD depend on the number of threads, the
instruction set and the library, and a singular vector may come out with the other sign. The space that the basis spans
does not depend on them. So the file keeps Z = (B A) Omega, with fixed random signs Omega (D, s); a loader that has
another basis A' of the same span solves B' (A' Omega) = Z, whence B' A' = B A. As s > R the system is overdetermined,
and what is left of Z measures how far A' misses the span.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decompose import augmented
from .sketch import random_signs

_OVERSAMPLING = 16
"""s - R. The system's condition number is about 2 R / 16 (28 at R = 100)."""


def num_probes(R: int) -> int:
    """Return s, the columns of Omega, for a basis of R rows."""
    return R + _OVERSAMPLING


def probe(B: Tensor, basis: Tensor, basis_bias: Tensor | None) -> Tensor:
    """Return Z = (B [A | a]) Omega (RHO, s) in B's dtype, float32 at least.

    Args:
        B: (RHO, R).
        basis: A (R, D).
        basis_bias: a (R,) or None.
    """
    Z = B.detach().to("cpu", torch.float64) @ _probed(basis, basis_bias)
    return Z.to(torch.promote_types(B.dtype, torch.float32))


def solve(Z: Tensor, basis: Tensor, basis_bias: Tensor | None) -> tuple[Tensor, float]:
    """Return B (RHO, R) float64 with (B [A | a]) Omega = Z, and the relative error of the update that it gives.

    The error is estimated: the residual's mean square over its s - R degrees of freedom is that of the part of the
    update outside of the basis' span, and least squares adds R / (s - R - 1) of it (Omega being nearly Gaussian).

    Args:
        Z: (RHO, s), from `probe`.
        basis: A (R, D), another than the one of `probe`.
        basis_bias: a (R,) or None.
    """
    R, s = basis.shape[0], Z.shape[1]
    probed, Z = _probed(basis, basis_bias), Z.to(torch.float64)
    B = torch.linalg.lstsq(probed.T, Z.T).solution.T
    outside = (B @ probed - Z).norm().item() / (s - R) ** 0.5
    norm = Z.norm().item() / s**0.5
    error = outside * (1 + R / (s - R - 1)) ** 0.5
    return B, error / norm if norm > 0 else 0.0


def _probed(basis: Tensor, basis_bias: Tensor | None) -> Tensor:
    matrix = augmented(basis, basis_bias).to("cpu", torch.float64)
    return matrix @ random_signs(matrix.shape[1], num_probes(matrix.shape[0]), stream=3)

"""Fit one method to one matrix: the setting that its parameter budget allows, and the training."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters import METHODS, KRAdapterLinear
from ...config import AdaMSSConfig
from ...linear import FusedAdaMSSLinear

FROM_ZERO = ("lora", "sinlora", "randlora", "kronecker", "kradapter", "full")
"""Methods whose update can stand alone, and training of all entries."""
FROM_BASE = (*METHODS, "adamss")
"""Methods that adapt a base: all of them."""
STARTS = {"zero": FROM_ZERO, "perturbed": FROM_BASE}
"""Where a fit starts, and the methods that can start there."""

PERTURBATION = 0.5
"""Frobenius norm of the noise on the perturbed base, over that of the target."""


def budget(shape: tuple[int, int]) -> int:
    """Return the parameters that each method may use: those of KRAdapter, which has no setting to choose."""
    return count(KRAdapterLinear.from_linear(_meta(shape)))


def count(layer: nn.Module) -> int:
    """Return how many parameters train; AdaMSS's structural zeros are none."""
    if isinstance(layer, FusedAdaMSSLinear) and not layer.C.is_meta:
        return layer.layout.num_parameters(layer.basis.shape[0])
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


@functools.cache
def setting(method: str, shape: tuple[int, int]) -> dict[str, Any] | None:
    """Return the options with the most parameters within the budget, or None where even the fewest exceed it.

    AdaMSS gets the smallest subspace rank with which the budget, and not the size of the matrix, limits its basis: as
    large a basis as possible.
    """
    if method in ("full", "kradapter"):
        return {}
    limit = budget(shape)
    best, most = None, 0
    for options in _candidates(method, shape, limit):
        used = count(build(method, _meta(shape), options))
        if most < used <= limit:
            best, most = options, used
    return best


def _candidates(method: str, shape: tuple[int, int], limit: int) -> Iterable[dict[str, Any]]:
    N, D = shape
    if method == "kronecker":
        # A is square, as published, or nearly, which comes closer to the budget.
        ranks = ((rank, max(1, rank + more)) for rank in range(1, min(N, D) + 1) for more in (0, 1, -1))
        return ({"rank": rank, "rank_in": rank_in} for rank, rank_in in ranks)
    if method == "adamss":
        K = min(AdaMSSConfig().num_subspaces, N)
        for rank in range(1, min(N, D) + 1):
            r = (limit - N * rank) // (K * rank)
            if r < min(N, D):
                return [{"subspace_rank": rank, "r": r, "num_subspaces": K}] if r >= rank else []
        return []
    return ({"rank": rank} for rank in range(1, min(N, D) + 1))


def build(method: str, linear: nn.Linear, options: dict[str, Any]) -> nn.Module:
    """Return a layer of `method` over `linear`, or `linear` itself where all entries train."""
    if method == "full":
        return linear
    if method == "adamss":
        return FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(**options))
    return METHODS[method].from_linear(linear, **options)


def _meta(shape: tuple[int, int]) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias=False, device="meta")


def fit(method: str, target: Tensor, start: Tensor, seed: int, iterations: int, lr: float) -> tuple[Tensor, int]:
    """Train `method` so that `start` plus its update comes close to `target`, in the Frobenius norm, with AdamW.

    The layer's own update is trained, without an input: behind the identity matrix most of the work would be the
    product with the frozen weight.

    Args:
        method: A name of `FROM_ZERO` or `FROM_BASE`.
        target: (N, D).
        start: (N, D), the frozen weight.
        seed: Of the method's random initialisation.
        iterations: Steps of the optimizer.
        lr: Constant learning rate.

    Returns:
        The fitted matrix (N, D), and the number of parameters that trained.
    """
    N, D = target.shape
    linear = _meta((N, D))
    linear.weight = nn.Parameter(start.clone())
    options = setting(method, (N, D))
    if options is None:
        raise ValueError(f"{method}: no setting fits into {budget((N, D))} parameters at size {N} x {D}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = build(method, linear, options)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    base, update = start, getattr(layer, "update_matrix", None)
    if update is None:  # all entries train
        base, update = torch.zeros_like(start), lambda: linear.weight
    goal = target - base
    for _ in range(iterations):
        optimizer.zero_grad()
        torch.linalg.vector_norm(update() - goal).backward()
        optimizer.step()
    with torch.no_grad():
        return base + update(), count(layer)

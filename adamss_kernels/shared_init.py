"""Initialisation of many layers by many ranks: each decomposes some of them, and all get the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from .config import AdaMSSConfig
from .decompose import Decomposition, decompose
from .distributed import full_tensor
from .frozen_linear import FrozenLinear
from .layout import SubspaceLayout


def decompose_on_ranks(
    linears: Mapping[str, nn.Linear | FrozenLinear],
    config: AdaMSSConfig,
    group: dist.ProcessGroup,
    *,
    progress: bool = False,
) -> dict[str, Decomposition]:
    """Return what `decompose` gives for each linear layer, each of them decomposed by one rank of `group`.

    Every rank calls, with the same layers. At any moment a rank decomposes at most one.

    Args:
        linears: Layers by name, whose weights and biases have values on every rank, or are spread over all of them.
        config: As for `decompose`.
        group: Of the ranks that share the layers out.
        progress: Show a progress bar.

    Raises:
        ValueError: The ranks have other layers, or a layer cannot be decomposed; the message names rank or layer.
        RuntimeError: Another rank has failed; the message says which one, and why.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    # Layers of one round take about as long as one another.
    names = sorted(linears, key=lambda name: (-linears[name].weight.numel(), name))
    shapes = [(name, tuple(linears[name].weight.shape), linears[name].weight.dtype) for name in names]
    for other, theirs in enumerate(_gathered(shapes, group)):
        if theirs != shapes:
            raise ValueError(f"group: expected the same layers on all ranks, but rank {other} has others than {rank}")

    found: dict[str, Decomposition] = {}
    with tqdm(total=len(names), desc="AdaMSS init", unit="layer", disable=not progress) as bar:
        for start in range(0, len(names), ranks):
            turn = names[start : start + ranks]
            own, failure, mine = None, None, None
            for source, name in enumerate(turn):
                whole = full_tensor(linears[name].weight), _full(linears[name].bias)
                mine = whole if source == rank else mine
                del whole
            if mine is not None:
                try:
                    own = decompose(*mine, config, name=turn[rank])
                except Exception as error:
                    failure = error
            mine = None
            reports = _gathered((own and (own.layout.ranks, own.basis.shape[0]), failure and str(failure)), group)
            if failure is not None:
                raise failure
            for other, (_, reason) in enumerate(reports):
                if reason is not None:
                    raise RuntimeError(f"rank {other} of the group has failed: {reason}")
            for source, name in enumerate(turn):
                found[name] = _sent(linears[name], own if source == rank else None, reports[source][0], source, group)
            bar.update(len(turn))
    return found


def _full(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else full_tensor(tensor)


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _sent(
    linear: nn.Linear | FrozenLinear,
    own: Decomposition | None,
    shapes: tuple[tuple[int, ...], int],
    source: int,
    group: dist.ProcessGroup,
) -> Decomposition:
    """Return the decomposition that rank `source` has (`own` there) on every rank."""
    (ranks, R), weight = shapes, linear.weight
    N, D = weight.shape
    dtype = torch.promote_types(weight.dtype, torch.float32)

    def sent(tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=weight.device) if tensor is None else tensor.contiguous()
        # As bytes: not every backend knows every dtype.
        dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=source)
        return tensor

    basis, basis_bias, layout, B, C = own or (None, None, None, None, None)
    rows = sent(None if layout is None else layout.row_subspace, (N,), torch.int32)
    return Decomposition(
        sent(basis, (R, D), weight.dtype),
        None if linear.bias is None else sent(basis_bias, (R,), weight.dtype),
        SubspaceLayout(rows, ranks),
        sent(B, (sum(ranks), R), dtype),
        sent(C, (N, max(ranks)), dtype),
    )

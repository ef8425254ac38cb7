"""`TiledLinear`: a frozen linear layer plus a full-rank update that exists only a tile at a time.

The update is built anew in backward, so that neither it nor its gradient is ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..functional import first_order
from .layer import AdapterLinear, without_autocast

TILE = 256
"""Rows, or columns, of the update that are built at once."""

_FOLDING = (torch.float32, torch.float64)
"""Dtypes in which W + dW loses nothing of dW that matters."""


class TiledUpdate(NamedTuple):
    """A full-rank update of W (N, D) as a function of small tensors, and its gradient.

    Attributes:
        build: (start, stop, tensors, constants) -> a new tile dW[start:stop] (n, D), or dW[:, start:stop] (N, n).
        pull_back: (start, stop, G, tensors, grads, constants) adds to each gradient that is not None what the gradient
            G of that tile gives.
        axis: 0 where tiles are rows of W, 1 where they are columns.
        step: Rows or columns to a tile.
        constants: What build and pull_back need besides: N, D and the method's own numbers.
    """

    build: Callable[..., Tensor]
    pull_back: Callable[..., None]
    axis: int
    step: int
    constants: tuple[Any, ...]


class TiledLinear(AdapterLinear):
    """A layer with a full-rank update; a method's constructor adds the tensors and says how tiles follow from them.

    In float32 and float64 a tile of dW is added to that of W before the GEMM. In 16 bits the sum would round the update
    away, so that dW has a GEMM of its own. Backward keeps x, and builds the tiles again.

    Attributes:
        tensor_names: The parameters and frozen buffers that dW follows from, in the order in which tiles take them.
        update: How it does.
    """

    tensor_names: ClassVar[tuple[str, ...]]
    update: TiledUpdate

    def adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return y = x (W + dW)^T + bias: (M, N), differentiable once in x, weight, bias and the method's tensors."""
        y: Tensor = _TiledLinear.apply(x, weight, bias, self.update, *self._update_tensors())
        return y

    def with_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., N) plus the update."""
        # Under autocast, or where the base computes in a dtype of its own.
        rows = x.to(y.dtype).reshape(-1, self.in_features)
        with without_autocast(x):
            update: Tensor = _TiledLinear.apply(rows, None, None, self.update, *self._update_tensors())
        return y + update.view(y.shape)

    def update_matrix(self) -> Tensor:
        """Return the update of W (N, D), at least float32, as a function of the parameters."""
        update, values = self.update, _accumulating(self._update_tensors())
        tiles = [update.build(start, stop, values, update.constants) for start, stop, *_ in _tiles(update)]
        return torch.cat(tiles, dim=update.axis)

    def _update_tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in self.tensor_names]


def _tiles(update: TiledUpdate) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield start and stop of each tile, and the rows and columns of W that it covers."""
    extent = update.constants[update.axis]
    for start in range(0, extent, update.step):
        span = slice(start, min(start + update.step, extent))
        yield span.start, span.stop, *((span, slice(None)) if update.axis == 0 else (slice(None), span))


def _accumulating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


class _TiledLinear(torch.autograd.Function):
    """y = x (W + dW)^T + bias, or x dW^T alone where there is no weight."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, update: TiledUpdate, *tensors: Tensor
    ) -> Tensor:
        ctx.update = update
        _, need_dweight, _, _, *needs = ctx.needs_input_grad
        ctx.save_for_backward(x if need_dweight or any(needs) else None, weight, *tensors)

        M, N = x.shape[0], update.constants[0]
        y = x.new_empty(M, N) if bias is None else bias.repeat(M, 1)
        values, folds = _accumulating(tensors), x.dtype in _FOLDING
        for start, stop, rows, columns in _tiles(update):
            tile = update.build(start, stop, values, update.constants).to(x.dtype)
            if weight is not None and folds:
                tile.add_(weight[rows, columns])
            untouched = bias is None and (update.axis == 0 or start == 0)
            y[:, rows].addmm_(x[:, columns], tile.t(), beta=0 if untouched else 1)
        if weight is not None and not folds:
            y.addmm_(x, weight.t())
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor, saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        x, weight, *tensors = saved
        need_dx, need_dweight, need_dbias, _, *needs = ctx.needs_input_grad
        update: TiledUpdate = ctx.update
        with without_autocast(dy):
            values, folds = _accumulating(tensors), dy.dtype in _FOLDING
            grads = [torch.zeros_like(t) if need else None for t, need in zip(values, needs, strict=True)]
            dx = dy.new_empty(dy.shape[0], update.constants[1]) if need_dx else None
            for start, stop, rows, columns in _tiles(update):
                if dx is not None:
                    tile = update.build(start, stop, values, update.constants).to(dy.dtype)
                    if weight is not None and folds:
                        tile.add_(weight[rows, columns])
                    untouched = update.axis == 1 or start == 0
                    dx[:, columns].addmm_(dy[:, rows], tile, beta=0 if untouched else 1)
                if any(needs):
                    G = torch.mm(dy[:, rows].t(), x[:, columns]).to(values[0].dtype)
                    update.pull_back(start, stop, G, values, grads, update.constants)
            if dx is not None and weight is not None and not folds:
                dx.addmm_(dy, weight)
            dweight = torch.mm(dy.t(), x) if need_dweight else None
            dbias = dy.sum(0) if need_dbias else None
        results = [None if g is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)]
        return dx, dweight, dbias, None, *results

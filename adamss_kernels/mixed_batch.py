"""Which adapter each row of a batch takes: known to one thread and task, grouped once for all layers."""

from __future__ import annotations

import contextlib
import contextvars
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE_TOKENS = 16
"""Most tokens of a tile: the rows of a GPU's smallest matrix product."""


class Groups(NamedTuple):
    """The tokens of a batch by adapter, in the order in which every grouped operator takes them.

    Attributes:
        tokens: (M,) int64, the tokens of each group one after another, ascending within it; those that take no
            adapter come last.
        slots: (G,) int64, where each group's adapter lies in the stacked B and C, ascending.
        starts: (G + 1,) int64; group g is tokens[starts[g]:starts[g + 1]], which may be empty.
        tiles: (T, 3) int32, the same in pieces for a GPU's programs: up to `TILE_TOKENS` tokens that share a slot (-1
            for none), as that slot and where in `tokens` they begin and end.
    """

    tokens: Tensor
    slots: Tensor
    starts: Tensor
    tiles: Tensor


class MixedBatch:
    """The adapters of a batch's rows.

    Attributes:
        names: Of each row's adapter, None for the base alone.
        slots: Where those adapters lie in the stacked B and C, each once, ascending.
    """

    def __init__(self, names: Sequence[str | None], slots: Mapping[str, int]) -> None:
        """Take the names, and where in the stacks the adapter of each name lies."""
        self.names = tuple(names)
        self.row_slots = np.array([-1 if name is None else slots[name] for name in self.names], dtype=np.int64)
        self.slots = tuple(sorted({int(slot) for slot in self.row_slots if slot >= 0}))
        self._groups: dict[tuple[int, torch.device, int | None], Groups] = {}

    def sizes(self, M: int) -> list[int]:
        """Return how many of M tokens take each of `slots`, and at the end how many take none."""
        per_row = M // len(self.names) if self.names else 0
        counts = Counter(self.row_slots.tolist())
        return [counts[slot] * per_row for slot in (*self.slots, -1)]

    def repeat(self, rows: int) -> int:
        """Return how many of `rows` rows each name stands for: beams stand side by side.

        Raises:
            ValueError: `rows` is no multiple of the number of names.
        """
        count = len(self.names)
        if rows % count if count else rows:
            raise ValueError(f"names: expected one for each of the {rows} rows of the batch, got {count}")
        return rows // count if count else 0

    def groups(self, rows: int, M: int, device: torch.device, capacity: int | None = None) -> Groups:
        """Return the groups of M tokens on `device`.

        Args:
            rows: Size of the batch's first dimension, over which the tokens spread evenly.
            M: Tokens.
            device: Where they are.
            capacity: None for groups that have tokens; a number for as many groups as slots, for code that has to know
                their number.

        Raises:
            ValueError: `rows` is no multiple of the number of names.
        """
        self.repeat(rows)
        key = (M, device, capacity)
        if key not in self._groups:
            slots = self.slots if capacity is None else range(capacity)
            self._groups[key] = _grouped(self.row_slots, np.array(slots, dtype=np.int64), M, device)
        return self._groups[key]


def _grouped(row_slots: np.ndarray, slots: np.ndarray, M: int, device: torch.device) -> Groups:
    slot = np.repeat(row_slots, M // len(row_slots)) if len(row_slots) else np.full(M, -1)
    # None sorts last.
    group = np.where(slot < 0, len(slots), np.searchsorted(slots, slot))
    tokens = np.argsort(group, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(group, minlength=len(slots) + 1))))
    tiles = _tiles(slots, starts, _num_tiles(M, len(slots)))
    return Groups(*(_moved(torch.from_numpy(part), device) for part in (tokens, slots, starts[:-1].copy(), tiles)))


def _num_tiles(M: int, G: int) -> int:
    """Return T, as many tiles as M tokens in G groups can take."""
    return -(-M // TILE_TOKENS) + min(M, G)


def _tiles(slots: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Return the tiles (count, 3) int32 of groups that start there (the tokens of none at the end), the rest empty."""
    tiles = np.zeros((count, 3), dtype=np.int32)
    at = 0
    for group in range(len(slots) + 1):
        begins = np.arange(starts[group], starts[group + 1], TILE_TOKENS)
        tiles[at : at + len(begins), 0] = slots[group] if group < len(slots) else -1
        tiles[at : at + len(begins), 1] = begins
        tiles[at : at + len(begins), 2] = np.minimum(begins + TILE_TOKENS, starts[group + 1])
        at += len(begins)
    return tiles


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a copy on `device`, without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


# By bank, of this thread and task alone: other requests may be under way with other names.
_current: contextvars.ContextVar[Mapping[int, MixedBatch]] = contextvars.ContextVar("adamss_mixed_batch")
_NO_ADAPTERS = MixedBatch((), {})


def current_batch(bank: int) -> MixedBatch | None:
    """Return the mixed batch of the bank with this number that is under way in this thread and task, or None."""
    return _current.get({}).get(bank)


@contextlib.contextmanager
def under_way(bank: int, batch: MixedBatch) -> Iterator[None]:
    """Make `batch` the current one of the bank with this number."""
    token = _current.set({**_current.get({}), bank: batch})
    try:
        yield
    finally:
        _current.reset(token)


_library = torch.library.Library("adamss_kernels", "FRAGMENT")
_library.define("groups(Tensor x, SymInt rows, int bank, int capacity) -> (Tensor, Tensor, Tensor, Tensor)")


def _groups(x: Tensor, rows: int, bank: int, capacity: int) -> Groups:
    batch = current_batch(bank)
    if batch is None:
        return _grouped(_NO_ADAPTERS.row_slots, np.arange(capacity), x.shape[0], x.device)
    return batch.groups(rows, x.shape[0], x.device, capacity)


def _groups_fake(x: Tensor, rows: int, bank: int, capacity: int) -> Groups:
    M = x.shape[0]
    tokens, slots, starts = (x.new_empty(size, dtype=torch.int64) for size in (M, capacity, capacity + 1))
    return Groups(tokens, slots, starts, x.new_empty(_num_tiles(M, capacity), 3, dtype=torch.int32))


_library.impl("groups", _groups, "CompositeExplicitAutograd")
torch.library.register_fake("adamss_kernels::groups", _groups_fake, lib=_library)


def groups_of(x: Tensor, rows: int, bank: int, capacity: int) -> Groups:
    """Return the groups of the tokens x (M, D) in the current batch, which has `rows` rows and may be none.

    Compiled code asks anew whenever it runs, and gets as many groups as the bank has slots.
    """
    if torch.compiler.is_compiling():
        return Groups(*torch.ops.adamss_kernels.groups(x, rows, bank, capacity))
    batch = current_batch(bank) or _NO_ADAPTERS
    return batch.groups(rows, x.shape[0], x.device)

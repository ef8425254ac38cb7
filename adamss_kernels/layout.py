"""`SubspaceLayout`: ragged subspaces as flat index tensors; no other file knows about raggedness."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SubspaceLayout:
    """Which subspace owns each output row, and where each subspace lies in the packed B and C.

    Subspace k owns `n_k` rows of the output and has rank `r_k`. Packed, its B is rows `offsets[k]` to
    `offsets[k + 1]` of the (RHO, R) tensor, and its C is the first `r_k` columns of its `n_k` rows of the
    (N, r_max) tensor; the rest of those rows is structural zero.

    Attributes:
        row_subspace: (N,) int32, the subspace that owns each output row.
        ranks: (K,) rank r_k of each subspace. Ranks shape the parameters, so they are Python integers.
        offsets: (K + 1,) int32, derived: exclusive prefix sum of the ranks.

    Raises:
        TypeError: `row_subspace` is not an int32 tensor, or a rank is not an integer.
        ValueError: A shape or value is out of range, or a subspace owns no row.
    """

    row_subspace: Tensor
    ranks: tuple[int, ...]
    offsets: Tensor = field(init=False)

    def __post_init__(self) -> None:
        try:
            ranks = tuple(operator.index(rank) for rank in self.ranks)
        except TypeError:
            raise TypeError(f"ranks: expected integers, got {self.ranks!r}") from None
        object.__setattr__(self, "ranks", ranks)
        if not isinstance(self.row_subspace, Tensor) or self.row_subspace.dtype != torch.int32:
            got = getattr(self.row_subspace, "dtype", type(self.row_subspace).__name__)
            raise TypeError(f"row_subspace: expected an int32 tensor, got {got}")
        if self.row_subspace.dim() != 1 or self.row_subspace.numel() == 0:
            raise ValueError(f"row_subspace: expected shape (N,) with N >= 1, got {tuple(self.row_subspace.shape)}")
        if not ranks or min(ranks) < 1:
            raise ValueError(f"ranks: expected at least one rank, each >= 1, got {ranks}")
        if not self.row_subspace.is_meta:
            rows = torch.bincount(self.row_subspace.clamp_min(-1) + 1, minlength=len(ranks) + 1).tolist()
            if rows[0] or len(rows) > len(ranks) + 1:
                raise ValueError(f"row_subspace: expected values in [0, {len(ranks)}), got one outside")
            if not all(rows[1:]):
                raise ValueError(f"row_subspace: subspace {rows[1:].index(0)} owns no row")
        object.__setattr__(self, "row_subspace", self.row_subspace.contiguous())
        starts = [0]
        for rank in ranks:
            starts.append(starts[-1] + rank)
        offsets = torch.tensor(starts, dtype=torch.int32, device=self.row_subspace.device)
        object.__setattr__(self, "offsets", offsets)

    def with_tensors(self, row_subspace: Tensor, offsets: Tensor) -> SubspaceLayout:
        """Return the same layout on other tensors of equal values (a device move), without validating them again."""
        moved = object.__new__(SubspaceLayout)
        for name, value in (("row_subspace", row_subspace), ("ranks", self.ranks), ("offsets", offsets)):
            object.__setattr__(moved, name, value)
        return moved

    @property
    def num_rows(self) -> int:
        """N, the number of output rows."""
        return self.row_subspace.shape[0]

    @property
    def num_subspaces(self) -> int:
        """K, the number of subspaces."""
        return len(self.ranks)

    @property
    def rho(self) -> int:
        """RHO, the sum of the ranks."""
        return sum(self.ranks)

    @property
    def r_max(self) -> int:
        """The largest rank."""
        return max(self.ranks)

    def num_parameters(self, R: int) -> int:
        """Trainable parameters over a basis of rank R: sum_k r_k (R + n_k), structural zeros not counted."""
        ranks = torch.tensor(self.ranks, device="cpu")
        return self.rho * R + int(ranks[self.row_subspace.cpu().long()].sum())

    def rows(self, k: int) -> Tensor:
        """Return the rows that subspace k owns: (n_k,) int64, ascending (a synchronisation on a GPU)."""
        return (self.row_subspace == k).nonzero().squeeze(1)

    @property
    def sizes(self) -> list[int]:
        """n_k, how many rows each subspace owns (a synchronisation on a GPU)."""
        return torch.bincount(self.row_subspace, minlength=self.num_subspaces).tolist()

    def ragged_index(self) -> Tensor:
        """Return (sum of n_k r_k,) int64: where the entries of the ragged C, one after another, lie in C.view(-1)."""
        columns = (torch.arange(r_k, device=self.row_subspace.device) for r_k in self.ranks)
        places = [(self.rows(k)[:, None] * self.r_max + j).view(-1) for k, j in enumerate(columns)]
        return torch.cat(places)

    def pack(self, B: Sequence[Tensor], C: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Pack ragged per-subspace matrices (PEFT's `adamss_A` and `adamss_B`) into B (RHO, R) and C (N, r_max).

        Args:
            B: K matrices (r_k, R).
            C: K matrices (n_k, r_k).

        Raises:
            ValueError: A list's length, or a matrix' shape, does not fit this layout.
        """
        if len(B) != self.num_subspaces or len(C) != self.num_subspaces:
            raise ValueError(f"B, C: expected {self.num_subspaces} matrices each, got {len(B)} and {len(C)}")
        for k, (B_k, C_k, n_k, r_k) in enumerate(zip(B, C, self.sizes, self.ranks, strict=True)):
            if B_k.shape != (r_k, B[0].shape[-1]):
                raise ValueError(f"B[{k}]: expected shape {(r_k, B[0].shape[-1])}, got {tuple(B_k.shape)}")
            if C_k.shape != (n_k, r_k):
                raise ValueError(f"C[{k}]: expected shape {(n_k, r_k)}, got {tuple(C_k.shape)}")
        return torch.cat(list(B)), pack_columns(C, self.ragged_index(), self.num_rows, self.r_max)

    def unpack(self, B: Tensor, C: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Split packed B (RHO, R) and C (N, r_max) into K matrices (r_k, R) and K matrices (n_k, r_k)."""
        ragged_C = [C[self.rows(k), :r_k] for k, r_k in enumerate(self.ranks)]
        return list(B.split(list(self.ranks))), ragged_C


def pack_columns(C: Sequence[Tensor], ragged_index: Tensor, N: int, r_max: int) -> Tensor:
    """Return the packed C (N, r_max) of K ragged matrices (n_k, r_k), differentiably; see `ragged_index`."""
    if all(C_k.shape[1] == r_max for C_k in C):
        flat = torch.cat(list(C)).view(-1)
    else:
        flat = torch.cat([C_k.reshape(-1) for C_k in C])
    return flat.new_zeros(N * r_max).scatter_(0, ragged_index, flat).view(N, r_max)


def gather_index(row_subspace: Tensor, offsets: Tensor, r_max: int) -> Tensor:
    """Return (N, r_max) int64: the column of S that multiplies C[i, j]; RHO where C[i, j] is structural.

    Args:
        row_subspace: (N,) int32.
        offsets: (K + 1,) int32.
        r_max: Columns of C.
    """
    k = row_subspace.long()
    index = offsets[k].long()[:, None] + torch.arange(r_max, device=offsets.device)
    return torch.where(index < offsets[k + 1][:, None], index, offsets[-1].long())


def column_mask(subspaces: Tensor, offsets: Tensor, rho: int) -> Tensor:
    """Spread a mask (K,) bool over subspaces to (RHO,) bool over the columns of S."""
    columns = torch.arange(rho, device=offsets.device, dtype=offsets.dtype)
    # Not `searchsorted`, which ONNX has nothing for.
    return subspaces[(columns[:, None] >= offsets[1:]).sum(1)]


def block_diagonal(C: Tensor, row_subspace: Tensor, offsets: Tensor, rho: int) -> Tensor:
    """Return (RHO, N) with entry (off_k(i) + j, i) = C[i, j] and zero elsewhere."""
    N, r_max = C.shape
    # Structural zeros of C land in an extra last row, which is cut off.
    padded = C.new_zeros(rho + 1, N)
    return padded.scatter_(0, gather_index(row_subspace, offsets, r_max).T, C.T)[:rho]

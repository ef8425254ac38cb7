"""`RowStack`: the trainable matrices of all layers as a few tall ones, so that ASA costs a few kernels per step.

Every row of every B and C belongs to one subspace, so matrices of equal row length can be stacked whatever layer they
come from. A model has two stacks as a rule, all its Bs (rows of R) and all its Cs (rows of r_max). Under FSDP a stack
holds this rank's rows, and sums over rows are reduced over the ranks. What is done to each element alone is done to all
stacks of a device at once: they are parts of an `ImportanceBank`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import full_tensor, shard_like, sum_over_shards, with_sharding


class Member(NamedTuple):
    """One trainable matrix: parameter `which` ("B" or "C", or a PEFT list's number) of the module called `name`."""

    name: str
    layer: nn.Module
    which: str

    @property
    def key(self) -> str:
        """Name of the matrix in state dicts."""
        return f"{self.name}.{self.which}"

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter as it is now: FSDP and device moves may replace it."""
        parameter = self.layer._parameters[self.which]
        assert parameter is not None
        return parameter


Part = tuple[Member, Tensor, Tensor]
"""A member, and of each of its rows over all ranks the subspace (int64) and the weight in the subspace's mean."""


class RowStack:
    """Matrices of one row length on top of each other, with their part of the bank's averages.

    Attributes:
        members: What is stacked, in order.
        importance: (rows, width) of `dtype`, EMA of |w * g|.
        uncertainty: (rows, width), EMA of the deviation of |w * g| from the importance before it.
        sharding: Device mesh and placements of the parameters; (None, ()) for plain tensors.
        device: Where this rank's rows are.
        dtype: Of the averages: float32, or float64 for float64 parameters.
        num_elements: rows times width on this rank.
    """

    importance: Tensor
    uncertainty: Tensor
    measured: Tensor
    scratch: Tensor

    def __init__(self, parts: Sequence[Part], num_subspaces: int) -> None:
        """Stack `parts`: members, each with the subspace and the weight in its mean of every row, over all ranks."""
        self.members = [member for member, _, _ in parts]
        self._num_subspaces = num_subspaces
        self._slots = [(member.layer._parameters, member.which) for member in self.members]
        example = self.members[0].parameter
        self._mesh = getattr(example, "device_mesh", None)
        self._placements = tuple(getattr(example, "placements", ()))
        self.sharding = (self._mesh, self._placements)

        owners = [self._local_rows(owner) for _, owner, _ in parts]
        self._rows = [len(owner) for owner in owners]
        # On the CPU: events sum rows there, in one order, as floating-point atomics on a GPU would not.
        self._owner = torch.cat(owners)
        self._share = torch.cat([self._local_rows(share) for _, _, share in parts])

        self.device = self._local([example])[0].device
        self._parameter_dtype = example.dtype
        self.dtype = torch.promote_types(example.dtype, torch.float32)
        self._shape = (sum(self._rows), example.shape[1])
        self.num_elements = self._shape[0] * self._shape[1]
        self._runs = _runs(self._rows, example.shape[1] if self.device.type == "cpu" else 0)
        self._touched: list[tuple[Member, Tensor]] = []
        self._touched_rows: list[int] = []
        self._frozen = torch.empty(0, 1, dtype=torch.bool, device=self.device)
        self._saved: Tensor | None = None

    def use_buffers(self, *buffers: Tensor) -> None:
        """Take importance, uncertainty, measured and scratch, each (num_elements,), from the bank."""
        shaped = (buffer.view(self._shape) for buffer in buffers)
        self.importance, self.uncertainty, self.measured, self.scratch = shaped

    def is_current(self) -> bool:
        """Whether the parameters still have the device and dtype that they had when the stack was built."""
        # Moves and casts change all members alike: the first one tells.
        first = self.members[0].parameter
        return first.device == self.device and first.dtype == self._parameter_dtype

    def gather(self) -> None:
        """Copy the weights into `measured` and their gradients into `scratch`.

        Raises:
            RuntimeError: The parameters have been resharded since the stack was built.
        """
        parameters = self.parameters()
        grads = [parameter.grad for parameter in parameters]
        if any(grad is None for grad in grads):
            # A layer that this step did not use: its importance was zero.
            grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
        self._stack(parameters, self.measured)
        self._stack(grads, self.scratch)  # type: ignore[arg-type]

    def scores(self, dtype: torch.dtype | None) -> Tensor:
        """Return each subspace's mean of importance * uncertainty over its elements in this stack.

        A subspace with a weight that is not finite has a score that is not finite. Reduced over the ranks that share
        the rows.

        Args:
            dtype: Of the products; None for that of the EMAs. Sums are float64.

        Returns:
            (total number of subspaces,) float64 on the CPU; zero for subspaces without rows here.
        """
        importance, uncertainty = (t if dtype is None else t.to(dtype) for t in (self.importance, self.uncertainty))
        rows = importance.mul(uncertainty).sum(1, dtype=torch.float64)
        rows += self._stack(self.parameters(), self.scratch).sum(1, dtype=torch.float64) * 0.0
        total = torch.bincount(self._owner, weights=rows.cpu() * self._share, minlength=self._num_subspaces)
        return self.reduce(total.to(self.device)).cpu()

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` in place over the ranks that hold other rows of this stack, and return it."""
        return sum_over_shards(tensor, self.members[0].parameter)

    def freeze(self, frozen: Tensor) -> None:
        """Choose the rows that `save_rows` and `restore_rows` protect: those of the subspaces in `frozen` (bool, CPU).

        Only matrices with such a row are touched at all.
        """
        chosen = [
            (member, rows)
            for member, rows in zip(self.members, frozen[self._owner].split(self._rows), strict=True)
            if bool(rows.any())
        ]
        self._touched_rows = [len(rows) for _, rows in chosen]
        self._frozen = torch.cat([rows for _, rows in chosen] or [frozen[:0]])[:, None].to(self.device)
        keep = (~self._frozen).to(self.dtype).expand(-1, self._shape[1]).contiguous()
        self._touched = [
            (member, part) for (member, _), part in zip(chosen, keep.split(self._touched_rows), strict=True)
        ]
        self._saved = None

    def save_rows(self) -> None:
        """Remember the touched matrices as they are before an optimizer step."""
        if self._touched:
            self._saved = torch.cat(self._local([member.parameter for member, _ in self._touched]))

    def restore_rows(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo, bit for bit, what a step did to frozen rows, and zero their entries of the optimizer's state."""
        if self._saved is None:
            return
        parameters = self._local([member.parameter for member, _ in self._touched])
        restored = torch.where(self._frozen, self._saved, torch.cat(parameters))
        torch._foreach_copy_(parameters, list(restored.split(self._touched_rows)))
        self._saved = None

        states: list[Tensor] = []
        keeps: list[Tensor] = []
        for member, keep in self._touched:
            parameter = member.parameter
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    states.append(value)
                    keeps.append(keep)
        if states:
            torch._foreach_mul_(self._local(states), keeps)

    def export(self, stacked: Tensor) -> dict[str, Tensor]:
        """Cut a copy of `stacked` (rows, width) into the members' matrices, sharded as they are."""
        return {
            member.key: with_sharding(part.clone(), member.parameter)
            for member, part in zip(self.members, self.parts(stacked), strict=True)
        }

    def parts(self, stacked: Tensor) -> tuple[Tensor, ...]:
        """Return this rank's rows of each member as views of `stacked` (rows, width)."""
        return stacked.split(self._rows)

    def load(self, stacked: Tensor, matrices: Mapping[str, Tensor]) -> None:
        """Fill `stacked` (rows, width) from what `export` returned, also when it was sharded otherwise."""
        for member, part in zip(self.members, self.parts(stacked), strict=True):
            part.copy_(self._local_rows(full_tensor(matrices[member.key])))

    def require(self, matrices: Mapping[str, Tensor]) -> None:
        """Check that `load` can take `matrices`.

        Raises:
            ValueError: A matrix is missing or has another shape than its parameter.
        """
        for member in self.members:
            expected = tuple(member.parameter.shape)
            if member.key not in matrices:
                raise ValueError(f"state_dict: expected an entry for {member.key!r}, got none")
            if tuple(matrices[member.key].shape) != expected:
                got = tuple(matrices[member.key].shape)
                raise ValueError(f"state_dict: {member.key!r}: expected shape {expected}, got {got}")

    def parameters(self) -> list[Tensor]:
        """Return `member.parameter` of every member, without its cost: this runs in every step."""
        return [parameters[which] for parameters, which in self._slots]  # type: ignore[misc]

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors if self._mesh is None else [tensor.to_local() for tensor in tensors]  # type: ignore[attr-defined]

    def _local_rows(self, full: Tensor) -> Tensor:
        """Return this rank's rows of a tensor whose rows are those of a member, on the tensor's device."""
        if self._mesh is None:
            return full
        local: Any = shard_like(full, self.members[0].parameter)
        return local.to_local().to(full.device)

    def _stack(self, tensors: list[Tensor], out: Tensor) -> Tensor:
        """Put this rank's part of the members' `tensors` on top of each other into `out`."""
        local = self._local(tensors)
        # Sharding changes all members alike: the first one tells.
        if local[0].shape[0] != self._rows[0]:
            raise RuntimeError(
                f"SubspaceAllocator: expected {self._rows[0]} parameter rows on this rank, as at first use, got "
                f"{local[0].shape[0]}; shard the model before its first optimizer step"
            )
        for members, rows in self._runs:
            torch.cat(local[members], out=out[rows])
        return out


def _runs(rows: list[int], width: int) -> list[tuple[slice, slice]]:
    """Cut members of `rows` rows into runs of under 2^15 elements: (members, their rows).

    The CPU's `torch.cat` copies up to that many elements in one loop, and beyond slices and copies tensor by tensor,
    which takes several times as long. A width of 0 asks for one run.
    """
    runs: list[tuple[slice, slice]] = []
    first = start = at = 0
    for member, count in enumerate(rows):
        if member > first and (at + count - start) * width >= 1 << 15:
            runs.append((slice(first, member), slice(start, at)))
            first, start = member, at
        at += count
    return [*runs, (slice(first, len(rows)), slice(start, at))]


def stack_key(member: Member) -> tuple[Any, ...]:
    """Return what members of one stack have in common: device, dtype, row length and sharding.

    Raises:
        NotImplementedError: The parameter is sharded along another dimension than 0.
    """
    parameter = member.parameter
    placements = tuple(getattr(parameter, "placements", ()))
    if any(not placement.is_replicate() and placement.dim != 0 for placement in placements):
        raise NotImplementedError(f"{member.key}: expected a parameter sharded along dimension 0, got {placements}")
    return parameter.device, parameter.dtype, parameter.shape[1], getattr(parameter, "device_mesh", None), placements

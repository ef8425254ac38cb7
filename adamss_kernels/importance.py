"""ASA's importance of every element, |w * g| and its two averages, over all stacked matrices at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import FusedAdaMSSLinear
from .row_stack import Member, Part, RowStack, stack_key

_CPU_BLOCK = 2**15
"""Elements that a CPU takes through all operations before the next ones, where four times as many leave its cache."""


def build_banks(layers: Mapping[str, FusedAdaMSSLinear], betas: tuple[float, float]) -> list[ImportanceBank]:
    """Stack B and C of all `layers` by device, dtype, row length and sharding; one bank per device and dtype.

    Args:
        layers: Adapted layers by name. Subspaces are numbered through them in this order.
        betas: EMA coefficients of the importance and of its uncertainty.

    Raises:
        NotImplementedError: A parameter is sharded along another dimension than 0.
    """
    parts: list[Part] = []
    first = 0
    for name, layer in layers.items():
        ranks = torch.tensor(layer.layout.ranks, device="cpu")
        row_subspace = layer.row_subspace.cpu().long()
        sizes = torch.tensor(layer.layout.sizes, device="cpu")
        of_B = torch.repeat_interleave(torch.arange(len(ranks), device="cpu"), ranks)
        for which, owner, elements in (
            ("B", of_B, ranks * layer.basis.shape[0]),
            ("C", row_subspace, ranks * sizes),
        ):
            parts.append((Member(name, layer, which), owner + first, 1 / elements.double()[owner]))
        first += len(ranks)
    return stack_banks(parts, first, betas)


def stack_banks(parts: Sequence[Part], num_subspaces: int, betas: tuple[float, float]) -> list[ImportanceBank]:
    """Stack `parts` by device, dtype, row length and sharding; one bank per device and dtype.

    Raises:
        NotImplementedError: A parameter is sharded along another dimension than 0.
    """
    alike: dict[Any, list[Part]] = {}
    for part in parts:
        alike.setdefault(stack_key(part[0]), []).append(part)
    banks: dict[Any, list[RowStack]] = {}
    for same_rows in alike.values():
        stack = RowStack(same_rows, num_subspaces)
        banks.setdefault((stack.device, stack.dtype), []).append(stack)
    return [ImportanceBank(stacks, betas) for stacks in banks.values()]


def measure(banks: Sequence[ImportanceBank]) -> Tensor:
    """Compute |w * g| in all `banks` and return its sum over this rank, 0-dim, on the first one's device.

    A sum that is not finite stays so in every sum that contains it, so it tells of the whole step.
    """
    home = banks[0].device
    return functools.reduce(torch.add, (bank.measure().to(home, non_blocking=True) for bank in banks))


def sum_over_ranks(banks: Sequence[ImportanceBank], total: Tensor) -> Tensor:
    """Sum what `measure` returned over the ranks that hold other rows, in place where there are such."""
    for stack in {stack.sharding: stack for bank in banks for stack in bank.stacks}.values():
        total = stack.reduce(total)
    return total


def accumulate(banks: Sequence[ImportanceBank], total: Tensor) -> None:
    """Let the averages of all `banks` take in what `measure` computed, unless its sum `total` is not finite."""
    if total.device.type == "cpu":
        if math.isfinite(total.item()):
            for bank in banks:
                bank.accumulate(None)
        return
    # Decided on the device: a read-back would stall it at every step.
    valid = torch.isfinite(total)
    for bank in banks:
        bank.accumulate(valid.to(bank.device, non_blocking=True))


class ImportanceBank:
    """The averages of all stacks of one device and dtype, each in one flat buffer that the stacks share.

    Attributes:
        stacks: Their stacks.
        device: Where they are.
    """

    def __init__(self, stacks: Sequence[RowStack], betas: tuple[float, float]) -> None:
        """Allocate for `stacks`, with EMA coefficients `betas` of the importance and of its uncertainty."""
        self.stacks = stacks
        self.device, dtype = stacks[0].device, stacks[0].dtype
        sizes = [stack.num_elements for stack in stacks]
        buffers = [torch.zeros(sum(sizes), dtype=dtype, device=self.device) for _ in range(4)]
        self._importance, self._uncertainty, self._measured, _ = buffers
        for stack, *parts in zip(stacks, *(buffer.split(sizes) for buffer in buffers), strict=True):
            stack.use_buffers(*parts)
        in_blocks = self.device.type == "cpu" and sum(sizes) > _CPU_BLOCK
        block = _CPU_BLOCK if in_blocks else max(1, sum(sizes))
        self._blocks = list(zip(*(buffer.split(block) for buffer in buffers), strict=True))
        # 0-dim tensors, so that the device can zero them for a step that does not count.
        self._weights = tuple(torch.tensor(1 - beta, dtype=dtype, device=self.device) for beta in betas)

    def measure(self) -> Tensor:
        """Compute |w * g| of every element from the present weights and gradients; `accumulate` uses it.

        Returns:
            Its sum over this rank's elements, a 0-dim tensor: finite exactly when all of it is.
        """
        for stack in self.stacks:
            stack.gather()
        sums = [measured.mul_(grad).abs_().sum() for _, _, measured, grad in self._blocks]
        return functools.reduce(torch.add, sums)

    def accumulate(self, valid: Tensor | None) -> None:
        """Let both EMAs take in the measured |w * g|, unless the step does not count.

        uncertainty = b2 uncertainty + (1 - b2) ||w g| - importance|, then importance = b1 importance + (1 - b1) |w g|.

        Args:
            valid: Whether it counts, a 0-dim bool on this device that nobody has read; None if it does.
        """
        weight1, weight2 = self._weights
        if valid is not None:
            # With weight 0 a lerp changes nothing, not even rounding, provided that its end is finite.
            weight1, weight2 = weight1 * valid, weight2 * valid
            self._measured.nan_to_num_(0.0, 0.0, 0.0)
        for importance, uncertainty, measured, scratch in self._blocks:
            deviation = torch.sub(measured, importance, out=scratch).abs_()
            uncertainty.lerp_(deviation, weight2)
            importance.lerp_(measured, weight1)

    def reset(self) -> None:
        """Restart both EMAs at zero."""
        self._importance.zero_()
        self._uncertainty.zero_()

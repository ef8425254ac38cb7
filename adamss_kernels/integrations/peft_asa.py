"""`AdapterAllocation`: PEFT's Adaptive Subspace Allocation over the subspaces of all layers at once; see docs/asa.md.

PEFT keeps two averages for each of the two matrices of every subspace, in lists on its layers. They stay there, but as
parts of a few flat buffers, so that a step costs two passes over those and not eight small kernels per subspace.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..distributed import full_tensor, is_sharded, shard_like, sum_over_shards, with_sharding
from ..importance import ImportanceBank, accumulate, measure, stack_banks, sum_over_ranks
from ..row_stack import Member
from ..schedule import is_event, scheduled_budget, survivors

logger = logging.getLogger(__name__)


class _Matrix(NamedTuple):
    """Matrix k of PEFT's list "A" or "B" in one layer, and the two lists that have its averages at the same place."""

    layer: Any
    importance: dict[str, list[Tensor | None]]
    uncertainty: dict[str, list[Tensor | None]]
    k: int
    member: Member


def _matrices(name: str, layer: Any, adapter: str) -> list[_Matrix]:
    return [
        _Matrix(layer, importance, uncertainty, k, Member(f"{name}.adamss_{which}.{adapter}", values, str(k)))
        for which, values, importance, uncertainty in (
            ("A", layer.adamss_A[adapter], layer.exp_avg_ipt_A, layer.exp_avg_unc_A),
            ("B", layer.adamss_B[adapter], layer.exp_avg_ipt_B, layer.exp_avg_unc_B),
        )
        for k in range(layer.num_subspaces[adapter])
    ]


class AdapterAllocation:
    """Scores the subspaces of one adapter and freezes the least important ones on schedule.

    What is frozen is in `requires_grad` and the averages are in PEFT's lists, as in PEFT: this object only caches.
    """

    def __init__(self, layers: Mapping[str, Any], adapter: str, config: Any) -> None:
        """Cover the `layers` (by name) of `adapter`; `config` is its `AdamssConfig`."""
        self._layers = dict(layers)
        self._adapter = adapter
        self._config = config
        self._lists = [(layer.adamss_A[adapter], layer.adamss_B[adapter]) for layer in layers.values()]
        self._matrices = [m for name, layer in layers.items() for m in _matrices(name, layer, adapter)]
        self._slots = [(m.member.layer._parameters, m.member.which) for m in self._matrices]
        self._banks: list[ImportanceBank] = []
        self._bound: list[bool] = []
        self._views: list[tuple[_Matrix, Tensor, Tensor]] = []

    def is_current(self) -> bool:
        """Whether the layers still hold the matrices that this object was made for."""
        adapter = self._adapter
        return all(
            layer.adamss_A._modules.get(adapter) is A and layer.adamss_B._modules.get(adapter) is B
            for layer, (A, B) in zip(self._layers.values(), self._lists, strict=True)
        )

    @torch.no_grad()
    def update(self, step: int, peft_budget: int | None) -> None:
        """Let the averages take in the present gradients and, where an event is due, freeze subspaces.

        Args:
            step: Number of the optimizer step, within the warmup.
            peft_budget: Budget of PEFT's schedule, for PEFT's decisions; None for exact ones.

        Raises:
            ValueError: At an event, a score is not finite, or there has been no finite gradient to score.
        """
        parameters: list[Any] = [values[key] for values, key in self._slots]
        has_grad = [parameter.grad is not None for parameter in parameters]
        if any(has_grad):
            if not self._is_bound(parameters, has_grad):
                self._bind(has_grad)
            accumulate(self._banks, sum_over_ranks(self._banks, measure(self._banks)))
        if is_event(step, self._config, peft_budget is None):
            self._allocate(step, peft_budget)
            for layer in self._layers.values():
                layer.reset_importance(self._adapter)
            self._banks, self._views = [], []

    def release(self) -> None:
        """Give PEFT's lists tensors of their own."""
        for matrix, importance, uncertainty in self._views:
            for values, view in ((matrix.importance, importance), (matrix.uncertainty, uncertainty)):
                if values[self._adapter][matrix.k] is view:
                    values[self._adapter][matrix.k] = view.clone()
        self._banks, self._views = [], []

    def active_counts(self) -> dict[str, int]:
        """Return how many subspaces of each layer are still trained, by layer name."""
        counts = (sum(A.requires_grad or B.requires_grad for A, B in zip(*lists, strict=True)) for lists in self._lists)
        return dict(zip(self._layers, counts, strict=True))

    def _is_bound(self, parameters: list[Any], has_grad: list[bool]) -> bool:
        """Whether the averages of exactly the matrices with a gradient are in the banks, and PEFT's lists show them."""
        if not self._views or has_grad != self._bound:
            return False
        matrix, importance, _ = self._views[0]
        return (
            matrix.importance[self._adapter][matrix.k] is importance
            and importance.device == parameters[0].device
            and importance.dtype == torch.promote_types(parameters[0].dtype, torch.float32)
        )

    def _bind(self, has_grad: list[bool]) -> None:
        """Move the averages of the matrices with a gradient into banks, and views of them into PEFT's lists."""
        chosen = {
            (id(matrix.member.layer), matrix.member.which): matrix
            for matrix, found in zip(self._matrices, has_grad, strict=True)
            if found
        }
        # Rows get their subspaces and weights at events only, where PEFT's lists are the source.
        most = max(matrix.member.parameter.shape[0] for matrix in chosen.values())
        none, nothing = torch.zeros(most, dtype=torch.int64, device="cpu"), torch.zeros(most, device="cpu")
        parts = []
        for matrix in chosen.values():
            count = matrix.member.parameter.shape[0]
            parts.append((matrix.member, none[:count], nothing[:count]))
        betas = (self._config.asa_importance_beta, self._config.asa_uncertainty_beta)
        self._banks, self._bound, self._views = stack_banks(parts, 1, betas), has_grad, []
        for stack in (stack for bank in self._banks for stack in bank.stacks):
            matrices = zip(stack.members, stack.parts(stack.importance), stack.parts(stack.uncertainty), strict=True)
            for member, *rows in matrices:
                importance, uncertainty = (with_sharding(part, member.parameter) for part in rows)
                matrix = chosen[id(member.layer), member.which]
                for values, view in ((matrix.importance, importance), (matrix.uncertainty, uncertainty)):
                    before = values[self._adapter][matrix.k]
                    if before is not None:
                        view.copy_(before if is_sharded(before) else shard_like(before, view))
                    values[self._adapter][matrix.k] = view
                self._views.append((matrix, importance, uncertainty))

    def _scores(self) -> tuple[Tensor, Tensor]:
        """Return the score of every subspace, in the order of the layers, and whether PEFT would rank it; on the CPU.

        As in PEFT, the score is mean(importance * uncertainty) of A_k plus that of B_k, and only a subspace that has
        averages of both is ranked.
        """
        scores: list[Tensor] = []
        ranked: list[bool] = []
        zero = torch.zeros((), device=self._matrices[0].member.parameter.device)
        for layer in self._layers.values():
            averages = (layer.exp_avg_ipt_A, layer.exp_avg_unc_A, layer.exp_avg_ipt_B, layer.exp_avg_unc_B)
            for of_A, unc_A, of_B, unc_B in zip(*(lists[self._adapter] for lists in averages), strict=True):
                ranked.append(of_A is not None and of_B is not None)
                scores.append(_mean(of_A, unc_A) + _mean(of_B, unc_B) if ranked[-1] else zero)
        total = torch.stack([score.to(zero.device, torch.float32) for score in scores])
        return sum_over_shards(total, self._matrices[0].member.parameter).cpu(), torch.tensor(ranked, device="cpu")

    def _allocate(self, step: int, peft_budget: int | None) -> None:
        """Hold the event at `step`: rank the subspaces and freeze those beyond the budget."""
        scores, ranked = self._scores()
        pairs = [
            (name, k, A, B)
            for (name, _), lists in zip(self._layers.items(), self._lists, strict=True)
            for k, (A, B) in enumerate(zip(*lists, strict=True))
        ]
        self._require_finite(step, scores, pairs)
        trained = torch.tensor([A.requires_grad or B.requires_grad for _, _, A, B in pairs], device="cpu")
        exact = peft_budget is None
        budget = scheduled_budget(step, len(pairs), self._config) if peft_budget is None else peft_budget
        candidates = trained if exact else ranked
        keep = survivors(step, scores, candidates, budget, exact=exact, stacklevel=6)
        if torch.equal(keep, candidates):
            return
        for (_, _, A, B), ranks, stays in zip(pairs, candidates.tolist(), keep.tolist(), strict=True):
            if ranks:
                for parameter in (A, B):
                    parameter.requires_grad_(stays)
                    if not stays:
                        parameter.grad = None
        counts = self.active_counts()
        logger.info(
            "ASA step %d: budget %d, active subspaces %d -> %d, layers emptied: %s",
            step,
            budget,
            int(trained.sum()),
            sum(counts.values()),
            ", ".join(name for name, count in counts.items() if not count) or "none",
        )

    def _require_finite(self, step: int, scores: Tensor, pairs: list[tuple[str, int, Any, Any]]) -> None:
        for score, (name, k, _, _) in zip(scores.tolist(), pairs, strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"{name}: at step {step} the importance of subspace {k} is {score}: expected it finite"
                )
        if scores.any():
            return
        # Nothing was taken in since the last event: was no gradient finite?
        for name, k, *matrices in pairs:
            for parameter in matrices:
                if parameter.grad is not None and not bool(torch.isfinite(full_tensor(parameter.grad)).all()):
                    raise ValueError(
                        f"{name}: the gradient of subspace {k} is not finite at step {step}, and no step since the "
                        "last event could be scored: expected finite gradients"
                    )


def _mean(importance: Any, uncertainty: Any) -> Tensor:
    """Return the mean of the product; of DTensors this rank's share in it."""
    if not is_sharded(importance):
        return (importance * uncertainty).mean()
    return (importance.to_local() * uncertainty.to_local()).sum() / importance.numel()

"""ASA's decisions: after which steps subspaces are frozen, how many stay, and which."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .config import AdaMSSConfig


def is_event(step: int, config: Any, exact: bool) -> bool:
    """Whether subspaces are frozen after the optimizer step `step`; PEFT, which is not `exact`, may skip the last one.

    `config` is an `AdaMSSConfig` or PEFT's.
    """
    due = step % config.mask_interval == 0 or (exact and step == config.final_warmup)
    return due and config.init_warmup <= step <= config.final_warmup


def scheduled_budget(step: int, total: int, config: AdaMSSConfig) -> int:
    """Return how many of `total` subspaces stay after the event at `step`: the AdaMSS paper's cubic decay.

    int(T + (total - T) (1 - (t - t0) / (t1 - t0))^e), and never more than `total`.
    """
    remaining = 1.0 - (step - config.init_warmup) / (config.final_warmup - config.init_warmup)
    remaining = max(0.0, min(1.0, remaining))
    target = config.asa_target_subspaces
    return min(total, int(target + (total - target) * remaining**config.asa_schedule_exponent))


def keep_top(scores: Tensor, candidates: Tensor, budget: int) -> Tensor:
    """Return the mask (n,) of the `budget` candidates with the highest score, the lower index first among equals."""
    order = torch.argsort(scores.masked_fill(~candidates, -torch.inf), descending=True, stable=True)
    keep = torch.zeros_like(candidates)
    keep[order[:budget]] = True
    return keep & candidates


def keep_above_threshold(scores: Tensor, candidates: Tensor, budget: int) -> Tensor:
    """Return the mask (n,) that PEFT keeps: candidates that score strictly above the `budget`-th highest of them.

    So one fewer than the budget stays, or fewer where scores tie, and none where all are equal.
    """
    among = scores[candidates]
    if budget >= len(among):
        return candidates.clone()
    return candidates & (scores > among.sort(descending=True).values[budget - 1])


def survivors(step: int, scores: Tensor, candidates: Tensor, budget: int, *, exact: bool, stacklevel: int) -> Tensor:
    """Return the mask (n,) of the candidates that train on after the event at `step`: ours, or PEFT's if not `exact`.

    Warns where all scores are zero: then nothing is pruned, or, as in PEFT, everything. `stacklevel` is the warning's.
    """
    if budget >= int(candidates.sum()):
        return candidates
    if not scores[candidates].any():
        consequence = "nothing is pruned" if exact else "everything is frozen, as in PEFT"
        warnings.warn(f"ASA step {step}: all scores are zero, so {consequence}", stacklevel=stacklevel)
        if exact:
            return candidates
    return (keep_top if exact else keep_above_threshold)(scores, candidates, budget)

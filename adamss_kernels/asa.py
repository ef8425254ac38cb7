"""`SubspaceAllocator`: Adaptive Subspace Allocation, which trains ever fewer subspaces; see docs/asa.md."""

from __future__ import annotations

import itertools
import logging
import os
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import AdaMSSConfig, require_config
from .distributed import full_tensor, unwrap
from .importance import ImportanceBank, accumulate, build_banks, measure, sum_over_ranks
from .model import adamss_layers
from .pictures import draw_history
from .row_stack import RowStack
from .schedule import is_event, scheduled_budget, survivors

logger = logging.getLogger(__name__)


_STATE = ("importance", "uncertainty", "trainable", "active", "scored_steps", "history")
"""Keys of an allocator's state dict."""


class SubspaceAllocator:
    """Scores every subspace during warmup and freezes the least important ones on schedule.

    Call `attach(optimizer)` once, and `update_and_allocate(step)` after every `optimizer.step()` and before
    `zero_grad()`. The decisions land in the masks `trainable` (and, with `asa_mode="prune"`, `active`) of the layers,
    which every checkpoint stores. Under DDP and FSDP every rank calls it and takes the same decisions.

    Attributes:
        config: The hyperparameters.
        history: One entry per event: (step, budget, active subspaces of each layer after it).
    """

    def __init__(self, model: nn.Module, config: AdaMSSConfig) -> None:
        """Prepare the allocation for the adapted layers of `model`; subspaces are numbered in their order.

        Args:
            model: Adapted by `inject_adamss` or `load_adapter`; DDP and `torch.compile` wrappers are looked through.
                It may be moved and sharded until the first optimizer step.
            config: Uses the fields `asa_*`, `init_warmup`, `final_warmup` and `mask_interval`.

        Raises:
            TypeError: `config` is no `AdaMSSConfig`.
            ValueError: The model has no AdaMSS layer, `use_asa` is off, or `asa_compat="peft"` is combined with the
                layer scope, which PEFT does not have.

        Warns:
            UserWarning: No more subspaces are there than `asa_target_subspaces`, so that none will be frozen.
        """
        require_config(config)
        self._layers = adamss_layers(unwrap(model))
        if not self._layers:
            raise ValueError("model: has no FusedAdaMSSLinear; adapt it with inject_adamss first")
        if not config.use_asa:
            raise ValueError("config.use_asa = False: expected True for a SubspaceAllocator")
        if config.asa_compat == "peft" and config.asa_scope == "layer":
            raise ValueError("config.asa_scope = 'layer': expected 'global' with asa_compat='peft'")
        _warn_of_idle_target(config, [layer.layout.num_subspaces for layer in self._layers.values()])
        self.config = config
        self.history: list[tuple[int, int, list[int]]] = []
        self._sizes = [layer.layout.num_subspaces for layer in self._layers.values()]
        self._lazy_banks: list[ImportanceBank] | None = None
        self._attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._stepped = False
        self._found_inf: Tensor | None = None
        self._scored_steps = 0
        self._seen_masks: list[tuple[Tensor, int]] = []
        self._frozen: Tensor | None = None
        for layer in self._layers.values():
            layer.set_masks()

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Make `optimizer` leave frozen rows alone: each step restores them bit for bit and zeroes their state.

        From then on a call of `update_and_allocate` scores only if an attached optimizer has stepped since the last
        call, so that steps which a `GradScaler` skips do not count. Attaching an optimizer again does nothing.

        Args:
            optimizer: Any optimizer that runs the hooks of `torch.optim.Optimizer`; accelerate's wrapper is looked
                through. Its parameters include those of the adapted layers.

        Raises:
            TypeError: `optimizer` is no `torch.optim.Optimizer`.
            ValueError: The optimizer trains no adapted layer.
        """
        inner = getattr(optimizer, "optimizer", None)
        optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got a {type(optimizer).__qualname__}")
        if optimizer in self._attached:
            return
        ours = {id(p) for layer in self._layers.values() for p in (layer.B, layer.C)}
        if not any(id(p) in ours for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("optimizer: expected one that trains B or C of an adapted layer, got none of them")
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        self._attached.add(optimizer)

    @torch.no_grad()
    def update_and_allocate(self, step: int) -> None:
        """Score this optimizer step and, where an event is due, freeze subspaces.

        Events fall on multiples of `mask_interval` from `init_warmup` to `final_warmup`, and on `final_warmup`
        itself. Only they synchronise with the device.

        Args:
            step: Number of this optimizer step, counted as `init_warmup` and `final_warmup` are.

        Raises:
            RuntimeError: No adapted parameter has a gradient (called after `zero_grad`).
            ValueError: At an event, a score is not finite; the message names the layer. Nothing is changed then.

        Warns:
            UserWarning: At an event, all scores are zero, so that nothing is pruned.
        """
        config = self.config
        if config.init_warmup <= step <= config.final_warmup:
            if self._stepped or not self._attached:
                self._score()
            if is_event(step, config, config.asa_compat is None):
                self._allocate(step)
        self._stepped = False

    def active_counts(self) -> dict[str, int]:
        """Return how many subspaces of each layer are still trained, by layer name (synchronises)."""
        return dict(zip(self._layers, self._counts(self._trained()), strict=True))

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """Return everything that a resumed run needs besides the weights and the optimizer, also between events.

        EMAs are in the shape of their parameters, as DTensors where those are. The result is a copy, loads with
        `torch.load(weights_only=True)`, and goes through `torch.distributed.checkpoint`.
        """
        importance, uncertainty = _averages(self._banks())
        return {
            "importance": importance,
            "uncertainty": uncertainty,
            "trainable": {name: layer.trainable.clone() for name, layer in self._layers.items()},
            "active": {name: layer.active.clone() for name, layer in self._layers.items()},
            "scored_steps": self._scored_steps,
            "history": [list(event) for event in self.history],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, masks included; under FSDP every rank calls it.

        Raises:
            ValueError: An entry is missing, or the layers or shapes are not those of this model. Nothing is changed.
        """
        missing = [key for key in _STATE if key not in state_dict]
        if missing:
            raise ValueError(f"state_dict: expected the entries {list(_STATE)}, got none for {missing}")
        for name, layer in self._layers.items():
            for key, mask in (("trainable", layer.trainable), ("active", layer.active)):
                if name not in state_dict[key]:
                    raise ValueError(f"state_dict[{key!r}]: expected an entry for layer {name!r}, got none")
                stored = state_dict[key][name]
                if stored.shape != mask.shape:
                    raise ValueError(
                        f"state_dict[{key!r}][{name!r}]: expected shape {tuple(mask.shape)}, got {tuple(stored.shape)}"
                    )
        banks = self._banks()
        for stack in _stacks(banks):
            for key in ("importance", "uncertainty"):
                stack.require(state_dict[key])
        _load_averages(banks, state_dict["importance"], state_dict["uncertainty"])
        for name, layer in self._layers.items():
            layer.set_masks(state_dict["active"][name], state_dict["trainable"][name])
        self._scored_steps = state_dict["scored_steps"]
        self.history = [(step, budget, list(counts)) for step, budget, counts in state_dict["history"]]

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the active subspaces of every layer over the events so far into the image file `path`.

        Raises:
            ValueError: There has been no event yet.
            ImportError: matplotlib is missing (`pip install adamss-kernels[demo]`).
        """
        sizes = dict(zip(self._layers, self._sizes, strict=True))
        draw_history(path, self.history, sizes, self.config.init_warmup, self.config.mask_interval)

    def _banks(self) -> list[ImportanceBank]:
        # Not in __init__: the model may still be moved, cast or sharded.
        before = self._lazy_banks
        if before is not None and all(stack.is_current() for bank in before for stack in bank.stacks):
            return before
        betas = (self.config.asa_importance_beta, self.config.asa_uncertainty_beta)
        banks = self._lazy_banks = build_banks(self._layers, betas)
        self._frozen = None
        if before is not None:  # the averages follow the parameters
            _load_averages(banks, *_averages(before))
        return banks

    def _score(self) -> None:
        """Let the EMAs take in this step, unless a gradient is not finite anywhere in the model (on any rank)."""
        banks = self._banks()
        stacks = _stacks(banks)
        if all(parameter.grad is None for stack in stacks for parameter in stack.parameters()):
            raise RuntimeError(
                "update_and_allocate: no adapted parameter has a gradient; call it after optimizer.step() and before "
                "optimizer.zero_grad()"
            )
        total = measure(banks)
        if self._found_inf is not None:
            # A fused optimizer under GradScaler runs its hooks also when it skips.
            total = torch.where(self._found_inf.to(total.device, non_blocking=True) == 0, total, torch.nan)
        accumulate(banks, sum_over_ranks(banks, total))
        self._scored_steps += 1

    def _allocate(self, step: int) -> None:
        """Hold the event at `step`: rank the subspaces, freeze those beyond the budget, restart the EMAs."""
        config = self.config
        exact = config.asa_compat is None
        banks = self._banks()
        parts = [stack.scores(torch.float64 if exact else None) for stack in _stacks(banks)]
        scores = torch.stack(parts).sum(0)
        self._require_finite(step, scores)

        active, trainable = self._masks()
        before = active & trainable
        after = before.clone()
        scopes = (
            torch.arange(len(scores), device="cpu").split(self._sizes) if config.asa_scope == "layer" else [slice(None)]
        )
        budgets = []
        for scope in scopes:
            candidates = before[scope]
            budgets.append(scheduled_budget(step, len(candidates), config))
            after[scope] = survivors(step, scores[scope], candidates, budgets[-1], exact=exact, stacklevel=5)
        if not torch.equal(before, after):
            prune = config.asa_mode == "prune"
            masks = zip((after if prune else active).split(self._sizes), after.split(self._sizes), strict=True)
            for layer, (layer_active, layer_trainable) in zip(self._layers.values(), masks, strict=True):
                layer.set_masks(layer_active, layer_trainable)
        for bank in banks:
            bank.reset()
        self._scored_steps = 0
        self._record(step, sum(budgets), before, after)

    def _require_finite(self, step: int, scores: Tensor) -> None:
        bad = ~torch.isfinite(scores)
        if bad.any():
            name, k = self._locate(int(bad.nonzero()[0]))
            raise ValueError(
                f"{name}: at step {step} the importance of subspace {k} is {scores[bad][0].item()}: expected a finite "
                "value; its weights or gradients have diverged"
            )
        if self._attached or not self._scored_steps or scores.any():
            return
        # Nothing was taken in since the last event, although there were steps: was no gradient finite?
        for name, layer in self._layers.items():
            for which, parameter in (("B", layer.B), ("C", layer.C)):
                if parameter.grad is not None and not bool(torch.isfinite(full_tensor(parameter.grad)).all()):
                    raise ValueError(
                        f"{name}: the gradient of {which} is not finite at step {step}, and no step since the last "
                        "event could be scored: expected finite gradients"
                    )

    def _masks(self) -> tuple[Tensor, Tensor]:
        """Return `active` and `trainable` of all layers, (total,) bool on the CPU. The buffers are the truth."""
        masks = self._mask_buffers()
        if not all(mask.is_cpu for mask in masks) and len({mask.device for mask in masks}) > 1:
            masks = [mask.cpu() for mask in masks]
        active, trainable = torch.cat(masks).cpu().view(2, -1)
        return active, trainable

    def _mask_buffers(self) -> list[Tensor]:
        """Return `active` of every layer, then `trainable`; past `nn.Module.__getattr__`, as every step asks."""
        layers = self._layers.values()
        return [layer._buffers[name] for name in ("active", "trainable") for layer in layers]  # type: ignore[misc]

    def _trained(self) -> Tensor:
        """Return (total,) bool on the CPU: subspaces that are trainable and contribute."""
        active, trainable = self._masks()
        return active & trainable

    def _counts(self, trained: Tensor) -> list[int]:
        flags = iter(trained.tolist())
        return [sum(itertools.islice(flags, size)) for size in self._sizes]

    def _locate(self, index: int) -> tuple[str, int]:
        """Return the layer's name and the number within it of subspace `index`."""
        for name, size in zip(self._layers, self._sizes, strict=True):
            if index < size:
                return name, index
            index -= size
        raise IndexError(index)

    def _record(self, step: int, budget: int, before: Tensor, after: Tensor) -> None:
        counts = self._counts(after)
        self.history.append((step, budget, counts))
        had = self._counts(before)
        emptied = [name for name, old, new in zip(self._layers, had, counts, strict=True) if old and not new]
        logger.info(
            "ASA step %d: budget %d, active subspaces %d -> %d, layers emptied: %s",
            step,
            budget,
            sum(had),
            sum(counts),
            ", ".join(emptied) or "none",
        )

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        stacks = _stacks(self._banks())
        if self._masks_may_have_changed():
            frozen = ~self._trained()
            if self._frozen is None or not torch.equal(frozen, self._frozen):
                for stack in stacks:
                    stack.freeze(frozen)
                self._frozen = frozen
        with torch.no_grad():
            for stack in stacks:
                stack.save_rows()

    def _masks_may_have_changed(self) -> bool:
        """Whether the masks need a look: always on the CPU, else where a buffer's version counter tells of a change."""
        masks = self._mask_buffers()
        if any(mask.is_cpu for mask in masks):
            return True
        before, self._seen_masks = self._seen_masks, [(mask, mask._version) for mask in masks]
        return len(before) != len(masks) or any(
            mask is not old or version != old_version
            for (mask, version), (old, old_version) in zip(self._seen_masks, before, strict=True)
        )

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped = True
        self._found_inf = getattr(optimizer, "found_inf", None)
        with torch.no_grad():
            for stack in _stacks(self._lazy_banks or ()):
                stack.restore_rows(optimizer)


def _warn_of_idle_target(config: AdaMSSConfig, sizes: Sequence[int]) -> None:
    """Warn where there are no more subspaces than are to stay, in the model or, with that scope, in any layer."""
    is_global = config.asa_scope == "global"
    available = sum(sizes) if is_global else max(sizes)
    if config.asa_target_subspaces >= available:
        warnings.warn(
            f"asa_target_subspaces={config.asa_target_subspaces}: nothing will be pruned, since "
            f"{'the model has' if is_global else 'no layer has more than'} {available} subspaces",
            stacklevel=3,
        )


def _averages(banks: Sequence[ImportanceBank]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return copies of the importance and of the uncertainty of every matrix in `banks`, by its name."""
    importance: dict[str, Tensor] = {}
    uncertainty: dict[str, Tensor] = {}
    for stack in _stacks(banks):
        importance |= stack.export(stack.importance)
        uncertainty |= stack.export(stack.uncertainty)
    return importance, uncertainty


def _load_averages(
    banks: Sequence[ImportanceBank], importance: Mapping[str, Tensor], uncertainty: Mapping[str, Tensor]
) -> None:
    for stack in _stacks(banks):
        stack.load(stack.importance, importance)
        stack.load(stack.uncertainty, uncertainty)


def _stacks(banks: Sequence[ImportanceBank]) -> list[RowStack]:
    return [stack for bank in banks for stack in bank.stacks]

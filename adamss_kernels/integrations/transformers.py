"""`ASACallback`: Adaptive Subspace Allocation in a `transformers.Trainer`, for our layers and for PEFT's."""

from __future__ import annotations

import base64
import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..asa import SubspaceAllocator
from ..config import ASA_FIELDS, AdaMSSConfig
from ..distributed import full_tensor, is_sharded, shard_like, unwrap
from ..model import adamss_layers
from ..schedule import is_event

logger = logging.getLogger(__name__)

ALIASES = {"target_kk": "asa_target_subspaces", "beta1": "asa_importance_beta", "beta2": "asa_uncertainty_beta"}
"""The argument names of the original AdaMSS scripts, where they differ from the config's."""

_OWN_FIELDS = ("asa_scope", "asa_mode", "asa_compat")


class ASACallback(TrainerCallback, ExportableState):
    """Prunes subspaces while a `Trainer` trains a model that `inject_adamss` or PEFT has adapted.

    The hyperparameters are those of the model's config; arguments replace single ones. The first optimizer step is
    step 1. The state goes into `trainer_state.json`, so a checkpoint that the Trainer can resume from has it, and a
    resumed run takes the decisions that the unbroken one would have taken. The Trainer's logs get `asa/active`, the
    number of subspaces still trained, and `asa/total`.

    Under FSDP2 the ranks put their rows of the averages together at the end of each step after which a checkpoint is
    written, which then loads on any number of ranks. A callback that asks for one has to come before this one.

    Attributes:
        overrides: The config fields that are replaced.
        verbose: Whether every event is logged at level WARNING, which is shown by default.
    """

    def __init__(self, *, verbose: bool = False, **overrides: Any) -> None:
        """Take overrides by the config's field names or by those of the original scripts.

        Args:
            verbose: Log every event at level WARNING, which is shown by default.
            **overrides: `asa_target_subspaces` (or `target_kk`), `init_warmup`, `final_warmup`, `mask_interval`,
                `asa_importance_beta` (or `beta1`), `asa_uncertainty_beta` (or `beta2`), `asa_schedule_exponent`; for
                our layers also `asa_scope`, `asa_mode` and `asa_compat`. `target_kk` counts as the config's
                `asa_scope` says.

        Raises:
            TypeError: An argument is unknown, or given under both of its names.
        """
        self.overrides: dict[str, Any] = {}
        for key, value in overrides.items():
            name = ALIASES.get(key, key)
            if name not in (*ASA_FIELDS, *_OWN_FIELDS):
                known = sorted((*ASA_FIELDS, *_OWN_FIELDS, *ALIASES))
                raise TypeError(f"ASACallback: unexpected argument {key!r}, expected one of {known}")
            if name in self.overrides:
                raise TypeError(f"ASACallback: {name} is given twice, once by its other name")
            self.overrides[name] = value
        self.verbose = verbose
        self._target: _OurLayers | _PeftModel | None = None
        self._gathered: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **_: Any) -> None:
        """Find the adapted layers; when the Trainer resumes, restore the state of the checkpoint.

        Raises:
            ValueError: The model has no AdaMSS layer or has `use_asa` off, an override is not valid, or the checkpoint
                has no state of this callback.

        Warns:
            UserWarning: Training ends before `final_warmup`, so before the last event.
        """
        self._target = _find_target(unwrap(model), optimizer, self.overrides)
        last = max(config.final_warmup for config in self._target.configs())
        if 0 < state.max_steps < last:
            warnings.warn(
                f"ASACallback: training ends at step {state.max_steps}, before the last event at "
                f"final_warmup={last}: more subspaces stay active than asked for",
                stacklevel=2,
            )
        stored = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step > 0:
            allocation = (stored or {}).get("attributes", {}).get("allocation")
            if allocation is None:
                raise ValueError(
                    f"ASACallback: the checkpoint of step {state.global_step} has no state of an ASACallback; was it "
                    "written without one?"
                )
            self._target.load(*_decode(allocation))
        self._gather()
        # The Trainer fills this entry at every checkpoint, but does not make it when it resumes.
        state.stateful_callbacks[type(self).__name__] = self.state()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Score the step that the optimizer has just done; the Trainer counts it only afterwards."""
        assert self._target is not None
        step = state.global_step + 1
        self._gathered = None
        before = self._target.active_counts() if self.verbose and self._target.is_event(step) else None
        self._target.update(step)
        if before is not None:
            after = self._target.active_counts()
            emptied = [name for name, count in after.items() if before[name] and not count]
            logger.warning(
                "ASA step %d: active subspaces %d -> %d, layers emptied: %s",
                step,
                sum(before.values()),
                sum(after.values()),
                ", ".join(emptied) or "none",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Put the state together where a checkpoint follows, of which the Trainer asks the first rank alone."""
        if control.should_save:
            self._gather()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Likewise, for checkpoints at the ends of epochs."""
        self.on_step_end(args, state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Likewise, for checkpoints that the evaluation decides about."""
        if self._target is not None and args.save_strategy == "best":
            self._gather()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Likewise, for what asks for the state after training."""
        self._gather()

    def _gather(self) -> None:
        """Under FSDP2, put the state of all ranks together (a collective call), unless it has been done already."""
        if self._target is not None and self._target.is_sharded() and self._gathered is None:
            self._gathered = _encode(*self._target.save())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """Add the number of active subspaces to the logs, and to the history that `trainer_state.json` keeps."""
        if self._target is None or logs is None:
            return
        counts = {"asa/active": sum(self._target.active_counts().values()), "asa/total": self._target.total()}
        logs.update(counts)
        if state.log_history:
            state.log_history[-1].update(counts)

    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` keeps: the arguments, and the averages, masks and history.

        Raises:
            RuntimeError: Under FSDP2, a checkpoint is written that this callback did not know of in time.
        """
        if self._target is None or self._target.is_sharded():
            allocation = self._gathered
        else:
            allocation = _encode(*self._target.save())
        if self._target is not None and allocation is None:
            raise RuntimeError(
                "ASACallback: a checkpoint is written that was not asked for by the end of the step, when all ranks "
                "put their rows together; pass the callback that asks for it before ASACallback"
            )
        return {"args": {"verbose": self.verbose, **self.overrides}, "attributes": {"allocation": allocation}}


class _OurLayers:
    """A model of `FusedAdaMSSLinear`s, which a `SubspaceAllocator` prunes."""

    def __init__(self, model: nn.Module, optimizer: Any, overrides: Mapping[str, Any]) -> None:
        layers = adamss_layers(model)
        config: AdaMSSConfig = next(iter(layers.values())).config
        self._config = dataclasses.replace(config, **overrides)
        if not config.use_asa:
            raise ValueError("ASACallback: expected AdaMSSConfig.use_asa = True in the model's config, got False")
        self._layers = list(layers.values())
        self._allocator = SubspaceAllocator(model, self._config)
        self._allocator.attach(optimizer)
        self._total = sum(layer.layout.num_subspaces for layer in layers.values())

    def configs(self) -> list[Any]:
        return [self._config]

    def is_sharded(self) -> bool:
        return any(is_sharded(parameter) for layer in self._layers for parameter in (layer.B, layer.C))

    def total(self) -> int:
        return self._total

    def active_counts(self) -> dict[str, int]:
        return self._allocator.active_counts()

    def is_event(self, step: int) -> bool:
        return is_event(step, self._config, self._config.asa_compat is None)

    def update(self, step: int) -> None:
        self._allocator.update_and_allocate(step)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        state = self._allocator.state_dict()
        tensors = {f"{kind}/{key}": full_tensor(t) for kind in _TENSORS for key, t in state[kind].items()}
        return tensors, {"scored_steps": state["scored_steps"], "history": state["history"]}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        state: dict[str, Any] = {kind: {} for kind in _TENSORS} | dict(rest)
        for name, tensor in tensors.items():
            kind, key = name.split("/", 1)
            state[kind][key] = tensor
        self._allocator.load_state_dict(state)


_TENSORS = ("importance", "uncertainty", "trainable", "active")


class _PeftModel:
    """PEFT's AdaMSS tuner, fused or not, which prunes by its own `update_and_allocate`."""

    def __init__(self, tuner: Any, overrides: Mapping[str, Any]) -> None:
        unknown = sorted(set(overrides) & set(_OWN_FIELDS))
        if unknown:
            raise ValueError(
                f"ASACallback: {', '.join(unknown)}: expected only with inject_adamss, not with a PEFT model"
            )
        self._tuner = tuner
        pruned = [name for name in tuner.active_adapters if tuner.peft_config[name].use_asa]
        if not pruned:
            raise ValueError("ASACallback: expected AdamssConfig.use_asa = True in an active adapter, got False in all")
        for name in pruned:
            config = tuner.peft_config[name]
            # PEFT before 0.20 takes any value.
            AdaMSSConfig(use_asa=True, **{field: getattr(config, field) for field in ASA_FIELDS} | dict(overrides))
            for field, value in overrides.items():
                setattr(config, field, value)
        self._adapters = pruned

    def _lists(self) -> dict[str, tuple[Any, str]]:
        """Return the pruned layers with their adapters, by a name that is unique for both."""
        return {
            f"{name}/{adapter}": (module, adapter)
            for name, module in self._tuner.model.named_modules()
            for adapter in self._adapters
            if hasattr(module, "exp_avg_ipt_A") and adapter in module.exp_avg_ipt_A
        }

    def is_sharded(self) -> bool:
        return any(is_sharded(parameter) for parameter in self._tuner.parameters())

    def configs(self) -> list[Any]:
        return [self._tuner.peft_config[name] for name in self._adapters]

    def total(self) -> int:
        return sum(module.num_subspaces[adapter] for module, adapter in self._lists().values())

    def active_counts(self) -> dict[str, int]:
        return {
            name: sum(
                A.requires_grad or B.requires_grad
                for A, B in zip(module.adamss_A[adapter], module.adamss_B[adapter], strict=True)
            )
            for name, (module, adapter) in self._lists().items()
        }

    def is_event(self, step: int) -> bool:
        exact = getattr(self._tuner, "asa_compat", "peft") is None
        return any(is_event(step, config, exact) for config in self.configs())

    def update(self, step: int) -> None:
        self._tuner.update_and_allocate(step)

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, (module, adapter) in self._lists().items():
            for kind in _PEFT_LISTS:
                for k, average in enumerate(getattr(module, kind)[adapter]):
                    if average is not None:
                        tensors[f"{name}/{kind}/{k}"] = full_tensor(average)
            pairs = list(zip(module.adamss_A[adapter], module.adamss_B[adapter], strict=True))
            tensors[f"{name}/trainable"] = torch.tensor(
                [[A.requires_grad, B.requires_grad] for A, B in pairs], device="cpu"
            )
            for k, matrices in enumerate(pairs):
                for which, matrix in zip("AB", matrices, strict=True):
                    # accelerate's whole state dict of a sharded PEFT model leaves out what does not train (any more).
                    if is_sharded(matrix) and not matrix.requires_grad:
                        tensors[f"{name}/frozen_{which}/{k}"] = full_tensor(matrix)
        return tensors, {}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
        for name, (module, adapter) in self._lists().items():
            trainable = tensors.get(f"{name}/trainable")
            K = module.num_subspaces[adapter]
            if trainable is None or len(trainable) != K:
                raise ValueError(
                    f"{name}: expected {K} subspaces in the checkpoint's ASA state, got other ones or none"
                )
            for k, flags in enumerate(trainable.tolist()):
                for values, flag in zip((module.adamss_A[adapter], module.adamss_B[adapter]), flags, strict=True):
                    values[k].requires_grad_(flag)
            with torch.no_grad():
                for which, values in (("A", module.adamss_A[adapter]), ("B", module.adamss_B[adapter])):
                    for k in range(K):
                        frozen = tensors.get(f"{name}/frozen_{which}/{k}")
                        if frozen is not None:
                            values[k].copy_(shard_like(frozen, values[k]))
            module.reset_importance(adapter)
            for kind in _PEFT_LISTS:
                for k in range(K):
                    average = tensors.get(f"{name}/{kind}/{k}")
                    if average is not None:
                        getattr(module, kind)[adapter][k] = average.to(module.adamss_A[adapter][k].device)


_PEFT_LISTS = ("exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")


def _find_target(model: nn.Module, optimizer: Any, overrides: Mapping[str, Any]) -> _OurLayers | _PeftModel:
    if adamss_layers(model):
        return _OurLayers(model, optimizer, overrides)
    for module in model.modules():
        if hasattr(module, "update_and_allocate") and hasattr(module, "_schedule_threshold"):
            return _PeftModel(module, overrides)
    raise ValueError(
        "ASACallback: the model has no AdaMSS layer; adapt it with inject_adamss or peft.get_peft_model first"
    )


def _encode(tensors: dict[str, Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """Return tensors, exactly, and plain values as something that JSON can hold."""
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return {"tensors": base64.b64encode(save(copies)).decode(), "rest": json.dumps(rest)}


def _decode(stored: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load(base64.b64decode(stored["tensors"])), json.loads(stored["rest"])

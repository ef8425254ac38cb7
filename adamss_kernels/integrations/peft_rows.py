"""Mixed batches of PEFT models: which adapter each row of a batch takes, as `adapter_names` says it."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

BASE = "__base__"
"""The name by which a row asks for no adapter, as PEFT's LoRA has it."""


class Rows:
    """The adapters of a batch, grouped once for all layers.

    Attributes:
        names: The adapter of each row, or `BASE`.
    """

    def __init__(self, names: Sequence[str]) -> None:
        """Take `adapter_names`."""
        self.names = tuple(names)
        self._groups: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def groups(self, x: Tensor) -> dict[str, Tensor]:
        """Return, for each adapter, which rows (int64) of the first dimension of x take it.

        Beams stand side by side, as `generate` expands them: then each name counts for as many rows.

        Raises:
            ValueError: That dimension is no multiple of the number of names.
        """
        count = x.shape[0]
        if not self.names or count % len(self.names):
            raise ValueError(f"adapter_names: expected a name for each of the {count} inputs, got {len(self.names)}")
        key = (count, x.device)
        if key not in self._groups:
            repeat, rows = count // len(self.names), {}
            for name in dict.fromkeys(self.names):
                taken = [i * repeat + j for i, other in enumerate(self.names) if other == name for j in range(repeat)]
                rows[name] = torch.tensor(taken, device=x.device)
            self._groups[key] = rows
        return self._groups[key]

    def repeated(self, count: int) -> list[str]:
        """Return a name for each of `count` rows."""
        repeat = max(1, count // len(self.names))
        return [name for name in self.names for _ in range(repeat)]


# Of this thread and task alone: other requests may be under way with other names.
_current: contextvars.ContextVar[Rows | None] = contextvars.ContextVar("adamss_rows", default=None)
current_rows = _current.get
"""Return the `Rows` of the batch under way, or None where it is not mixed."""


@contextlib.contextmanager
def rows_take(tuner: nn.Module, names: Sequence[str], known: set[str]) -> Iterator[None]:
    """Let row i of the batches inside take adapter names[i].

    Args:
        tuner: PEFT's model, whose modules that are saved whole follow too.
        names: `adapter_names`.
        known: The adapters that there are.

    Raises:
        ValueError: A name is unknown, the model is in training mode, or an adapter is merged.
    """
    if tuner.training:
        raise ValueError("adapter_names: expected a model in eval mode, got one in training mode")
    unknown = sorted(set(names) - known - {BASE})
    if unknown:
        raise ValueError(f"adapter_names: expected names of {sorted(known)} or {BASE!r}, got {unknown}")
    for name, module in tuner.named_modules():
        if getattr(module, "merged_adapters", None):
            raise ValueError(f"adapter_names: {name} has merged adapters; call unmerge_adapter first")
    with _hooking:
        for module in tuner.modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and _follow not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_follow, with_kwargs=True)
    token = _current.set(Rows(names))
    _count_batches(1)
    try:
        yield
    finally:
        _count_batches(-1)
        _current.reset(token)


is_mixing = False
"""Whether any thread or task is in a mixed batch."""
_batches = 0


def _count_batches(change: int) -> None:
    global _batches, is_mixing
    with _hooking:
        _batches += change
        is_mixing = _batches > 0


def forget_rows(model: nn.Module) -> None:
    """Take away from `model` what `rows_take` has left in it."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _follow]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


# Hooks stay, since others may be calling the model while one batch begins or ends.
_hooking = threading.Lock()


def _follow(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Let a module that is saved whole take the rows' own copies of it."""
    rows = current_rows()
    if rows is None:
        return None
    first = args[0] if args else next(iter(kwargs.values()))
    return args, kwargs | {"adapter_names": rows.repeated(len(first))}

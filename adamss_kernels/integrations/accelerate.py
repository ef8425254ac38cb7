"""Hooks of accelerate, which move inputs to a layer's device: they go with the layer that takes its place."""

from __future__ import annotations

from accelerate.hooks import add_hook_to_module
from torch import nn


def move_hook(module: nn.Module, new: nn.Module) -> None:
    """Give `new` the hook of `module`, around its own forward; `module`, which is going, keeps it too."""
    add_hook_to_module(new, module._hf_hook)

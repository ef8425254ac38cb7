"""Weights that accelerate keeps on the CPU or on disk: they are on the meta device but for the length of a call.

A hook of accelerate's on the module brings and takes them. What is asked of one here, every one of them has, so that
accelerate itself need not be there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether a hook brings this module's weights when it is called, and takes them away again."""
    hook = _hook(module)
    return any(getattr(h, "offload", False) for h in (hook, *getattr(hook, "hooks", ())))


@contextlib.contextmanager
def weights_present(module: nn.Module) -> Iterator[None]:
    """Have the weights of `module` where it computes, as in a call; tensors that are taken meanwhile stay valid."""
    if not is_offloaded(module):
        yield
        return
    hook = _hook(module)
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)


def take_weights(layer: nn.Module, module: nn.Module) -> None:
    """Have `layer`, which is in the place of `module`, hold the weights that this holds at the moment, or none."""
    for name in ("weight", "bias"):
        if name in module._parameters:
            layer._parameters[name] = module._parameters[name]


def _hook(module: nn.Module) -> Any:
    return module.__dict__.get("_hf_hook")

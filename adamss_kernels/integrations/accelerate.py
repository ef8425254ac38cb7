"""Hooks of accelerate, which move inputs to a layer's device, and weights: they go with the layer in its place."""

from __future__ import annotations

from typing import Any

from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from ..offload import is_offloaded, take_weights


class WeightsOfReplaced(ModelHook):
    """What accelerate's hook brings to the module that was replaced, an adapted layer has, too, for the same time.

    The hook would take the update away with the weights, so it goes on working on the module that it was made for.

    Attributes:
        offload: True: that is what it is for.
    """

    offload = True

    def __init__(self, module: nn.Module) -> None:
        """Take the hook of `module`, whose parameters train no more."""
        self.module = module.requires_grad_(False)
        self.hook: Any = module._hf_hook

    def init_hook(self, layer: nn.Module) -> nn.Module:
        """Let go of weights that were brought meanwhile."""
        take_weights(layer, self.module)
        return layer

    def pre_forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Bring the weights, and what the layer is called with to where they are."""
        moved = self.hook.pre_forward(self.module, *args, **kwargs)
        take_weights(layer, self.module)
        return moved

    def post_forward(self, layer: nn.Module, output: Any) -> Any:
        """Take the weights away."""
        output = self.hook.post_forward(self.module, output)
        take_weights(layer, self.module)
        return output


def move_hook(module: nn.Module, new: nn.Module) -> None:
    """Give `new` the hook of `module`, around its own forward; `module`, which is going, keeps it too."""
    hook = module._hf_hook
    if is_offloaded(module):
        hook = WeightsOfReplaced(hook.module if isinstance(hook, WeightsOfReplaced) else module)
    add_hook_to_module(new, hook)

"""Models that are spread over ranks: their layers cannot be replaced any more, but take this rank's part of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .distributed import reshard, shard_like, unwrap
from .frozen_linear import BASE_KEYS, FrozenLinear
from .linear import FusedAdaMSSLinear
from .model import adamss_layers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def initialise_adamss(model: nn.Module, *, group: ProcessGroup | None = None, progress: bool = True) -> nn.Module:
    """Give AdaMSS layers their first values, where a model has got its base weights after it was adapted and sharded.

    `inject_adamss` on the meta device sets up shapes alone. When the model has been sharded, `to_empty` has been
    called and the base weights are there, this decomposes them: layers are shared out over the ranks, each of which
    holds one whole base weight beside the one that is being gathered.

    Args:
        model: Its AdaMSS layers get new values and full masks; every rank that it is spread over calls.
        group: Those ranks; None for all.
        progress: Show a progress bar.

    Returns:
        `model` itself.

    Raises:
        ValueError: There is no AdaMSS layer, a base weight is on the meta device or not finite, or a subspace has
            another rank than was set up, as it has fewer rows. Nothing is changed.
        RuntimeError: Another rank has failed; the message says which one, and why.
    """
    import torch.distributed as dist

    from .shared_init import decompose_on_ranks

    root = unwrap(model)
    reshard(root)
    layers = adamss_layers(root)
    if not layers:
        raise ValueError("model: has no FusedAdaMSSLinear; adapt it with inject_adamss first, on the meta device")
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(f"{name}: the base weight is on the meta device; load the base model's weights first")
    ranks = dist.group.WORLD if group is None else group
    assert ranks is not None
    whole: dict[str, FrozenLinear] = {}
    # In one order on all ranks, which a set would not have.
    for config in dict.fromkeys(layer.config for layer in layers.values()):
        bases = {name: layer for name, layer in layers.items() if layer.config == config}
        for name, decomposition in decompose_on_ranks(bases, config, ranks, progress=progress).items():
            whole[name] = FusedAdaMSSLinear(layers[name].weight, layers[name].bias, decomposition, config)
    fill_layers(root, whole, "decomposition")
    return model


def fill_layers(root: nn.Module, layers: Mapping[str, FrozenLinear], source: str) -> None:
    """Let the adapted layers of a model take this rank's part of others.

    Args:
        root: The model.
        layers: Whole, by name.
        source: Where they come from, for messages.

    Raises:
        ValueError: A layer is of another kind or shape; nothing is changed.
    """
    states: dict[str, Mapping[str, Tensor]] = {}
    for name, new in layers.items():
        states[name] = {key: t for key, t in new.state_dict().items() if key not in BASE_KEYS}
        _require_same_shapes(name, root.get_submodule(name), new, states[name], source)
    for name, new in layers.items():
        layer: Any = root.get_submodule(name)
        fill(layer, states[name])
        layer.modules_to_save = new.modules_to_save
        if isinstance(new, FusedAdaMSSLinear):
            layer.config = new.config


def fill(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load this rank's part of a whole state dict into a module; what is not in it stays as it is."""
    slots = module.state_dict()
    module.load_state_dict({key: shard_like(t, slots[key]) for key, t in state.items()}, strict=False)


def _require_same_shapes(name: str, old: Any, new: Any, state: Mapping[str, Tensor], source: str) -> None:
    slots = {key: t for key, t in old.state_dict().items() if key not in BASE_KEYS}
    if not isinstance(old, type(new)) or slots.keys() != state.keys():
        raise ValueError(f"{name}: expected a {type(new).__name__} as in the {source}, got a {type(old).__name__}")
    if isinstance(new, FusedAdaMSSLinear) and old.layout.ranks != new.layout.ranks:
        raise ValueError(
            f"{name}: expected the ranks of the {source}, {new.layout.ranks}, got {old.layout.ranks}; a sharded layer "
            "cannot change its shapes: let load_adapter adapt the model before it is sharded"
        )
    for key, t in state.items():
        if slots[key].shape != t.shape:
            raise ValueError(f"{name}.{key}: expected shape {tuple(t.shape)}, got {tuple(slots[key].shape)}")

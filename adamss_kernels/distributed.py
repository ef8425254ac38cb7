"""Models that several processes train: what is inside of wrappers and shards, and which process writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def require_module(model: object) -> None:
    """Raise a TypeError for what is no model, say the directory where that belongs first."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got a {type(model).__name__}")


def unwrap(model: nn.Module) -> nn.Module:
    """Look through DDP, `DataParallel` and `torch.compile`, whose prefixes are not part of layer names."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def full_tensor(tensor: Tensor) -> Tensor:
    """Return a plain tensor: of a DTensor the whole (a collective call), any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes: the first of the ranks that train this model together."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return torch.distributed.get_rank(module.process_group) == 0
    mesh = _device_mesh(model)
    return mesh is None or not any(mesh.get_coordinate() or ())


def wait_for_writer(model: nn.Module) -> None:
    """Return on every rank of a model under FSDP2 when the first one has come here too."""
    mesh = _device_mesh(model)
    for dim in range(0 if mesh is None else mesh.ndim):
        torch.distributed.barrier(group=mesh.get_group(dim))


def _device_mesh(model: nn.Module) -> Any:
    """Return the `DeviceMesh` that `fully_shard` spread the parameters over, or None."""
    return next((p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh")), None)

"""Models that several processes train: what is inside of wrappers and shards, and which process writes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def shard_like(whole: Tensor, example: Tensor) -> Tensor:
    """Return a plain tensor sharded as `example` is, without communication: this rank's part of it, as a DTensor."""
    if not is_sharded(example):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Without a source rank nothing is sent: every rank has the whole tensor and cuts its own part.
    mesh: Any = example.device_mesh  # type: ignore[attr-defined]
    whole = whole.to(mesh.device_type)
    return distribute_tensor(whole, mesh, example.placements, src_data_rank=None)  # type: ignore[attr-defined]


def with_sharding(local: Tensor, example: Tensor) -> Tensor:
    """Return this rank's part of a tensor of the shape of `example` as a DTensor, sharded as that is; or as it is."""
    if not is_sharded(example):
        return local
    from torch.distributed.tensor import DTensor

    like: Any = example
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def sum_over_shards(tensor: Tensor, example: Tensor) -> Tensor:
    """Sum `tensor` in place over the ranks that hold other parts of `example`, and return it."""
    if is_sharded(example):
        like: Any = example
        for dim, placement in enumerate(like.placements):
            if not placement.is_replicate():
                torch.distributed.all_reduce(tensor, group=like.device_mesh.get_group(dim))
    return tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, of which each rank may hold a part only."""
    return hasattr(tensor, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give back what it has gathered: after a forward alone its parameters may still be whole."""
    for module in model.modules():
        give_back: Any = getattr(module, "reshard", None)
        if hasattr(module, "unshard") and give_back is not None:
            give_back()


def is_writer(model: nn.Module) -> bool:
    """Whether this process writes: the first of the ranks that train this model together."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            if torch.distributed.get_rank(module.process_group) != 0:
                return False
            break
    mesh = device_mesh(model)
    return mesh is None or not any(mesh.get_coordinate() or ())


def device_mesh(model: nn.Module) -> Any:
    """Return the `DeviceMesh` that the parameters are spread over, that of most dimensions; None without one."""
    meshes: list[Any] = [p.device_mesh for p in model.parameters() if is_sharded(p)]  # type: ignore[attr-defined]
    return max(meshes, key=lambda mesh: mesh.ndim, default=None)


def gather_objects(model: nn.Module, value: Any) -> list[Any]:
    """Return `value` of every rank that a sharded model is spread over (a collective call), of any other [value]."""
    mesh, values = device_mesh(model), [value]
    for dim in range(0 if mesh is None else mesh.ndim):
        parts: list[Any] = [None] * mesh.size(dim)
        torch.distributed.all_gather_object(parts, values, group=mesh.get_group(dim))
        values = [v for part in parts for v in part]
    return values


@contextlib.contextmanager
def together(model: nn.Module) -> Iterator[None]:
    """End the block on every rank of a sharded model when all have come there, or fail on all where one has failed.

    Raises:
        RuntimeError: Another rank has raised; the message says which one and what. The rank itself raises its own.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    try:
        reports = gather_objects(model, None if failure is None else f"{type(failure).__name__}: {failure}")
    except Exception as error:
        if failure is None:
            raise
        # A rank has died meanwhile, be it of the same.
        raise failure from error
    if failure is not None:
        raise failure
    for rank, report in enumerate(reports):
        if report is not None:
            raise RuntimeError(f"rank {rank} of those that share the model has failed: {report}")

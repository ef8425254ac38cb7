"""`save_adapter` and `load_adapter`: what training has made of a model, to a file and from it onto a base."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .adapter_file import (
    FORMAT_VERSION,
    ON_META,
    TENSORS_FILE,
    Checkpoint,
    read_checkpoint,
    require_values,
    write_layers,
)
from .bases import Kind, dense, foreign_kind, plain_linear
from .compact import num_probes, solve
from .config import AdaMSSConfig
from .decompose import Decomposition, augmented, rebuild_basis
from .distributed import full_tensor, gather_objects, is_sharded, is_writer, require_module, reshard, together, unwrap
from .frozen_linear import LAYERS_BY_METHOD, LAYERS_OVER_BASE, FrozenLinear
from .layout import SubspaceLayout
from .linear import FusedAdaMSSLinear
from .model import adapted_layers, replace_modules, saved_modules
from .offload import is_offloaded, take_weights, weights_present
from .over_base import AdaMSSOverBase, OverBase
from .sharded import fill, fill_layers
from .sketch import SKETCH_SHAPE, relative_difference, sketch, sketch_linear

logger = logging.getLogger(__name__)

SAME_BASE = 1e-6
"""Relative difference up to which a base weight counts as the one that was trained on."""
ROUNDED_BASE = 0.05
"""Relative difference up to which a base weight counts as a rounding of the one that was trained on."""
SAME_UPDATE = 1e-2
"""Relative error up to which the update of a compact adapter counts as the trained one; 6e-3 on a bf16 copy of the
base, 2e-6 where only threads or the instruction set differ (both at R = 100)."""
SIMILAR_UPDATE = 0.1
"""Relative error above which the update of a compact adapter is refused."""


class BaseWeightWarning(UserWarning):
    """An adapter was loaded onto a base weight that is not exactly the one it was trained on."""


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], *, compact: bool = False) -> Path:
    """Save what training has made of `model`: each layer's update with all that it needs, and `modules_to_save`.

    Of AdaMSS that is B, C, masks, row map and basis; of the related methods their parameters and frozen factors.

    A sketch of each base weight goes with them, by which `load_adapter` recognises the base. The files are replaced
    atomically: whatever happens meanwhile, the directory holds a complete checkpoint, the old one or the new one.

    Args:
        model: A model that `inject_adamss`, `inject_adapter` or `load_adapter` has adapted, merged or not; DDP and
            `torch.compile` wrappers are looked through. Of DDP's ranks the first writes. Under FSDP2 and tensor
            parallelism every rank has to call: the first one writes the rows of all, and the call returns everywhere
            when they are on disk. Base weights are not gathered.
        directory: Created where missing.
        compact: Leave out AdaMSS's basis, nearly all of the file, and rebuild it on load from the base weight: for
            where that weight is at hand, or a copy that is rounded a little. Takes float32 arithmetic on any machine.

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: `model` has no adapted layer, one is on the meta device, or `compact` is asked of a method other
            than AdaMSS or of a B that is not finite. Nothing is written.
        RuntimeError: Another rank of a sharded model has failed; the message names it. The old checkpoint stays.
    """
    require_module(model)
    root = unwrap(model)
    layers = adapted_layers(root)
    if not layers:
        raise ValueError("model: has no FusedAdaMSSLinear or adapter; use inject_adamss or inject_adapter first")
    reshard(root)
    with together(root):
        return write_layers(layers, saved_modules(root), Path(directory), compact=compact, writes=is_writer(model))


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], *, strict: bool = True) -> nn.Module:
    """Load what `save_adapter` wrote onto `model`, adapting it in place; create the optimizer afterwards.

    The trained update is reproduced exactly, whatever the base: basis, row map, ranks and masks come from the file.
    Of a compact file B and basis are rebuilt, so that their product is the trained one; level INFO of the log says for
    each layer how nearly. Nothing is changed unless everything fits.

    A model whose parameters are spread over ranks, by FSDP2 or tensor parallelism, has to be adapted before it is
    spread, with the ranks of the file: then every rank calls, and takes its rows into the parameters that are there.
    On a base that is wholly on the meta device this function sets up just that, without values.

    Args:
        model: The base model, or one that is already adapted (its adapted layers are replaced).
        directory: Where `save_adapter` wrote.
        strict: Refuse a base weight that differs by more than 5 % from the one trained on, or from which a compact
            adapter's update would be rebuilt with an error above 10 %; False only warns.

    Returns:
        `model` itself, trainable where `inject_adamss` would leave it trainable.

    Raises:
        FileNotFoundError: There is no checkpoint in `directory`.
        ValueError: The file is truncated, of another format or version, lacks a tensor or has one of a wrong shape;
            or a base weight is not the one trained on, nor a rounding of it. The message names the layer.
        RuntimeError: Another rank of a sharded model has failed; the message names it.

    Warns:
        BaseWeightWarning: A base weight, or the update of a compact file, differs from the trained one; the message
            says by how much.
        UserWarning: The base is on the meta device: only shapes are set up.
    """
    require_module(model)
    root = unwrap(model)
    path = Path(directory) / TENSORS_FILE
    reshard(root)
    with together(root):
        checkpoint = read_checkpoint(path)
    extra = adapted_layers(root).keys() - checkpoint.header["layers"].keys()
    if extra:
        raise ValueError(f"{path}: has no layer {min(extra)!r}, which is adapted in this model")
    spread = any(is_sharded(parameter) for parameter in root.parameters())
    if spread:
        _require_same_file(root, checkpoint)
    shapes_only = all(_has_no_values_yet(_find(root, name, path)) for name in checkpoint.header["layers"])

    def find(name: str) -> nn.Module:
        module = _find(root, name, path)
        if spread and name in checkpoint.header["layers"] and not isinstance(module, FrozenLinear):
            raise ValueError(
                f"{name}: expected an adapted layer in a model that is sharded, got {type(module).__qualname__}; adapt "
                "the model first, also on the meta device (inject_adamss or load_adapter), then shard it"
            )
        return module

    layers, saved = build_layers(find, checkpoint, strict, shapes_only=shapes_only and not spread)
    if spread:
        fill_layers(root, layers, "file")
        for name, state in saved.items():
            fill(root.get_submodule(name), state)
        return model
    if shapes_only:
        warnings.warn(f"{path}: {ON_META}: only shapes are set up; load the adapter again when it has", stacklevel=2)
    else:
        for name, state in saved.items():
            root.get_submodule(name).load_state_dict(state)
    replace_modules(root, layers)
    return model


def _has_no_values_yet(module: nn.Module) -> bool:
    """Whether the base of a layer is on the meta device, and not because accelerate keeps its values elsewhere."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_meta and not hasattr(module, "_hf_hook")


def _require_same_file(root: nn.Module, checkpoint: Checkpoint) -> None:
    """Check that all ranks have read the same: then everything else that is checked comes out alike on all of them."""
    contents = gather_objects(root, checkpoint.contents())
    for rank, other in enumerate(contents):
        if other != contents[0]:
            raise ValueError(
                f"{checkpoint.path}: rank {rank} has read another file than rank 0; expected the same on all ranks"
            )


class KnownBase(NamedTuple):
    """What need not be computed again of a layer's base weight: its sketch, and the basis to have the update on."""

    sketch: Tensor
    basis: Tensor
    basis_bias: Tensor | None


def build_layers(
    find: Callable[[str], nn.Module],
    checkpoint: Checkpoint,
    strict: bool,
    *,
    shapes_only: bool = False,
    known: Mapping[str, KnownBase] | None = None,
) -> tuple[dict[str, FrozenLinear], dict[str, dict[str, Tensor]]]:
    """Return the layers of a checkpoint over those of a model, and the states of the modules that were saved whole.

    Args:
        find: Returns the model's module of a name, which is left as it is.
        checkpoint: Read from a file.
        strict: As in `load_adapter`.
        shapes_only: Take a base on the meta device, over which the layers have shapes but no values.
        known: By layer. Of a compact file B is solved for on the basis given here, instead of one that is rebuilt.

    Raises:
        ValueError: As `load_adapter`.
    """
    known = known or {}
    header = checkpoint.header
    layers: dict[str, FrozenLinear] = {}
    for name in header["layers"]:  # no comprehension, which would be a level more between a warning and its cause
        module = find(name)
        with weights_present(module):
            layers[name] = _load_layer(module, name, checkpoint, strict, shapes_only, known.get(name))
        if is_offloaded(module):
            take_weights(layers[name], module)
    saved = {name: _loaded_module(find(name), name, checkpoint) for name in header["modules_to_save"]}
    unused = checkpoint.tensors.keys() - checkpoint.used
    if unused:
        raise ValueError(f"{checkpoint.path}: has a tensor {min(unused)!r} that its header does not announce")
    return layers, saved


def _load_layer(
    module: nn.Module, name: str, checkpoint: Checkpoint, strict: bool, shapes_only: bool, known: KnownBase | None
) -> FrozenLinear:
    """Build the layer that replaces `module`, after checking everything that it is built from."""
    info = checkpoint.header["layers"][name]
    N, D = info["out_features"], info["in_features"]
    weight: Tensor
    bias: Tensor | None
    # A layer of another library as it was before it was adapted, of which W is read once and let go.
    base = module.bare_base() if isinstance(module, OverBase) else module
    kind = foreign_kind(name, base)
    if kind is not None:
        weight, bias = dense(base, kind)
    elif type(module) is nn.Linear:
        weight, bias = plain_linear(name, module).weight, module.bias
    elif isinstance(module, FrozenLinear):
        weight, bias = module.weight, module.bias
        if module.merged:
            weight, bias = module.base_parameters()
            weight = nn.Parameter(weight.to(module.weight), requires_grad=False)
            bias = None if bias is None else nn.Parameter(bias.to(module.weight), requires_grad=False)
    else:
        raise ValueError(
            f"{name}: expected an nn.Linear or another layer that can be adapted, got {type(module).__qualname__}"
        )
    if tuple(weight.shape) != (N, D) or (bias is not None) != info["bias"]:
        expected, got = (
            f"{shape} {'with' if b else 'without'} bias"
            for shape, b in (((N, D), info["bias"]), (tuple(weight.shape), bias is not None))
        )
        raise ValueError(f"{name}: the adapter was trained on a weight of shape {expected}, got {got}")

    trained_on = checkpoint.take(f"layers.{name}.base_sketch", SKETCH_SHAPE)
    if not shapes_only:
        require_values(name, weight)
        _check_base(name, known.sketch if known else sketch_linear(weight, bias), trained_on, strict)
    if "method" not in info:
        decomposition, config, masks = _load_adamss(name, weight, bias, checkpoint, strict, known)
        layer: FrozenLinear
        if kind is None:
            layer = adamss = FusedAdaMSSLinear(weight, bias, decomposition, config)
        else:
            layer = adamss = AdaMSSOverBase(base, kind, decomposition, config)
        adamss.set_masks(*masks)
    else:
        layer = _load_related(name, weight, bias, base, kind, checkpoint)
    return layer.train(module.training)


def _load_adamss(
    name: str, weight: Tensor, bias: Tensor | None, checkpoint: Checkpoint, strict: bool, known: KnownBase | None
) -> tuple[Decomposition, AdaMSSConfig, tuple[Tensor, Tensor]]:
    """Return what an AdaMSS layer over this weight is made of, and its masks."""
    info = checkpoint.header["layers"][name]
    stored_config = info.get("config", checkpoint.header.get("config"))
    if stored_config is None:
        raise ValueError(f"{checkpoint.path}: has an AdaMSS layer {name!r} but no config")
    try:
        config = AdaMSSConfig(**stored_config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: layer {name!r}: has a config of another release ({error})") from error
    (N, D), R, ranks = weight.shape, info["r"], tuple(info["ranks"])
    rho, K = sum(ranks), len(ranks)
    shapes = {"C": (N, max(ranks)), "row_subspace": (N,), "active": (K,), "trainable": (K,)}
    has_B = checkpoint.header["format_version"] == FORMAT_VERSION
    if has_B:
        shapes |= {"B": (rho, R), "ranks": (K,)}
    t = {key: checkpoint.take(f"layers.{name}.{key}", shape).to(weight.device) for key, shape in shapes.items()}
    basis_bias: Tensor | None
    if not checkpoint.header["compact"]:
        basis = checkpoint.take(f"layers.{name}.basis", (R, D))
        basis_bias = checkpoint.take(f"layers.{name}.basis_bias", (R,)) if info["bias"] else None
    elif weight.is_meta:
        key, shape = ("basis_sketch", SKETCH_SHAPE) if has_B else ("probed_B", (rho, num_probes(R)))
        checkpoint.take(f"layers.{name}.{key}", shape)
        basis, basis_bias = weight.new_empty(R, D), weight.new_empty(R) if info["bias"] else None
        t.setdefault("B", t["C"].new_empty(rho, R))
    elif has_B:
        stored = checkpoint.take(f"layers.{name}.basis_sketch", SKETCH_SHAPE)
        basis, basis_bias = rebuild_basis(*_whole(weight, bias), config, name=name)
        _check_update(name, relative_difference(sketch(augmented(basis, basis_bias)), stored), strict)
    else:
        Z = checkpoint.take(f"layers.{name}.probed_B", (rho, num_probes(R)))
        if known is not None and known.basis.shape == (R, D):
            basis, basis_bias = known.basis, known.basis_bias
            B, difference = solve(Z, basis, basis_bias)
        else:
            basis, basis_bias, B, difference = _rebuilt(name, *_whole(weight, bias), config, Z)
        _check_update(name, difference, strict)
        t["B"] = B.to(t["C"])
    try:
        layout = SubspaceLayout(t["row_subspace"].to(torch.int32), ranks)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: layer {name!r}: {error}") from error

    basis_bias = None if basis_bias is None else basis_bias.to(weight.device)
    decomposition = Decomposition(basis.to(weight.device), basis_bias, layout, t["B"], t["C"])
    return decomposition, config, (t["active"], t["trainable"])


def _load_related(
    name: str, weight: Tensor, bias: Tensor | None, base: nn.Module, kind: Kind | None, checkpoint: Checkpoint
) -> FrozenLinear:
    info = checkpoint.header["layers"][name]
    if info["method"] not in LAYERS_BY_METHOD:
        raise ValueError(f"{checkpoint.path}: layer {name!r}: unknown method {info['method']!r}")
    # On meta nothing is drawn or decomposed.
    N, D = weight.shape
    shape = nn.Linear(D, N, bias=bias is not None, device="meta", dtype=weight.dtype)
    layer: FrozenLinear
    if kind is None:
        layer = LAYERS_BY_METHOD[info["method"]].from_linear(shape, **info["options"])
    else:
        layer = LAYERS_OVER_BASE[info["method"]](base, kind, shape.weight, **info["options"])
    slots = layer.update_state()
    state = {key: checkpoint.take(f"layers.{name}.{key}", tuple(slot.shape)) for key, slot in slots.items()}
    if kind is None:
        layer.weight, layer.bias = weight, bias
    layer.load_state_dict({key: t.to(weight.device) for key, t in state.items()}, strict=False, assign=True)
    layer.modules_to_save = tuple(checkpoint.header["modules_to_save"])
    return layer


def _whole(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return W and bias whole: of a sharded layer one layer's memory for as long as it is decomposed."""
    return full_tensor(weight), None if bias is None else full_tensor(bias)


def _check_base(name: str, found: Tensor, expected: Tensor, strict: bool) -> None:
    difference = relative_difference(found, expected)
    if difference <= SAME_BASE:
        return
    if difference <= ROUNDED_BASE:
        message = f"{name}: the base weight differs from the one trained on by {difference:.2g} (relative, estimated)"
        warnings.warn(f"{message}, as by rounding; the trained update is applied exactly", BaseWeightWarning, 5)
        return
    message = (
        f"{name}: the base weight differs from the one trained on by {difference:.2g} (relative, estimated; "
        f"rounding stays below {ROUNDED_BASE}); is this another model or layer?"
    )
    if strict:
        raise ValueError(f"{message} strict=False loads it all the same")
    warnings.warn(message, BaseWeightWarning, 5)


def _rebuilt(
    name: str, weight: Tensor, bias: Tensor | None, config: AdaMSSConfig, Z: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, float]:
    """Return a basis of this weight, its column for the bias, B in it, and the relative error of the update."""
    # The projection that the SVD draws depends on the type of device, and most adapters are made on the CPU.
    for device in dict.fromkeys((torch.device("cpu"), weight.device)):
        on_device = weight.to(device), None if bias is None else bias.to(device)
        basis, basis_bias = rebuild_basis(*on_device, config, name=name)
        B, error = solve(Z, basis, basis_bias)
        if error <= SAME_UPDATE:
            break
    return basis, basis_bias, B, error


def _check_update(name: str, error: float, strict: bool) -> None:
    """Say how far the update of a compact adapter is from the trained one, in the tone that it deserves."""
    message = f"{name}: from this base weight the compact adapter's update is rebuilt with an error of {error:.2g}"
    if error <= SAME_UPDATE:
        logger.info("%s (relative, estimated)", message)
        return
    message = f"{message} (relative, estimated; a full file has none)"
    if strict and not error <= SIMILAR_UPDATE:
        raise ValueError(
            f"{message}; up to {SIMILAR_UPDATE} is loaded: a compact adapter needs the base it was trained on, "
            "decomposed on the same type of device. strict=False loads it all the same"
        )
    warnings.warn(message, BaseWeightWarning, 6)


def _loaded_module(module: nn.Module, name: str, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict for a module out of `modules_to_save`, checked against the module."""
    state = module.state_dict()
    return {key: checkpoint.take(f"modules.{name}.{key}", tuple(tensor.shape)) for key, tensor in state.items()}


def _find(model: nn.Module, name: str, path: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{path}: was saved with a module {name!r}, which this model does not have") from None

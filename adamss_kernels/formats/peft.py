"""`export_peft` and `import_peft`: the AdaMSS checkpoints of Hugging Face PEFT, without that library."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapter_file import Checkpoint
from ..bases import foreign_kind, plain_linear
from ..config import ASA_FIELDS, AdaMSSConfig
from ..decompose import Decomposition, augmented, decompose
from ..distributed import full_tensor, unwrap
from ..layout import SubspaceLayout
from ..linear import FusedAdaMSSLinear
from ..model import replace_modules
from ..offload import weights_present
from ..over_base import AdaMSSOverBase
from ..targets import modules_named
from .files import (
    PEFT_TENSORS_FILE,
    PREFIX,
    common_header,
    exportable_layers,
    read_peft_config,
    saved_tensors,
    write_checkpoint,
)

logger = logging.getLogger(__name__)


SAME_BASIS = 1e-2
"""Relative difference up to which two bases of one weight, but for signs, are decompositions of the same values. Other
threads or instruction sets make 6e-4, rounding to bf16 2e-3; a bf16 copy of the base already makes 0.2 (R = 100)."""


# What PEFT's `AdamssConfig` shares with ours; which layers are meant is said by `target_modules` alone.
_SHARED_FIELDS = (
    "r",
    "num_subspaces",
    "subspace_rank",
    "init_weights",
    "use_asa",
    *ASA_FIELDS,
    "use_dynamic_rank",
    "svd_threshold",
    "random_seed",
)


def export_peft(model: nn.Module, directory: str | os.PathLike[str], *, progress: bool = True) -> Path:
    """Write an AdaMSS checkpoint that stock PEFT loads onto the same base model, with equal outputs.

    PEFT stores no row assignment but rebuilds it from the base weight, so each layer is decomposed again here and the
    result compared. Subspaces that do not contribute are written as zeros. PEFT stores no masks either: what ASA has
    frozen trains again if training continues there.

    Args:
        model: Adapted by `inject_adamss`, `load_adapter` or `import_peft`; merged or not; DDP and `torch.compile`
            wrappers are looked through. Under FSDP2 every rank has to call, and the first one writes.
        directory: Created where missing; receives `adapter_config.json` and `adapter_model.safetensors`.
        progress: Show a progress bar (one SVD per layer).

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: `model` has no AdaMSS layer or one of another method besides, or PEFT could not load the checkpoint
            with equal outputs: a row assignment that it would not rebuild from this base weight, a layer registered
            under two names, layers made with different configs, or names in `modules_to_save` that mean more modules
            there, or of which one module holds another; or a layer that adapts a base of another library. Nothing is
            written.
    """
    from tqdm.auto import tqdm

    root, layers = unwrap(model), exportable_layers(model)
    for name, layer in layers.items():
        if isinstance(layer, AdaMSSOverBase):
            raise ValueError(
                f"{name}: adapts a {layer.kind.name}, but only AdaMSS over plain nn.Linear goes into PEFT's format; "
                "use export_lora, or load the adapter onto the base in full precision first"
            )
    config = next(iter(layers.values())).config
    tensors = saved_tensors(root)
    frozen, bases = 0, []
    with tqdm(layers.items(), desc="PEFT rows", unit="layer", disable=not progress) as bar:
        for name, layer in bar:
            bar.set_postfix_str(name)
            if _decomposition_fields(layer.config) != _decomposition_fields(config):
                raise ValueError(f"{name}: made with {layer.config}, but PEFT has one config for all layers: {config}")
            weight, bias = layer.base_parameters()
            bias = None if bias is None else full_tensor(bias)
            _require_peft_rows(name, layer, decompose(full_tensor(weight), bias, config, name=name).layout)
            contributes = layer.active[layer.row_subspace.long()][:, None]
            B, C = layer.layout.unpack(full_tensor(layer.B), full_tensor(layer.C).where(contributes, 0))
            prefix = f"{PREFIX}{name}."
            tensors |= {f"{prefix}adamss_A.{k}": B_k for k, B_k in enumerate(B)}
            tensors |= {f"{prefix}adamss_B.{k}": C_k for k, C_k in enumerate(C)}
            tensors[f"{prefix}adamss_newB"] = augmented(full_tensor(layer.basis), layer.basis_bias)
            frozen += int((layer.active & ~layer.trainable).sum())
            bases.append(layer.basis.shape[0])
    if frozen:
        logger.warning("export_peft: PEFT stores no masks; %d frozen subspaces would train again there", frozen)

    header = {name: getattr(config, name) for name in _SHARED_FIELDS}
    # PEFT fails on a rank above R before it reads the file; the file's shapes replace those it then makes.
    header["subspace_rank"] = min(config.subspace_rank, *bases)
    header["layers_to_transform"] = header["layers_pattern"] = None
    header |= common_header("ADAMSS", root, layers)
    return write_checkpoint(model, directory, header, tensors)


def import_peft(model: nn.Module, directory: str | os.PathLike[str], *, progress: bool = True) -> nn.Module:
    """Load an AdaMSS checkpoint of PEFT onto its base model, adapting it in place as `load_adapter` does.

    The row assignment, which PEFT does not store, is rebuilt from the base weight; the basis is the file's. The rows
    are trusted only if the basis rebuilt with them is the stored one but for rounding and signs, and each subspace has
    as many as in the file: on another base (or device type) PEFT itself would go on with wrong rows.

    Args:
        model: The base model, not yet adapted.
        directory: Where PEFT's `save_pretrained` or `export_peft` wrote.
        progress: Show a progress bar (one SVD per layer).

    Returns:
        `model` itself, trainable where `inject_adamss` would leave it trainable.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is not PEFT's AdaMSS, does not fit the model, or was trained on another base weight;
            the message names the layer. Nothing is changed.
        TypeError: A layer is not exactly an `nn.Linear`, or its weight is quantised or sharded; the message says how
            the adapter comes onto it.
    """
    from safetensors.torch import load_file
    from tqdm.auto import tqdm

    directory = Path(directory)
    header = read_peft_config(directory)
    if header.get("peft_type") != "ADAMSS":
        raise ValueError(f"{directory}: holds a PEFT adapter of type {header.get('peft_type')!r}, expected 'ADAMSS'")
    path = directory / PEFT_TENSORS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint written by PEFT or export_peft")
    checkpoint = Checkpoint(path, header, load_file(path))
    pattern = re.compile(re.escape(PREFIX) + r"(.+)\.adamss_newB")
    names = sorted(match.group(1) for match in map(pattern.fullmatch, checkpoint.tensors) if match)
    if not names:
        raise ValueError(f"{path}: has no tensor '{PREFIX}<layer>.adamss_newB'")
    fields = {name: header[name] for name in _SHARED_FIELDS if header.get(name) is not None}
    # With a `task_type` PEFT lists heads that only some models have ("classifier", "score"), and saves what is there.
    present = [f".{name}." for name in (*(name for name, _ in model.named_modules()), *checkpoint.tensors)]
    heads = [name for name in header.get("modules_to_save") or () if any(f".{name}." in place for place in present)]
    config = AdaMSSConfig(**fields, target_modules=names, modules_to_save=heads or None)

    layers: dict[str, FusedAdaMSSLinear] = {}
    with tqdm(names, desc="PEFT rows", unit="layer", disable=not progress) as bar:
        for name in bar:
            bar.set_postfix_str(name)
            layers[name] = _imported_layer(model, name, config, checkpoint)
    saved = {
        name: {key: checkpoint.take(f"{PREFIX}{name}.{key}", tuple(t.shape)) for key, t in module.state_dict().items()}
        for name, module in modules_named(model, config.modules_to_save or ()).items()
    }
    unused = checkpoint.tensors.keys() - checkpoint.used
    if unused:
        raise ValueError(f"{path}: has a tensor {min(unused)!r} that belongs to no adapted layer or saved module")
    for name, state in saved.items():
        model.get_submodule(name).load_state_dict(state)
    replace_modules(model, layers)
    return model


def _decomposition_fields(config: AdaMSSConfig) -> tuple[object, ...]:
    """Return what the row assignment follows from, besides the weight."""
    return config.r, config.num_subspaces, config.random_seed


def _require_peft_rows(name: str, layer: FusedAdaMSSLinear, rebuilt: SubspaceLayout) -> None:
    """Raise unless PEFT would assign this layer's rows as `layer` does."""
    K = min(layer.config.num_subspaces, layer.out_features)
    if layer.layout.num_subspaces != K:
        raise ValueError(
            f"{name}: has {layer.layout.num_subspaces} subspaces where PEFT expects {K} (the weight has too few "
            "distinct rows); export_lora has no such limit"
        )
    differing = int((rebuilt.row_subspace != layer.row_subspace).sum())
    if differing:
        raise ValueError(
            f"{name}: from this base weight PEFT would assign {differing} of {layer.out_features} rows to other "
            "subspaces than were trained; load the adapter onto the exact base it was trained on, or use export_lora"
        )


def _stored_ranks(prefix: str, tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """Return r_k of the subspaces of a layer in a PEFT checkpoint: the rows of its `adamss_A.<k>`."""
    ranks: list[int] = []
    while (A_k := tensors.get(f"{prefix}A.{len(ranks)}")) is not None:
        ranks.append(A_k.shape[0])
    return tuple(ranks)


def _imported_layer(model: nn.Module, name: str, config: AdaMSSConfig, checkpoint: Checkpoint) -> FusedAdaMSSLinear:
    """Build the layer that replaces the linear layer `name`, after checking that its rows can be rebuilt."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name}: the checkpoint adapts this module, which the model does not have") from None
    kind = foreign_kind(name, module)
    if kind is not None:
        raise TypeError(
            f"{name}: is a {kind.name}; the rows, which PEFT does not store, can be rebuilt from the nn.Linear alone "
            "that was trained: import onto that base, call save_adapter, and load_adapter(strict=False) onto this one"
        )
    linear = plain_linear(name, module)
    prefix = f"{PREFIX}{name}.adamss_"
    ranks = _stored_ranks(prefix, checkpoint.tensors)
    # The rows do not depend on the ranks, which come from the file.
    rebuilding = dataclasses.replace(config, subspace_rank=1, use_dynamic_rank=False)
    with weights_present(linear):
        rebuilt = decompose(linear.weight, linear.bias, rebuilding, name=name)
    found = augmented(rebuilt.basis, rebuilt.basis_bias)
    basis = checkpoint.take(f"{prefix}newB", tuple(found.shape)).to(found)
    # A singular vector's sign depends on threads and instruction set.
    signs = torch.where((found.double() * basis.double()).sum(dim=1, keepdim=True) < 0, -1.0, 1.0)
    difference = float((signs * found.double() - basis.double()).norm() / basis.double().norm())
    if not difference <= SAME_BASIS or len(ranks) != rebuilt.layout.num_subspaces:
        raise ValueError(
            f"{name}: the basis rebuilt from this base weight differs from the stored one by {difference:.2g} "
            f"(relative, but for signs; allowed {SAME_BASIS}); PEFT stores no row assignment, so the exact base, and "
            "the device type that the adapter was trained on, are needed"
        )
    layout = SubspaceLayout(rebuilt.layout.row_subspace, ranks)
    R = basis.shape[0]
    B = [checkpoint.take(f"{prefix}A.{k}", (r_k, R)) for k, r_k in enumerate(ranks)]
    C = [checkpoint.take(f"{prefix}B.{k}", (len(layout.rows(k)), r_k)) for k, r_k in enumerate(ranks)]
    packed = (t.to(rebuilt.B) for t in layout.pack(B, C))
    D = linear.in_features
    basis_bias = None if linear.bias is None else basis[:, D].contiguous()
    decomposition = Decomposition(basis[:, :D].contiguous(), basis_bias, layout, *packed)
    return FusedAdaMSSLinear(linear.weight, linear.bias, decomposition, config).train(linear.training)

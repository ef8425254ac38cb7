"""`export_peft`, `export_lora` and `import_peft`: the checkpoint formats of Hugging Face PEFT, without that library."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .atomic import replace_file
from .checkpoint import Checkpoint
from .config import ASA_FIELDS, AdaMSSConfig
from .decompose import Decomposition, augmented, decompose
from .distributed import full_tensor, is_writer, unwrap, wait_for_writer
from .frozen_linear import plain_linear
from .layout import SubspaceLayout, block_diagonal, column_mask
from .linear import FusedAdaMSSLinear
from .model import adamss_layers, adapted_layers, modules_named, replace_modules, saved_modules, saved_names

logger = logging.getLogger(__name__)

PEFT_CONFIG_FILE = "adapter_config.json"
PEFT_TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."

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
            there, or of which one module holds another. Nothing is written.
    """
    from tqdm.auto import tqdm

    root, layers = unwrap(model), _exportable_layers(model)
    config = next(iter(layers.values())).config
    tensors = _saved_modules(root)
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
            prefix = f"{_PREFIX}{name}."
            tensors |= {f"{prefix}adamss_A.{k}": B_k for k, B_k in enumerate(B)}
            tensors |= {f"{prefix}adamss_B.{k}": C_k for k, C_k in enumerate(C)}
            tensors[f"{prefix}adamss_newB"] = augmented(layer.basis, layer.basis_bias)
            frozen += int((layer.active & ~layer.trainable).sum())
            bases.append(layer.basis.shape[0])
    if frozen:
        logger.warning("export_peft: PEFT stores no masks; %d frozen subspaces would train again there", frozen)

    header = {name: getattr(config, name) for name in _SHARED_FIELDS}
    # PEFT fails on a rank above R before it reads the file; the file's shapes replace those it then makes.
    header["subspace_rank"] = min(config.subspace_rank, *bases)
    header["layers_to_transform"] = header["layers_pattern"] = None
    header |= _common_header("ADAMSS", root, layers)
    return _write_checkpoint(model, directory, header, tensors)


def export_lora(model: nn.Module, directory: str | os.PathLike[str], *, bias: bool = True) -> Path:
    """Write a standard PEFT LoRA checkpoint with equal outputs, for PEFT itself and for multi-LoRA servers.

    Per layer, lora_A (rank, D) = Q = B A, lora_B (N, rank) = C as a dense block-diagonal matrix, and, where the layer
    has a bias, lora_B's bias (N,) = C a's share of S. The rank is RHO, less the ranks of pruned subspaces, and alpha
    equals it, so that LoRA's scaling is 1. Layers without any contributing subspace are left out.

    PEFT cannot merge such a checkpoint where some adapted layers have a bias and others have none. vLLM takes neither
    a bias update nor `modules_to_save`.

    Args:
        model: As for `export_peft`; the base weights are not read.
        directory: Created where missing; receives `adapter_config.json` and `adapter_model.safetensors`.
        bias: False leaves the update of the bias out, for servers that take none; a warning says how large it is.

    Returns:
        The path of the safetensors file.

    Raises:
        ValueError: `model` has no AdaMSS layer or one of another method besides, none contributes, or one is registered
            under two names. Nothing is written.
    """
    root, layers = unwrap(model), _exportable_layers(model)
    tensors = _saved_modules(root)
    factors = {name: _lora_factors(layer) for name, layer in layers.items() if layer.active.any()}
    if not factors:
        raise ValueError("model: no subspace contributes (all were pruned), and a LoRA checkpoint needs a rank >= 1")

    largest = max(float(q.abs().max()) if q is not None else 0.0 for _, _, q in factors.values())
    with_bias = bias and largest > 0
    if not bias and largest > 0:
        logger.warning("export_lora: left out updates of the bias of up to %.3g", largest)
    for name, (Q, C, bias_update) in factors.items():
        prefix = f"{_PREFIX}{name}.lora_"
        tensors |= {f"{prefix}A.weight": Q, f"{prefix}B.weight": C}
        if with_bias:
            tensors[f"{prefix}B.bias"] = C.new_zeros(C.shape[0]) if bias_update is None else bias_update

    # PEFT takes the first pattern that is a suffix of a name, so the longest comes first.
    ranks = {name: factors[name][0].shape[0] for name in sorted(factors, key=len, reverse=True)}
    largest_rank = max(ranks.values())
    patterns = ranks if min(ranks.values()) != largest_rank else {}
    header = {
        "r": largest_rank,
        "lora_alpha": largest_rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "lora_dropout": 0.0,
        "lora_bias": with_bias,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }
    header |= _common_header("LORA", root, factors)
    return _write_checkpoint(model, directory, header, tensors)


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
        TypeError: A layer is not exactly an `nn.Linear`, or its weight is quantised or sharded.
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
    pattern = re.compile(re.escape(_PREFIX) + r"(.+)\.adamss_newB")
    names = sorted(match.group(1) for match in map(pattern.fullmatch, checkpoint.tensors) if match)
    if not names:
        raise ValueError(f"{path}: has no tensor '{_PREFIX}<layer>.adamss_newB'")
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
        name: {key: checkpoint.take(f"{_PREFIX}{name}.{key}", tuple(t.shape)) for key, t in module.state_dict().items()}
        for name, module in modules_named(model, config.modules_to_save or ()).items()
    }
    unused = checkpoint.tensors.keys() - checkpoint.used
    if unused:
        raise ValueError(f"{path}: has a tensor {min(unused)!r} that belongs to no adapted layer or saved module")
    for name, state in saved.items():
        model.get_submodule(name).load_state_dict(state)
    replace_modules(model, layers)
    return model


def read_peft_config(directory: Path) -> dict[str, Any]:
    """Return the contents of `adapter_config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object.
    """
    path = directory / PEFT_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint written by PEFT")
    try:
        header = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(header).__name__}")
    return header


def _exportable_layers(model: nn.Module) -> dict[str, FusedAdaMSSLinear]:
    root = unwrap(model)
    layers = adamss_layers(root)
    if not layers:
        raise ValueError("model: has no FusedAdaMSSLinear; adapt it with inject_adamss first")
    for name, layer in adapted_layers(root).items():
        if name not in layers:
            raise ValueError(
                f"{name}: is a {type(layer).__name__}, whose update would be left out; only AdaMSS has an export"
            )
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, FusedAdaMSSLinear) and name not in layers:
            first = next(n for n, layer in layers.items() if layer is module)
            raise ValueError(f"{name}: is the same module as {first!r}; PEFT would adapt it under one name only")
    return layers


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


def _saved_modules(root: nn.Module) -> dict[str, Tensor]:
    return {
        f"{_PREFIX}{name}.{key}": full_tensor(tensor)
        for name, module in saved_modules(root).items()
        for key, tensor in module.state_dict().items()
    }


@torch.no_grad()
def _lora_factors(layer: FusedAdaMSSLinear) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return lora_A (rank, D), lora_B (N, rank) and the update of the bias (N,), computed in float64."""
    B, C = full_tensor(layer.B), full_tensor(layer.C)
    rho = layer.layout.rho
    contributes = column_mask(layer.active, layer.offsets, rho)
    dense = block_diagonal(C.double(), layer.row_subspace, layer.offsets, rho)[contributes].T
    B_active = B.double()[contributes]
    bias_update = None
    if layer.basis_bias is not None:
        bias_update = (dense @ (B_active @ layer.basis_bias.double())).to(B.dtype)
    return (B_active @ layer.basis.double()).to(B.dtype), dense.to(C.dtype), bias_update


def _common_header(kind: str, root: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` that every kind of adapter has."""
    saved = list(saved_modules(root))
    base = getattr(getattr(root, "config", None), "_name_or_path", None)
    return {
        "peft_type": kind,
        "base_model_name_or_path": base or None,
        "task_type": None,
        "inference_mode": True,
        "target_modules": _target_modules(root, set(names), saved),
        "modules_to_save": _peft_modules_to_save(root, saved),
    }


def _target_modules(root: nn.Module, wanted: set[str], saved: list[str]) -> list[str] | str:
    """Return the shortest selection by PEFT's rules that means exactly the modules `wanted`."""
    everything = [name for name, _ in root.named_modules()]
    free = [n for n in everything if not any(n == s or n.startswith(s + ".") for s in saved)]
    for suffixes in ({name.rsplit(".", 1)[-1] for name in wanted}, wanted):
        if {n for n in free if n in suffixes or any(n.endswith("." + suffix) for suffix in suffixes)} == wanted:
            return sorted(suffixes)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _peft_modules_to_save(root: nn.Module, saved: list[str]) -> list[str] | None:
    """Return names that PEFT, which compares the ends of names letter by letter, takes for exactly `saved`."""
    if not saved:
        return None
    for inner in saved:
        for outer in saved:
            if inner.startswith(outer + "."):
                raise ValueError(
                    f"modules_to_save: PEFT cannot load {inner!r}, which {outer!r} holds; name one of them"
                )
    everything = [name for name, _ in root.named_modules(remove_duplicate=False)]
    for names in (saved_names(root), saved):
        if {n for n in everything if any(n.endswith(name) for name in names)} == set(saved):
            return names
    extra = min(n for n in everything if any(n.endswith(name) for name in saved) and n not in saved)
    raise ValueError(f"modules_to_save: PEFT would also save {extra!r}, whose name ends like one of {saved}")


def _write_checkpoint(
    model: nn.Module, directory: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write both files; wherever there is a config, the tensors beside it are those that it describes."""
    from safetensors.torch import save_file

    # Copies: safetensors refuses tensors that share memory.
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    directory = Path(directory)
    if is_writer(model):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / PEFT_CONFIG_FILE).unlink(missing_ok=True)
        replace_file(directory / PEFT_TENSORS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        text = json.dumps(header, indent=2, sort_keys=True)
        replace_file(directory / PEFT_CONFIG_FILE, lambda path: path.write_text(text + "\n"))
    wait_for_writer(unwrap(model))
    return directory / PEFT_TENSORS_FILE


def _stored_ranks(prefix: str, tensors: dict[str, Tensor]) -> tuple[int, ...]:
    """Return r_k of the subspaces of a layer in a PEFT checkpoint: the rows of its `adamss_A.<k>`."""
    ranks: list[int] = []
    while (A_k := tensors.get(f"{prefix}A.{len(ranks)}")) is not None:
        ranks.append(A_k.shape[0])
    return tuple(ranks)


def _imported_layer(model: nn.Module, name: str, config: AdaMSSConfig, checkpoint: Checkpoint) -> FusedAdaMSSLinear:
    """Build the layer that replaces the linear layer `name`, after checking that its rows can be rebuilt."""
    try:
        linear = plain_linear(name, model.get_submodule(name))
    except AttributeError:
        raise ValueError(f"{name}: the checkpoint adapts this module, which the model does not have") from None
    prefix = f"{_PREFIX}{name}.adamss_"
    ranks = _stored_ranks(prefix, checkpoint.tensors)
    # The rows do not depend on the ranks, which come from the file.
    rebuilding = dataclasses.replace(config, subspace_rank=1, use_dynamic_rank=False)
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
    packed = (t.to(linear.weight.device, rebuilt.B.dtype) for t in layout.pack(B, C))
    D = linear.in_features
    basis_bias = None if linear.bias is None else basis[:, D].contiguous()
    decomposition = Decomposition(basis[:, :D].contiguous(), basis_bias, layout, *packed)
    return FusedAdaMSSLinear(linear.weight, linear.bias, decomposition, config).train(linear.training)

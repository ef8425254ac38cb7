"""The file of an adapter: a safetensors file with all that it holds, written and read whole.

Its header carries everything that a loader reads, so that one atomic rename commits it; `adapter.json` beside it is for
people and other tools.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .atomic import replace_file
from .compact import probe
from .distributed import full_tensor, is_sharded
from .frozen_linear import FrozenLinear
from .linear import FusedAdaMSSLinear
from .sketch import sketch_linear

TENSORS_FILE = "adapter.safetensors"
HEADER_FILE = "adapter.json"
FORMAT_VERSION = 1
COMPACT_FORMAT_VERSION = 2
"""Of a compact file; of version 1 are those that keep B and a sketch of the basis, which 0.1.0 wrote."""


def write_layers(
    layers: Mapping[str, FrozenLinear],
    modules: Mapping[str, nn.Module],
    directory: Path,
    *,
    compact: bool = False,
    writes: bool = True,
) -> Path:
    """Write what `save_adapter` writes of a model that has these adapted layers and modules that are saved whole.

    Args:
        layers: By name.
        modules: By name.
        directory: As in `save_adapter`, and so is `compact`.
        compact: See there.
        writes: False on ranks that only take part in gathering tensors.
    """
    from safetensors.torch import save_file

    header: dict[str, Any] = {
        "format": "adamss_kernels",
        "format_version": COMPACT_FORMAT_VERSION if compact else FORMAT_VERSION,
        "compact": compact,
        "layers": {},
        "modules_to_save": [],
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        stored = {key: full_tensor(t) for key, t in layer.update_state().items()}
        weight, bias = layer.base_parameters()
        require_values(name, weight)
        info = header["layers"][name] = {
            "out_features": layer.out_features,
            "in_features": layer.in_features,
            "bias": layer.bias is not None,
            "base_dtype": str(weight.dtype).removeprefix("torch."),
        }
        if writes or is_sharded(weight):
            stored["base_sketch"] = sketch_linear(weight, bias)
        if isinstance(layer, FusedAdaMSSLinear):
            config = layer.config.to_dict()
            if header.setdefault("config", config) != config:
                info["config"] = config
            info |= {"r": layer.basis.shape[0], "ranks": list(layer.layout.ranks)}
            if compact and not torch.isfinite(stored["B"]).all():
                # On every rank alike: the others would wait for a writer that has gone.
                raise ValueError(f"{name}: compact: expected a finite B, which training has made infinite or NaN")
            if compact and writes:
                stored = _compacted(stored)
        else:
            if compact:
                raise ValueError(f"compact: {name} is a {type(layer).__name__}, which has no basis that can be rebuilt")
            related: Any = layer
            info |= {"method": related.method, "options": related.options}
        tensors |= {f"layers.{name}.{key}": t for key, t in stored.items()}
    for name, module in modules.items():
        header["modules_to_save"].append(name)
        tensors |= {f"modules.{name}.{key}": full_tensor(t) for key, t in module.state_dict().items()}

    # Copies: safetensors refuses tensors that share memory.
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    text = json.dumps(header, indent=2)
    if writes:
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / HEADER_FILE, lambda path: path.write_text(text + "\n"))
        metadata = {"adamss_kernels": text}
        replace_file(directory / TENSORS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    return directory / TENSORS_FILE


def _compacted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what a compact file keeps of a layer's tensors: nothing that can be rebuilt, in few bytes."""
    Z = probe(state["B"], state["basis"], state.get("basis_bias"))
    # The header has the ranks.
    kept = {key: t for key, t in state.items() if key not in ("basis", "basis_bias", "B", "ranks")}
    kept["row_subspace"] = kept["row_subspace"].to(_row_dtype(state["ranks"].numel()))
    return kept | {"probed_B": Z, "base_sketch": kept["base_sketch"].float()}


def _row_dtype(K: int) -> torch.dtype:
    """Return the narrowest dtype that counts to K in a compact file."""
    return torch.uint8 if K <= 256 else torch.int32


class Checkpoint:
    """The contents of a checkpoint file; `take` hands out tensors and complains by name.

    Attributes:
        path: Of the file.
        header: What stands beside the tensors.
        tensors: By name.
        used: Names of those that have been taken.
    """

    def __init__(self, path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.path, self.header, self.tensors = path, header, tensors
        self.used: set[str] = set()

    def take(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor, or raise a `ValueError` where it is missing or has another shape."""
        if key not in self.tensors:
            raise ValueError(f"{self.path}: tensor {key!r} is missing")
        tensor = self.tensors[key]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.path}: tensor {key!r} has shape {tuple(tensor.shape)}, expected {shape}")
        self.used.add(key)
        return tensor

    def contents(self) -> tuple[Any, ...]:
        """Return what tells one file from another without reading its tensors."""
        return self.header, [(key, tuple(t.shape), str(t.dtype)) for key, t in sorted(self.tensors.items())]


def read_checkpoint(path: Path) -> Checkpoint:
    """Return the contents of a file that `save_adapter` wrote.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is truncated, or of another format or version.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        message = f"{path}: no such file; expected a checkpoint written by save_adapter{_what_else(path.parent)}"
        raise FileNotFoundError(message)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    if "adamss_kernels" not in metadata:
        raise ValueError(f"{path}: a safetensors file, but not written by save_adapter")
    try:
        header = json.loads(metadata["adamss_kernels"])
        version = header["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: has a damaged header ({type(error).__name__}: {error})") from error
    readable = (FORMAT_VERSION, COMPACT_FORMAT_VERSION)
    if version not in readable:
        raise ValueError(f"{path}: format version {version}, this release reads {readable}")
    return Checkpoint(path, header, tensors)


def _what_else(directory: Path) -> str:
    """Say what `directory` is instead of a checkpoint of ours, where that can be told."""
    if directory.is_file():
        return f"; {directory} is a file, give the directory that holds it"
    if not directory.exists():
        return f"; there is no directory {directory}"
    if (directory / "adapter_config.json").is_file():
        return "; the directory has an adapter of PEFT: formats.import_peft loads its AdaMSS"
    if any(directory.glob("checkpoint-*")) or any(directory.glob("model*.safetensors")):
        return "; the directory has a Trainer's checkpoints, which hold whole models: load one, then call save_adapter"
    return ""


ON_META = "the base weight is on the meta device"
"""What messages say of a base without values."""


def require_values(name: str, weight: Tensor) -> None:
    """Raise a `ValueError` where a base weight has no values."""
    if weight.is_meta:
        raise ValueError(f"{name}: {ON_META}; load the base model's weights first")

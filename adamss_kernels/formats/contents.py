"""`read_contents`: what is in an adapter's directory, of any kind that this package reads, without its model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter_file import TENSORS_FILE, read_checkpoint
from ..compact import solve
from ..config import AdaMSSConfig
from ..decompose import rebuild_basis
from .files import PEFT_CONFIG_FILE, PEFT_TENSORS_FILE, PREFIX, read_peft_config

_PARTS = {
    "basis": ("basis", "basis_bias", "adamss_newB"),
    "B": ("B", "probed_B", "adamss_A"),
    "C": ("C", "adamss_B"),
    "rows": ("row_subspace", "ranks"),
    "masks": ("active", "trainable"),
    "sketch": ("base_sketch", "basis_sketch"),
    "lora": ("lora_A", "lora_B"),
}
"""The parts of an adapter by which its bytes are counted, and how the tensors of each begin."""


@dataclasses.dataclass(frozen=True)
class LayerContents:
    """One adapted layer.

    Attributes:
        method: "adamss", "lora", or another of `adamss_kernels.adapters.METHODS`.
        out_features: N.
        in_features: D; of PEFT's AdaMSS, whose files do not tell, one more where the layer has a bias.
        R: Rank of the basis; None for other methods.
        ranks: r_k of each subspace; of a LoRA its one rank.
        active: Of each subspace, whether it contributes.
        trainable: Of each subspace, whether it still trains.
        size: Frobenius norm of C (of lora_B), or of all that the method trains.
        bytes: By part.
        tensors: As they are in the file.
        config: What the layer was made with, where the file says it.
    """

    method: str
    out_features: int
    in_features: int
    R: int | None
    ranks: tuple[int, ...]
    active: tuple[bool, ...]
    trainable: tuple[bool, ...]
    size: float
    bytes: dict[str, int]
    tensors: Mapping[str, Tensor] = dataclasses.field(repr=False)
    config: Mapping[str, Any] = dataclasses.field(repr=False, default_factory=dict)

    @property
    def trained_numbers(self) -> int:
        """How many numbers train in the subspaces that still do: sum of r_k (R + n_k)."""
        if self.method != "adamss" or self.R is None:
            return sum(t.numel() for key, t in self.tensors.items() if key != "base_sketch" and t.is_floating_point())
        sizes = self.subspace_sizes()
        return sum(r * (self.R + n) for r, n, on in zip(self.ranks, sizes, self.trainable, strict=True) if on)

    def subspace_sizes(self) -> tuple[int, ...]:
        """Return n_k, the rows of each subspace."""
        if "row_subspace" in self.tensors:
            return tuple(torch.bincount(self.tensors["row_subspace"].long(), minlength=len(self.ranks)).tolist())
        return tuple(self.tensors[f"adamss_B.{k}"].shape[0] for k in range(len(self.ranks)))

    def update_norm(self, linear: nn.Linear | None = None) -> float | None:
        """Return the Frobenius norm of the update of W by the active subspaces; None for methods without a file's form.

        Args:
            linear: The base layer; needed where the file leaves the basis out.
        """
        if self.method == "lora" and {"lora_A", "lora_B"} <= self.tensors.keys():
            scale = self.config.get("lora_alpha", self.ranks[0]) / self.ranks[0]
            return float(abs(scale) * _product_norm(self.tensors["lora_B"], self.tensors["lora_A"]))
        if self.method != "adamss":
            return None
        factors = zip(self._factors(linear), self.active, strict=True)
        return sum(_product_norm(C_k, Q_k) ** 2 for (C_k, Q_k), on in factors if on) ** 0.5

    def _factors(self, linear: nn.Linear | None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield C_k (n_k, r_k) and Q_k (r_k, D) of each subspace."""
        t = self.tensors
        if "adamss_newB" in t:
            A = t["adamss_newB"][:, : self.in_features if linear is None else linear.in_features].double()
            for k in range(len(self.ranks)):
                yield t[f"adamss_B.{k}"].double(), t[f"adamss_A.{k}"].double() @ A
            return
        if "basis" in t:
            Q = t["B"].double() @ t["basis"].double()
        else:
            if linear is None:
                raise ValueError("the file leaves the basis out: give the base")
            basis, basis_bias = rebuild_basis(linear.weight, linear.bias, AdaMSSConfig(**self.config))
            B = t["B"].double() if "B" in t else solve(t["probed_B"], basis, basis_bias)[0]
            Q = B @ basis.double()
        offset = 0
        for k, r_k in enumerate(self.ranks):
            yield t["C"][t["row_subspace"] == k, :r_k].double(), Q[offset : offset + r_k]
            offset += r_k


@dataclasses.dataclass(frozen=True)
class Contents:
    """What a directory holds.

    Attributes:
        path: Of the file with the tensors.
        kind: What it is, in words.
        layers: By name.
        saved: Bytes of each module that is saved whole.
        file_bytes: Of all files that were read.
    """

    path: Path
    kind: str
    layers: dict[str, LayerContents]
    saved: dict[str, int]
    file_bytes: int


def read_contents(directory: Path) -> Contents:
    """Read an adapter: ours, PEFT's AdaMSS or LoRA, or a checkpoint of a `Trainer`, of which the last is taken.

    Args:
        directory: Where `save_adapter`, PEFT's `save_pretrained`, `export_peft`, `export_lora` or a Trainer wrote.

    Raises:
        FileNotFoundError: There is no such directory.
        ValueError: It holds nothing of that, or something damaged; the message names the file.
    """
    if not directory.is_dir():
        what = "a file, expected the directory that holds it" if directory.is_file() else "no such directory"
        raise FileNotFoundError(f"{directory}: {what}")
    if (directory / TENSORS_FILE).is_file():
        return _ours(directory / TENSORS_FILE)
    if (directory / PEFT_CONFIG_FILE).is_file():
        return _pefts(directory)
    shards = sorted(directory.glob("model*.safetensors"))
    if shards:
        return _state_dict(shards)
    steps = {int(m[1]): path for path in directory.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    if steps:
        return read_contents(steps[max(steps)])
    raise ValueError(
        f"{directory}: expected an adapter, but there is no {TENSORS_FILE} (save_adapter), no {PEFT_CONFIG_FILE} "
        "(PEFT), no model.safetensors and no checkpoint-<step> (Trainer)"
    )


def _ours(path: Path) -> Contents:
    checkpoint = read_checkpoint(path)
    header, layers = checkpoint.header, {}
    for name, info in header["layers"].items():
        tensors = _under(checkpoint.tensors, f"layers.{name}.")
        method, config = info.get("method", "adamss"), info.get("config") or header.get("config") or {}
        shape = (info["out_features"], info["in_features"])
        if method == "adamss":
            layers[name] = _adamss_layer(shape, info["r"], tuple(info["ranks"]), tensors, config)
        else:
            layers[name] = _other_layer(method, shape, tensors, info["options"])
    kind = "an adapter of save_adapter" + (", compact" if header["compact"] else "")
    saved = {n: _bytes(_under(checkpoint.tensors, f"modules.{n}.").values()) for n in header["modules_to_save"]}
    return Contents(path, kind, layers, saved, path.stat().st_size)


def _pefts(directory: Path) -> Contents:
    header, path = read_peft_config(directory), directory / PEFT_TENSORS_FILE
    type_ = header.get("peft_type")
    if type_ not in ("ADAMSS", "LORA"):
        raise ValueError(
            f"{directory / PEFT_CONFIG_FILE}: holds a PEFT adapter of type {type_!r}, expected ADAMSS or LORA"
        )
    everything = {key.removeprefix(PREFIX): t for key, t in _load(path).items()}
    mark = "adamss_" if type_ == "ADAMSS" else "lora_"
    names = dict.fromkeys(key.split(f".{mark}")[0] for key in everything if f".{mark}" in key)
    layers = {}
    for name in names:
        tensors = _under(everything, f"{name}.")
        if type_ == "LORA":
            factors = {key: tensors[f"{key}.weight"] for key in ("lora_A", "lora_B")}
            shape = (factors["lora_B"].shape[0], factors["lora_A"].shape[1])
            layers[name] = _other_layer("lora", shape, factors, {"lora_alpha": _alpha(header, name)})
            continue
        ranks = tuple(tensors[f"adamss_A.{k}"].shape[0] for k in range(sum("adamss_A." in key for key in tensors)))
        N, (R, width) = sum(tensors[f"adamss_B.{k}"].shape[0] for k in range(len(ranks))), tensors["adamss_newB"].shape
        # The last column may be the bias': only the base could tell.
        layers[name] = _adamss_layer((N, width), R, ranks, tensors, {})
    rest = [key for key in everything if f".{mark}" not in key]
    saved = {n: _bytes(_under(everything, f"{n}.").values()) for n in dict.fromkeys(k.rpartition(".")[0] for k in rest)}
    return Contents(path, f"PEFT's {'AdaMSS' if type_ == 'ADAMSS' else 'LoRA'}", layers, saved, path.stat().st_size)


def _alpha(header: Mapping[str, Any], name: str) -> float:
    patterns = header.get("alpha_pattern") or {}
    return next((a for pattern, a in patterns.items() if name.endswith(pattern)), header.get("lora_alpha", 1))


def _state_dict(paths: list[Path]) -> Contents:
    everything = {key: t for path in paths for key, t in _load(path).items()}
    layers = {}
    for key in everything:
        if key.endswith(".row_subspace"):
            name = key.removesuffix(".row_subspace")
            tensors = {k: t for k, t in _under(everything, f"{name}.").items() if k not in ("weight", "bias")}
            shape = (tensors["C"].shape[0], tensors["basis"].shape[1])
            layers[name] = _adamss_layer(
                shape, tensors["basis"].shape[0], tuple(tensors["ranks"].tolist()), tensors, {}
            )
    if not layers:
        raise ValueError(f"{paths[0]}: a model without an AdaMSS layer (no tensor '<layer>.row_subspace')")
    return Contents(paths[0], "a Trainer's checkpoint", layers, {}, sum(path.stat().st_size for path in paths))


def _adamss_layer(
    shape: tuple[int, int], R: int, ranks: tuple[int, ...], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LayerContents:
    everyone = torch.ones(len(ranks), dtype=torch.bool)
    masks = (tensors.get("active", everyone), tensors.get("trainable", everyone))
    active, trainable = masks[0].tolist(), (masks[0] & masks[1]).tolist()
    size = sum(float(t.double().square().sum()) for key, t in tensors.items() if _part(key) == "C") ** 0.5
    return LayerContents(
        "adamss", *shape, R, ranks, tuple(active), tuple(trainable), size, _by_part(tensors), tensors, config
    )


def _other_layer(
    method: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> LayerContents:
    learned = [t for key, t in tensors.items() if key not in ("base_sketch", "lora_A") and t.is_floating_point()]
    size = sum(float(t.double().square().sum()) for t in learned) ** 0.5
    rank = tensors["lora_A"].shape[0] if "lora_A" in tensors else int(config.get("rank") or 0)
    return LayerContents(method, *shape, None, (rank,), (True,), (True,), size, _by_part(tensors), tensors, config)


def _part(key: str) -> str:
    start = key.split(".")[0]
    return next((part for part, starts in _PARTS.items() if start in starts), "other")


def _by_part(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    total: dict[str, int] = {}
    for key, t in tensors.items():
        total[_part(key)] = total.get(_part(key), 0) + t.nbytes
    return total


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


def _product_norm(left: Tensor, right: Tensor) -> float:
    """Return ||left right||_F from two small Gram matrices, without the product."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0)) ** 0.5

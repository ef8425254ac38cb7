"""Frozen launch configurations by kernel, dtype, GPU and shape class, and which form runs for a shape.

None of the tables below has been measured: they hold what compiles for the GPU named without spills and within its
shared memory (docs/triton-registers.md) and what counting bytes and operations suggests. `adamss-kernels tune` measures
on the GPU at hand. A later source overrides an earlier one, entry by entry: this file, the user file
(`user_file()`), the file that the environment variable ADAMSS_TUNING names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KERNELS = ("low_rank_gemm", "token_products")
SHAPES = ("few", "small", "large")
DIRECTIONS = ("forward", "backward")
FORMS = ("fused", "torch")
FEW = 16
"""Tokens that one tile of the least height holds."""
MAX_RHO = 64
"""Columns of S that `low_rank_gemm` accumulates beside y at most."""

Key = tuple[str, str, str, str]
"""Kernel (or direction, for the form), dtype class "16" or "32", GPU, shape class."""


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        rows: Tile height: tokens.
        cols: Tile width: columns of y or dx; of dy and P in `token_products`.
        depth: Step of the sum over D or N; `token_products` sums over tokens and has none.
        group: Tile rows that run together for reuse of W in the L2 cache.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    rows: int
    cols: int
    depth: int = 64
    group: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "depth"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"Config.{name} = {value}: expected a power of two >= 16")
        if self.group < 1 or self.num_stages < 1 or self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self}: expected group >= 1, num_stages >= 1, num_warps a power of two <= 16")


_SHIPPED = {
    # (kernel, dtype class, shape class) to what every GPU can launch.
    ("low_rank_gemm", "16", "few"): Config(16, 32, 64, num_stages=5),
    ("low_rank_gemm", "16", "small"): Config(64, 64, 32, num_stages=4),
    ("low_rank_gemm", "16", "large"): Config(128, 128, 32, num_warps=8, num_stages=4),
    ("low_rank_gemm", "32", "few"): Config(16, 32, 64),
    ("low_rank_gemm", "32", "small"): Config(64, 64, 32, num_stages=2),
    ("low_rank_gemm", "32", "large"): Config(64, 128, 32, num_warps=8, num_stages=2),
    ("token_products", "16", "any"): Config(64, 128, num_warps=8),
    ("token_products", "32", "any"): Config(32, 32, num_stages=2),
}
CONFIGS: dict[Key, Config] = {
    ("low_rank_gemm", "16", "sm_90", "large"): Config(128, 256, 32, num_warps=8, num_stages=5),
    ("low_rank_gemm", "16", "sm_100", "large"): Config(128, 128, 64, num_warps=8, num_stages=4),
    ("low_rank_gemm", "16", "gfx942", "large"): Config(128, 128, 64, num_warps=8, num_stages=2),
}
"""What is shipped for one GPU beside what runs on all."""

_MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 2}
"""A table and not a query: equal inputs give equal bits on every part of an architecture."""


def shape_class(M: int) -> str:
    """Return the class in `SHAPES` of a product over M tokens."""
    return "few" if M <= FEW else "small" if M <= 512 else "large"


def key(name: str, dtype: torch.dtype, arch: str, shape: str) -> Key:
    """Return the key of a kernel's configuration, or of the form of "forward" or "backward"."""
    return name, "32" if dtype == torch.float32 else "16", arch, shape


def config(kernel: str, dtype: torch.dtype, arch: str, shape: str) -> Config:
    """Return the configuration of `kernel` (one of `KERNELS`) for a shape class; there always is one."""
    return _config(*key(kernel, dtype, arch, shape))


def form(direction: str, dtype: torch.dtype, arch: str, shape: tuple[int, int, int], rho: int, precision: str) -> str:
    """Return which of `FORMS` runs "forward" or "backward" for (M, D, N) = `shape`: the only place that says so.

    "fused" is one kernel for base and update. "torch" leaves the products to torch, between `prepare` and `finish`: for
    more columns of S than registers hold beside y, for float32 in full precision, which has no tensor cores, and for D
    and N that are no multiples of 16, whose rows Triton would load element by element.
    """
    M, D, N = shape
    if rho > MAX_RHO or (dtype == torch.float32 and precision == "ieee") or D % 16 or N % 16:
        return "torch"
    return _form(*key(direction, dtype, arch, shape_class(M)))


@functools.lru_cache(4096)
def run_length(arch: str, rows: int, cols: int, inner: float) -> int:
    """Return how many tiles across share an inner product that costs as much as `inner` tiles, of rows x cols tiles.

    The one that takes the fewest rounds of the GPU; of those that tie, the longest.
    """
    lengths = sorted({cdiv(cols, chunks) for chunks in range(1, cols + 1)}, reverse=True)
    return min(lengths, key=lambda n: cdiv(rows * cdiv(cols, n), _multiprocessors(arch)) * (n + inner))


@functools.lru_cache(4096)
def split_tokens(arch: str, M: int, rows: int, blocks: int) -> tuple[int, int]:
    """Return in how many parts to cut a sum over M tokens for each of `blocks` programs, and the tokens of a part.

    A part is a multiple of `rows`; writing and adding one costs about as much as four steps.
    """
    steps = cdiv(M, rows)
    lengths = sorted({cdiv(steps, parts) for parts in range(1, min(steps, 64) + 1)}, reverse=True)
    length = min(lengths, key=lambda n: cdiv(blocks * cdiv(steps, n), 2 * _multiprocessors(arch)) * (n + 4))
    return cdiv(steps, length), length * rows


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def _multiprocessors(arch: str) -> int:
    return _MULTIPROCESSORS.get(arch, 108)


@functools.cache
def arch_of(device: torch.device) -> str:
    """Return the name under which the tables know `device`: "sm_90", "gfx942", ... or "interpreter" for the CPU."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def user_file() -> Path:
    """Return where `adamss-kernels tune` writes and later runs read: under XDG_CONFIG_HOME or ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "adamss_kernels" / "tuning.json"


def use(configs: dict[Key, Config], forms: dict[Key, str]) -> None:
    """Put these entries before everything that was read, for the rest of the process or until `reload`."""
    _overrides()["configs"] |= {"/".join(entry): dataclasses.asdict(value) for entry, value in configs.items()}
    _overrides()["forms"] |= {"/".join(entry): value for entry, value in forms.items()}
    _config.cache_clear()
    _form.cache_clear()


def save(path: Path, configs: dict[Key, Config], forms: dict[Key, str]) -> None:
    """Write measured configurations and forms, merged over what `path` already holds."""
    tables = _read(path) if path.exists() else {"configs": {}, "forms": {}}
    tables["configs"] |= {"/".join(entry): dataclasses.asdict(value) for entry, value in configs.items()}
    tables["forms"] |= {"/".join(entry): value for entry, value in forms.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")
    scratch.replace(path)


def reload() -> None:
    """Forget what was read, so that the next call reads the files again."""
    for function in (_overrides, _config, _form):
        function.cache_clear()


@functools.cache
def _config(kernel: str, dtype: str, arch: str, shape: str) -> Config:
    found = _overrides()["configs"].get(f"{kernel}/{dtype}/{arch}/{shape}")
    if found is not None:
        return Config(**found)
    if arch == "interpreter":
        # Small tiles, so that small tests have several of them.
        return Config(16 if shape == "few" else 32, 32, 32, group=2)
    general = _SHIPPED.get((kernel, dtype, shape)) or _SHIPPED[kernel, dtype, "any"]
    return CONFIGS.get((kernel, dtype, arch, shape), general)


@functools.cache
def _form(direction: str, dtype: str, arch: str, shape: str) -> str:
    return str(_overrides()["forms"].get(f"{direction}/{dtype}/{arch}/{shape}", "fused"))


@functools.cache
def _overrides() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {"configs": {}, "forms": {}}
    named = os.environ.get("ADAMSS_TUNING")
    for path in (user_file(), *([Path(named)] if named else [])):
        if path == user_file() and not path.exists():
            continue
        for name, entries in _read(path).items():
            tables[name] |= entries
    return tables


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Read and validate a tuning file, so that a bad entry names its file and not a kernel launch."""
    try:
        tables = json.loads(path.read_text())
        if set(tables) != {"configs", "forms"}:
            raise ValueError(f"expected the keys 'configs' and 'forms', got {sorted(tables)}")
        for name, entry in tables["configs"].items():
            kernel, dtype, _, shape = name.split("/")
            if kernel not in KERNELS or dtype not in ("16", "32") or shape not in SHAPES:
                raise ValueError(f"configs: no kernel, dtype and shape class of this version: {name!r}")
            Config(**entry)
        for name, form in tables["forms"].items():
            direction, dtype, _, shape = name.split("/")
            if direction not in DIRECTIONS or dtype not in ("16", "32") or shape not in SHAPES:
                raise ValueError(f"forms: no direction, dtype and shape class of this version: {name!r}")
            if form not in FORMS:
                raise ValueError(f"forms: expected one of {FORMS} for {name!r}, got {form!r}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"tuning file {path}: {error}") from error
    return tables

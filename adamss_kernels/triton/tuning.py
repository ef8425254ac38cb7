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

KERNELS = ("linear_fwd", "linear_from_s", "delta_fwd", "project", "delta_bwd", "linear_dx", "token_product")
SHAPES = ("odd", "decode", "small-narrow", "small-wide", "large-narrow", "large-wide")
FORWARD_FORMS = ("fused", "two_launch", "epilogue")
BACKWARD_FORMS = ("two_launch", "epilogue")
MAX_FUSED_RHO = 64
MAX_FUSED_SLICE = 32
"""Columns of S, and of P per column of tiles, that the one-pass kernel accumulates beside y at most."""


Key = tuple[str, str, str, str]
"""Kernel (or "forward", "backward"), dtype class "16" or "32", GPU, shape class."""


@dataclass(frozen=True)
class Config:
    """How one kernel is launched.

    Attributes:
        rows: Tile height: tokens.
        cols: Tile width: BLOCK_N, BLOCK_D or BLOCK_Z, the output dimension of the kernel.
        depth: Step of the reduction loop; unused where the kernel has none.
        split: Programs that share one reduction; 0 takes as many as fill the GPU.
        group: Tile rows that run together for reuse of W in the L2 cache.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    rows: int
    cols: int
    depth: int = 64
    split: int = 1
    group: int = 8
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "depth"):
            value = getattr(self, name)
            if value < 16 or value & (value - 1):
                raise ValueError(f"Config.{name} = {value}: expected a power of two >= 16")
        if self.split < 0 or self.group < 1 or self.num_stages < 1 or self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"{self}: expected split >= 0, group >= 1, num_stages >= 1, num_warps a power of two <= 16"
            )


_BASE = {
    # What every GPU can launch: at most 48 KiB of shared memory.
    ("linear_fwd", "16"): Config(64, 128, 32, num_warps=8),
    ("linear_from_s", "16"): Config(64, 128, 32),
    ("linear_dx", "16"): Config(64, 128, 32),
    ("delta_fwd", "16"): Config(64, 64),
    ("project", "16"): Config(64, 16, 32, split=0),
    ("delta_bwd", "16"): Config(64, 64, split=0, num_stages=2),
    ("token_product", "16"): Config(64, 64, split=0, num_stages=2),
    # Without tf32 a product is multiplied and added in registers, so its tiles are smaller still.
    ("linear_fwd", "32"): Config(16, 32, 16, num_stages=1),
    ("linear_from_s", "32"): Config(32, 64, 16, num_stages=2),
    ("linear_dx", "32"): Config(32, 32, 16, num_stages=2),
    ("delta_fwd", "32"): Config(32, 64),
    ("project", "32"): Config(32, 16, 16, split=0, num_warps=8, num_stages=2),
    ("delta_bwd", "32"): Config(32, 16, split=0, num_warps=8, num_stages=2),
    ("token_product", "32"): Config(32, 64, split=0, num_warps=8, num_stages=2),
}

_DECODE = {
    ("linear_fwd", "16"): Config(16, 64, 64, split=0, group=1),
    ("linear_fwd", "32"): Config(16, 32, 16, split=0, group=1),
    ("linear_from_s", "16"): Config(16, 64, 64, group=1),
    ("linear_from_s", "32"): Config(16, 64, 16, group=1),
}

CONFIGS: dict[Key, Config] = {
    (kernel, "16", arch, shape): config
    for arch, config in {
        "sm_80": Config(128, 128, 32, num_warps=8, num_stages=4),
        "sm_90": Config(128, 256, 64, num_warps=8),
        "sm_100": Config(128, 256, 64, num_warps=8),
        "gfx942": Config(128, 128, 32, num_warps=8, num_stages=2),
    }.items()
    for kernel in ("linear_fwd", "linear_from_s", "linear_dx")
    for shape in ("large-narrow", "large-wide")
}
"""(kernel, dtype class, GPU, shape class) to the configuration shipped for it; the rest takes a conservative one."""

_FORWARD_FORMS = {
    # A wide product in Triton has to come within some 8 % of cuBLAS before it beats the epilogue's pass over y.
    ("16", "decode"): "fused",
    ("16", "small-narrow"): "fused",
    ("16", "small-wide"): "epilogue",
    ("16", "large-narrow"): "fused",
    ("16", "large-wide"): "epilogue",
}

_PROGRAMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304, "interpreter": 2}
"""Multiprocessors per GPU. A table and not a query: equal inputs give equal bits on every part of an architecture."""


def shape_class(M: int, D: int, N: int) -> str:
    """Return the class in `SHAPES` of a product (M, D) by (D, N); "odd" where tiles of 64 do not come out even."""
    if D % 64 or N % 64:
        return "odd"
    if M <= 16:
        return "decode"
    return f"{'small' if M <= 512 else 'large'}-{'narrow' if D < 1600 else 'wide'}"


def key(name: str, dtype: torch.dtype, arch: str, shape: str) -> Key:
    """Return the key of a kernel's configuration, or of the form of "forward" or "backward"."""
    return name, "32" if dtype == torch.float32 else "16", arch, shape


def config(kernel: str, dtype: torch.dtype, arch: str, shape: str) -> Config:
    """Return the configuration of `kernel` (one of `KERNELS`) for a shape class; there always is one."""
    return _config(*key(kernel, dtype, arch, shape))


def forward_form(dtype: torch.dtype, arch: str, shape: str) -> str:
    """Return which of `FORWARD_FORMS` to run for a shape class.

    "fused" is one pass over x for y and S, "two_launch" computes S first and starts the product's accumulator from
    S Ct, "epilogue" adds S Ct to torch's product in place.
    """
    return _form(*key("forward", dtype, arch, shape))


def backward_form(dtype: torch.dtype, arch: str, shape: str) -> str:
    """Return which of `BACKWARD_FORMS` computes dx: one product over [dS | dy], or torch's dy W and then dS Q."""
    return _form(*key("backward", dtype, arch, shape))


def fill(arch: str, programs: int, limit: int) -> int:
    """Return in how many parts to split a reduction so that two programs per multiprocessor run; 1 to `limit`."""
    return max(1, min(limit, 2 * _PROGRAMS.get(arch, 108) // max(programs, 1)))


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
        return Config(32, 32, 32, split=0, group=2)
    if (kernel, dtype, arch, shape) in CONFIGS:
        return CONFIGS[kernel, dtype, arch, shape]
    if shape == "decode" and (kernel, dtype) in _DECODE:
        return _DECODE[kernel, dtype]
    if shape == "odd" and dtype == "16":
        # Rows that are not aligned are loaded element by element, which takes an address, hence registers, for each.
        base = _BASE[kernel, dtype]
        return dataclasses.replace(base, cols=min(base.cols, 64), num_warps=8)
    return _BASE[kernel, dtype]


@functools.cache
def _form(direction: str, dtype: str, arch: str, shape: str) -> str:
    found = _overrides()["forms"].get(f"{direction}/{dtype}/{arch}/{shape}")
    if found is not None:
        return found
    return _FORWARD_FORMS.get((dtype, shape), "epilogue") if direction == "forward" else "epilogue"


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
            choices = {"forward": FORWARD_FORMS, "backward": BACKWARD_FORMS}.get(direction, ())
            if form not in choices or dtype not in ("16", "32") or shape not in SHAPES:
                raise ValueError(f"forms: expected one of {choices} for {name!r}, got {form!r}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"tuning file {path}: {error}") from error
    return tables

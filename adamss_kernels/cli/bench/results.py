"""Results as JSON lines: first what the numbers depend on besides the code, then one row a line."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ...atomic import replace_file
from ...compiled import cpu_library, cuda_library
from ..info import installed_version

Row = dict[str, Any]
"""A measurement: `suite`, `case` (what was measured), `provider`, and its figures."""


def key(row: Row) -> str:
    """Return what names a row within a run, and the same measurement in another run."""
    case = " ".join(f"{name}={value}" for name, value in row["case"].items())
    return f"{row['suite']} {case} {row['provider']}"


def write(path: Path, environment: Row, rows: Iterable[Row]) -> None:
    """Replace the file `path` by `environment` and `rows`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(rounded(record)) + "\n" for record in ({"environment": environment}, *rows)]
    replace_file(path, lambda scratch: scratch.write_text("".join(lines)))


def read(path: Path) -> tuple[Row, list[Row]]:
    """Return environment and rows of a result file, or of all those in a directory (the environment of the first).

    Raises:
        ValueError: There is no result file, or it does not begin with an environment.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(f"{path}: expected a result file or a directory with *.jsonl, found none")
    environments: list[Row] = []
    rows: list[Row] = []
    for file in files:
        first, *rest = map(json.loads, file.read_text().splitlines())
        if "environment" not in first:
            raise ValueError(f"{file}: expected an environment in the first line, got {sorted(first)}")
        environments.append(_present_names(first["environment"]))
        rows += map(_present_names, rest)
    return environments[0], rows


def _present_names(record: Row) -> Row:
    """Return `record` with what files of 0.1.0 call "native" by its present names."""
    names = {"native": "cpu", "native-compiled": "cpu-compiled"}
    renamed = {"cpu_library" if key == "native" else key: value for key, value in record.items()}
    return renamed | ({"provider": names.get(record["provider"], record["provider"])} if "provider" in record else {})


def environment(device: torch.device | None = None) -> Row:
    """Return what a number depends on besides the code: hardware, versions, threads, commit, command."""
    record: Row = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "cpus": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
        "load_average": os.getloadavg(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_library": cpu_library.describe(),
        "versions": {name: installed_version(name) for name in ("torch", "triton", "peft", "transformers", "numpy")}
        | {"python": platform.python_version()},
        # A copy of the sources without their history is told.
        "commit": os.environ.get("ADAMSS_COMMIT")
        or _said("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
        "command": _command(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device is not None and device.type == "cuda":
        record |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda_library": cuda_library.describe()["state"],
            "cuda": torch.version.cuda or f"hip {torch.version.hip}",
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "gpu_state": gpu_state(),
        }
    return record


def gpu_state() -> str | None:
    """Return the GPUs' clocks, temperature, power and reasons for throttling; None where nvidia-smi is missing."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,clocks_throttle_reasons.active"
    return _said("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")


def machine(device: torch.device) -> str:
    """Return the word that result files of this device begin with, so that no processor's replace another's.

    A CPU's name is no model: instruction sets tell those of one maker apart, as far as the kernels are concerned.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_model().split(' x ', 1)[-1]} {cpu_library.describe().get('ISA', 'reference').split()[0]}"
    return re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"\(\w+\)", "", name)).strip("-") or device.type


def rounded(value: Any) -> Any:
    """Return `value` with floats of five digits: more would only be noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, (list, tuple)) else value


def _command() -> str:
    """Return the command line without the paths of this machine."""
    program = Path(sys.argv[0])
    is_command = program.name in ("adamss-kernels", "__main__.py")
    words = ["adamss-kernels"] if is_command else ["python", program.name if program.is_absolute() else str(program)]
    return " ".join([*words, *sys.argv[1:]])


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

"""What bench/gpu.sh runs: stages, each in a process of its own, each able to run alone."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import interleaved, markdown

from adamss_kernels import ops
from adamss_kernels.cli.bench import results

ROOT = Path(__file__).parents[1]
# In the order in which they run: parts of the time that there is. What a stage leaves goes to those after it.
SHARES = {"build": 40, "tests": 120, "probe": 40, "grid": 100, "step": 100, "asa": 10, "sanitize": 60}
# Seconds that a stage may go on for after its budget, until it is killed; and what writing the summary takes.
GRACE = 8
_IMPORTED = time.time()

Row = dict[str, Any]
Record = Callable[[Row], None]
"""Keeps a row as it is measured, for the case that its stage does not live to the end."""


def build(device: torch.device, budget: float, record: Record) -> None:
    """The CUDA library, into the user's cache, from where the stages that follow take it; a dry run runs no nvcc."""
    command = [sys.executable, "-m", "adamss_kernels", "build-cuda"]
    status, said = _run([*command, *(["--dry-run"] if device.type == "cpu" else [])], device, budget)
    # Triton's figures need no nvcc.
    record({"status": status, "said": " ".join(said.split())[:1000]})


def tests(device: torch.device, budget: float, record: Record) -> None:
    """The GPU tests, every backend by name, on data drawn afresh; the other tests need no GPU, or a built library."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rfEs", "--tb=short"]
    variables = {"ADAMSS_TEST_DEVICE": device.type}
    if device.type == "cuda" and importlib.util.find_spec("xdist"):
        # What takes long is the CPU's: hundreds of compilations.
        command += ["-n", str(max(1, os.cpu_count() or 1))]
        variables["OMP_NUM_THREADS"] = "2"
    for backend in ("cuda", "triton", "reference"):
        others = " and ".join(f"not {name}" for name in ("cpu", "cuda", "triton", "reference") if name != backend)
        start = time.monotonic()
        status, said = _run([*command, "-k", others, "tests/test_gpu.py"], device, budget, **variables)
        budget -= time.monotonic() - start
        record({"backend": backend, "status": status, **outcome(said)})


def outcome(said: str) -> Row:
    """Return how many tests passed and failed by what pytest said, also where it was stopped; and what failed, why."""
    ended = re.findall(
        r"(\d+) (passed|failed|skipped|errors?)\b", said.strip().splitlines()[-1] if said.strip() else ""
    )
    counts: Row = {word: int(n) for n, word in ended}
    if not ended:
        counts = {word.lower(): said.count(f" {word} ") for word in ("PASSED", "FAILED")} | {"stopped": True}
    failed = sorted(set(re.findall(r"(?:FAILED|ERROR) (tests/\S+(?: - .*)?)", said)))
    return counts | ({"failures": failed[:20]} if failed else {})


def probe(device: torch.device, budget: float, record: Record) -> None:
    """What the card can do at most, and how long each of our kernels takes."""
    importlib.import_module("probe").run(device, budget, record)


def grid(device: torch.device, budget: float, record: Record) -> None:
    """One layer against the bare frozen linear, PEFT's AdaMSS and LoRA."""
    importlib.import_module("grid").run(device, budget, record)


def step(device: torch.device, budget: float, record: Record) -> None:
    """A training step of a 3B-Llama-shaped model."""
    importlib.import_module("llama_step").run(device, budget, record)


def asa(device: torch.device, budget: float, record: Record) -> None:
    """An importance update and a pruning event over 48 layers."""
    import adamss_kernels

    config = adamss_kernels.AdaMSSConfig(
        r=100, num_subspaces=10, subspace_rank=1, use_asa=True, init_warmup=1, final_warmup=10**6, mask_interval=10**5
    )
    width, layers = (1024, 48) if device.type == "cuda" else (32, 3)
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).to(device)
    adamss_kernels.inject_adamss(model, config, progress=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.randn_like(p)
    # Not attached to an optimizer, it scores every call.
    allocator = adamss_kernels.SubspaceAllocator(model, config)
    calls: dict[str, Callable[[], object]] = {
        "update": lambda: allocator.update_and_allocate(config.init_warmup + 1),
        "event": lambda: allocator.update_and_allocate(config.mask_interval),
    }
    for name, value in interleaved(calls, device, rounds=5).items():
        record({"step": name, "layers": layers, "seconds": value})


def sanitize(device: torch.device, budget: float, record: Record) -> None:
    """The kernels on small shapes under compute-sanitizer: memory errors, then races in shared memory."""
    deadline = time.monotonic() + budget
    program = [sys.executable, str(ROOT / "tools" / "small_shapes.py"), "--device", device.type]
    tool = shutil.which("compute-sanitizer")
    for backend, check in itertools.product(("cuda", "triton"), ("memcheck", "racecheck")):
        reason = ops.implementation(backend).why_unavailable(device.type, torch.float32)
        left = deadline - time.monotonic()
        if reason is not None or left < 5:
            record({"backend": backend, "check": check, "skipped": reason or "no time left"})
            continue
        prefix = sanitizer(tool, backend, check) if tool and device.type == "cuda" else []
        # Without torch's caching allocator, an access past the end of a tensor is one past the end of an allocation.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status, said = _run([*prefix, *program, "--backend", backend], device, left, **variables)
        watched = check if prefix else f"{check}: run without the sanitizer"
        # The sanitizer's own last word, or the program's: a status alone does not show that anything was watched.
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        row = {"backend": backend, "check": watched, "status": status, "said": last[:200]}
        record(row | ({"error": f"{said[:2000]} ... {said[-2000:]}"} if status else {}))


def sanitizer(tool: str, backend: str, check: str) -> list[str]:
    """Return the command before the one that is checked."""
    # cuBLAS's and torch's kernels are not ours to check, and take longest; many of them end in `_kernel`, too. Theirs
    # are mangled (_Z...), Triton's are not. Torch asks the driver for much that it does not have.
    ours = "kns=adamss" if backend == "cuda" else "regex=^_[a-z]"
    return [tool, "--tool", check, "--error-exitcode", "3", "--report-api-errors", "no", "--kernel-name", ours]


STAGES: dict[str, Callable[[torch.device, float, Record], None]] = {
    stage.__name__: stage for stage in (build, tests, probe, grid, step, asa, sanitize)
}


def _run(command: list[str], device: torch.device, limit: float, **variables: str) -> tuple[int, str]:
    """Run a command from the source tree; return its status, 124 where it was stopped, and all that it said by then."""
    if limit < 1:
        return 124, "no time left"
    if device.type == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    # A group of its own, so that what the command has started ends with it and does not keep the GPU busy; a file,
    # since whoever holds a pipe open keeps its reader waiting.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=said, stderr=said, preexec_fn=os.setpgrp
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            _stop(process)
        said.seek(0)
        return status, said.read() + f"\nstopped after {limit:.0f} s" * (status == 124)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the process and its group: first so that it can stop those that it started itself, then at once."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(3)


def append(path: Path, row: Row) -> None:
    """Add a line to a result file."""
    with path.open("a") as file:
        file.write(json.dumps(results.rounded(row)) + "\n")


def share(stage: str, later: list[str], left: float) -> float:
    """Return a stage's part of the seconds that are left."""
    return left * SHARES[stage] / (SHARES[stage] + sum(SHARES[name] for name in later))


def seconds_left(total: float) -> float:
    """Return in how many seconds the last stage has to be told to end, counted from when bench/gpu.sh began."""
    return float(os.environ.get("ADAMSS_BENCH_BEGAN") or _IMPORTED) + total - GRACE - time.time()


def run_stage(stage: str, device: torch.device, budget: float, path: Path) -> Row:
    """Run a stage in a process of its own, which adds its rows to `path`; return how it ended."""
    command = [sys.executable, __file__, "--stage", stage, "--device", device.type, "--out", str(path.parent)]
    start = time.monotonic()
    status, said = _run([*command, "--total", str(budget), "--in-this-process"], device, budget + GRACE / 2)
    ended: Row = {"stage": stage, "status": status, "seconds": time.monotonic() - start, "budget": budget}
    return ended | ({"error": said.strip()[-2000:]} if status else {})


def summary(environment: Row, rows: list[Row]) -> str:
    """Return all results as Markdown."""
    parts = ["# bench/gpu.sh", ""]
    parts += [f"- {key}: {value}" for key, value in environment.items()]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [{k: v for k, v in row.items() if k != "stage"} for row in rows if row["stage"] == stage]
        parts += ["", f"## {stage}", "", markdown([row for row in own if "budget" not in row])]
        parts += [f"\n{row['seconds']:.0f} s; {row.get('error', 'ended')}" for row in own if "budget" in row]
    return "\n".join(parts) + "\n"


def main() -> int:
    """Run the stages asked for, each in a fresh process, and write the summary; the status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="directory for the results; default $OUT, or below bench/results")
    parser.add_argument("--total", type=float, default=570, help="seconds for all stages together")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu makes a dry run", file=sys.stderr)
        return 2
    # A dry run measures nothing worth keeping.
    default = (
        ROOT / "build" / "bench-cpu" if args.device == "cpu" else ROOT / "bench" / "results" / results.machine(device)
    )
    out = Path(args.out or os.environ.get("OUT") or default).resolve()
    path = out / "results.jsonl"
    if args.in_this_process:
        stage = args.stage[0]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
        STAGES[stage](device, args.total, lambda row: append(path, {"stage": stage, **row}))
        return 0

    out.mkdir(parents=True, exist_ok=True)
    environment = results.environment(device)
    results.write(path, environment, [])
    for index, stage in enumerate(args.stage):
        budget = share(stage, args.stage[index + 1 :], seconds_left(args.total))
        ended: Row = {"stage": stage, "status": 0, "seconds": 0.0, "budget": budget, "error": "skipped: no time left"}
        if budget >= 2:
            ended = run_stage(stage, device, budget, path)
        append(path, ended)
        print(f"{stage}: {ended.get('error', 'done')[-500:]} ({ended['seconds']:.0f} s)", flush=True)
        (out / "summary.md").write_text(summary(*results.read(path)))
    print((out / "summary.md").read_text()[-9000:])
    return int(any(row.get("status") for row in results.read(path)[1]))


if __name__ == "__main__":
    sys.exit(main())

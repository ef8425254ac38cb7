"""What bench/gpu.sh runs: stages, each in a process of its own, each able to run alone."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_timing import interleaved, markdown

from adamss_kernels import ops
from adamss_kernels.cli.bench.results import environment

ROOT = Path(__file__).parents[1]
# Seconds that a stage may start new work for; the sum stays below ten minutes.
BUDGETS = {"build": 30, "tests": 120, "sanitize": 90, "tune": 120, "grid": 120, "step": 120, "asa": 20}


def build(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """The CUDA library, into the user's cache, from where the stages that follow take it; a dry run runs no nvcc."""
    command = [sys.executable, "-m", "adamss_kernels", "build-cuda"]
    done = _run([*command, *(["--dry-run"] if device.type == "cpu" else [])], device, budget)
    result: dict[str, Any] = {"rows": [{"status": done.returncode, "said": done.stdout.strip().replace("\n", " ")}]}
    # Triton's figures need no nvcc.
    return result | ({"skipped": "backend cuda: " + done.stdout.strip()} if done.returncode else {})


def tests(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """The GPU tests, every backend by name, on data drawn afresh; the other tests need no GPU, or a built library."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs", "tests/test_gpu.py"]
    done = _run(command, device, budget, ADAMSS_TEST_DEVICE=device.type)
    tail = done.stdout.strip().splitlines()[-30:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", tail[-1] if tail else "")}
    result: dict[str, Any] = {"rows": [counts], "output": tail}
    if done.returncode:
        result["error"] = f"pytest ended with status {done.returncode}"
    return result


def sanitize(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """The kernels on small shapes under compute-sanitizer: memory errors, then races in shared memory."""
    rows, errors = [], []
    program = [sys.executable, str(ROOT / "bench" / "small_shapes.py"), "--device", device.type]
    tool = shutil.which("compute-sanitizer")
    for backend, check in itertools.product(("triton", "cuda"), ("memcheck", "racecheck")):
        reason = ops.implementation(backend).unavailable(device.type, torch.float32)
        if reason is not None:
            rows.append({"backend": backend, "check": check, "status": f"not run: {reason}"})
            continue
        prefix = [tool, "--tool", check, "--error-exitcode", "3"] if tool and device.type == "cuda" else []
        # Without torch's caching allocator, an access past the end of a tensor is one past the end of an allocation.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = _run([*prefix, *program, "--backend", backend], device, budget / 4, **variables)
        said = check if prefix else f"{check}: run without the sanitizer"
        rows.append({"backend": backend, "check": said, "status": done.returncode})
        if done.returncode:
            errors.append(f"{backend}, {check}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return {"rows": rows, **({"error": "\n".join(errors)} if errors else {})}


def tune(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """The tuning sweep; its file lies beside the results and is used by the stages that follow."""
    path = out / "tuning.json"
    command = [sys.executable, "-m", "adamss_kernels", "tune", "--device", device.type, "--seconds", str(budget * 0.8)]
    dtype, shapes = ("bfloat16", []) if device.type == "cuda" else ("float32", ["--shape", "decode"])
    done = _run([*command, "--dtype", dtype, *shapes, "--out", str(path)], device, 3 * budget)
    result: dict[str, Any] = {"output": done.stdout.strip().splitlines()}
    if done.returncode:
        return result | {"error": done.stderr[-2000:] or f"status {done.returncode}"}
    return result | {"tuning": json.loads(path.read_text())}


def grid(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """One layer against the bare frozen linear, PEFT's AdaMSS and LoRA."""
    return importlib.import_module("grid").run(device, budget)


def step(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """A training step of a 3B-Llama-shaped model."""
    return importlib.import_module("llama_step").run(device, budget)


def asa(device: torch.device, budget: float, out: Path) -> dict[str, Any]:
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
    times = interleaved(calls, device, rounds=5)
    return {"rows": [{"step": name, "layers": layers, "seconds": value} for name, value in times.items()]}


STAGES: dict[str, Callable[[torch.device, float, Path], dict[str, Any]]] = {
    stage.__name__: stage for stage in (build, tests, sanitize, tune, grid, step, asa)
}


def _run(command: list[str], device: torch.device, limit: float, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command from the source tree; on the CPU the Triton kernels go through the interpreter."""
    if device.type == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    try:
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=5 * limit
        )
    except subprocess.TimeoutExpired as error:
        return subprocess.CompletedProcess(command, 124, "", f"still running after {error.timeout} s")


def _child(stage: str, device: torch.device, budget: float, out: Path) -> int:
    """Run one stage in this process and write its JSON."""
    start = time.perf_counter()
    try:
        result = STAGES[stage](device, budget, out)
    except Exception as error:  # a stage that fails must not take the others with it
        result = {"error": f"{type(error).__name__}: {error}"}
    record = {"stage": stage, "environment": environment(device), "seconds": time.perf_counter() - start, **result}
    (out / f"{stage}.json").write_text(json.dumps(record, indent=1) + "\n")
    return int("error" in record)


def _summary(records: list[dict[str, Any]]) -> str:
    """Return all results as Markdown."""
    parts = ["# bench/gpu.sh", ""]
    parts += [f"- {key}: {value}" for key, value in (records[0]["environment"] if records else {}).items()]
    for record in records:
        parts += ["", f"## {record['stage']} ({record['seconds']:.0f} s)", ""]
        parts += [f"{word}: {record[word]}" for word in ("error", "skipped", "note") if record.get(word)]
        rows = [row for row in record.get("rows", []) if row]
        parts += [markdown(rows)] if rows else []
    return "\n".join(parts) + "\n"


def _gpu() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name()).strip("-")


def main() -> int:
    """Run the stages asked for, each in a fresh process, and write the summary; the status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", nargs="+", choices=tuple(STAGES), default=list(STAGES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="directory for the results; default $OUT, or below bench/results")
    parser.add_argument("--seconds", type=float, help="instead of each stage's own budget")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device; --device cpu makes a dry run", file=sys.stderr)
        return 2
    # A dry run measures nothing worth keeping.
    default = ROOT / "build" / "bench-cpu" if args.device == "cpu" else ROOT / "bench" / "results" / _gpu()
    out = Path(args.out or os.environ.get("OUT") or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.in_this_process:
        return _child(args.stage[0], device, args.seconds, out)

    records = []
    for stage in args.stage:
        budget = args.seconds or BUDGETS[stage]
        (out / f"{stage}.json").unlink(missing_ok=True)
        command = [sys.executable, __file__, "--stage", stage, "--device", args.device, "--out", str(out)]
        tuned = {"ADAMSS_TUNING": str(out / "tuning.json")} if (out / "tuning.json").exists() else {}
        done = _run([*command, "--seconds", str(budget), "--in-this-process"], device, budget, **tuned)
        path = out / f"{stage}.json"
        if not path.exists():
            message = f"ended with status {done.returncode}: {done.stderr[-2000:]}"
            record = {"stage": stage, "environment": environment(device), "seconds": budget, "error": message}
        else:
            record = json.loads(path.read_text())
        record["environment"]["command"] = ["bench/gpu.py", *sys.argv[1:]]
        path.write_text(json.dumps(record, indent=1) + "\n")
        records.append(record)
        said = records[-1].get("error") or records[-1].get("skipped") or "done"
        print(f"{stage}: {said} ({records[-1]['seconds']:.0f} s)", flush=True)
    (out / "summary.md").write_text(_summary(records))
    print(f"wrote {out}")
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_timing import interleaved, markdown

from adamss_kernels import ops
from adamss_kernels.atomic import replace_file
from adamss_kernels.cli.bench.results import environment

ROOT = Path(__file__).parents[1]
# In the order in which they run: seconds that a stage may start new work for. GRACE later it is killed.
BUDGETS = {"build": 45, "tests": 140, "tune": 80, "grid": 110, "step": 90, "asa": 15, "sanitize": 70}
GRACE = 20
# All stages together end before this: below ten minutes, whatever hangs.
TOTAL = 570
_IMPORTED = time.time()

Save = Callable[[dict[str, Any]], None]
"""Keeps what a stage has so far, for the case that it does not live to return it."""


def build(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
    """The CUDA library, into the user's cache, from where the stages that follow take it; a dry run runs no nvcc."""
    command = [sys.executable, "-m", "adamss_kernels", "build-cuda"]
    status, said = _run([*command, *(["--dry-run"] if device.type == "cpu" else [])], device, budget)
    said = said.strip()
    result: dict[str, Any] = {"rows": [{"status": status, "said": said.replace("\n", " ")}]}
    # Triton's figures need no nvcc.
    return result | ({"skipped": f"backend cuda: {said}"} if status else {})


def tests(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
    """The GPU tests, every backend by name, on data drawn afresh; the other tests need no GPU, or a built library."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-rfEs", "--tb=short"]
    variables = {"ADAMSS_TEST_DEVICE": device.type}
    if device.type == "cuda" and importlib.util.find_spec("xdist"):
        # What takes long is the CPU's: hundreds of compilations.
        command += ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]
        variables["OMP_NUM_THREADS"] = "2"
    status, said = _run([*command, "tests/test_gpu.py"], device, budget, **variables)
    lines = said.strip().splitlines()
    last = lines[-1] if lines else ""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    result: dict[str, Any] = {"rows": [counts], "output": lines}
    if status:
        # In pytest's summary, or where it was stopped before that, as they came.
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
        failed = failed or [line for line in lines if "FAILED" in line or "ERROR" in line]
        result["error"] = "\n".join([f"pytest ended with status {status}", *failed])
    return result


def sanitize(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
    """The kernels on small shapes under compute-sanitizer: memory errors, then races in shared memory."""
    deadline = time.monotonic() + budget
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"rows": rows}
    program = [sys.executable, str(ROOT / "bench" / "small_shapes.py"), "--device", device.type]
    tool = shutil.which("compute-sanitizer")
    for backend, check in itertools.product(("cuda", "triton"), ("memcheck", "racecheck")):
        reason = ops.implementation(backend).unavailable(device.type, torch.float32)
        left = deadline - time.monotonic()
        if reason is not None or left < 5:
            rows.append({"backend": backend, "check": check, "status": f"not run: {reason or 'no time left'}"})
            continue
        prefix = sanitizer(tool, backend, check) if tool and device.type == "cuda" else []
        # Without torch's caching allocator, an access past the end of a tensor is one past the end of an allocation.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        status, said = _run([*prefix, *program, "--backend", backend], device, left, **variables)
        watched = check if prefix else f"{check}: run without the sanitizer"
        # The sanitizer's own last word, or the program's: a status alone does not show that anything was watched.
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        rows.append({"backend": backend, "check": watched, "status": status, "said": last[:200]})
        if status:
            result["error"] = f"{result.get('error', '')}{backend}, {check}: {said[:2000]} ... {said[-2000:]}\n"
        save(result)
    return result


def sanitizer(tool: str, backend: str, check: str) -> list[str]:
    """Return the command before the one that is checked."""
    # cuBLAS's and torch's kernels are not ours to check, and take longest; many of them end in `_kernel`, too. Theirs
    # are mangled (_Z...), Triton's are not. Torch asks the driver for much that it does not have.
    ours = "kns=adamss" if backend == "cuda" else "regex=^_[a-z]"
    return [tool, "--tool", check, "--error-exitcode", "3", "--report-api-errors", "no", "--kernel-name", ours]


def tune(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
    """The tuning sweep; the stages that follow use what it found."""
    dtype, shapes = ("bfloat16", []) if device.type == "cuda" else ("float32", ["--shape", "decode"])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "tuning.json")
        command = [sys.executable, "-m", "adamss_kernels", "tune", "--device", device.type, "--out", str(path)]
        command += ["--seconds", str(budget * 0.8), "--dtype", dtype, *shapes]
        status, said = _run(command, device, budget)
        result: dict[str, Any] = {"output": said.strip().splitlines()}
        if status:
            result["error"] = f"ended with status {status}: {said[-2000:]}"
        # It is written after each shape class.
        return result | ({"tuning": json.loads(path.read_text())} if path.exists() else {})


def grid(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
    """One layer against the bare frozen linear, PEFT's AdaMSS and LoRA."""
    return importlib.import_module("grid").run(device, budget, save)


def step(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
    """A training step of a 3B-Llama-shaped model."""
    return importlib.import_module("llama_step").run(device, budget, save)


def asa(device: torch.device, budget: float, save: Save) -> dict[str, Any]:
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


STAGES: dict[str, Callable[[torch.device, float, Save], dict[str, Any]]] = {
    stage.__name__: stage for stage in (build, tests, tune, grid, step, asa, sanitize)
}


def _run(command: list[str], device: torch.device, limit: float, **variables: str) -> tuple[int, str]:
    """Run a command from the source tree; return its status, 124 where it was stopped, and all that it said by then.

    On the CPU the Triton kernels go through the interpreter, and nobody is in a hurry.
    """
    if device.type == "cpu":
        variables["TRITON_INTERPRET"] = "1"
        limit *= 10
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


def _child(stage: str, device: torch.device, budget: float, out: Path) -> int:
    """Run one stage in this process and write its JSON, as far as it has come each time that it saves."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(124))
    start, about = time.perf_counter(), environment(device)

    def save(result: dict[str, Any]) -> None:
        record = {"stage": stage, "environment": about, "seconds": time.perf_counter() - start, **result}
        text = json.dumps(record, indent=1) + "\n"
        replace_file(out / f"{stage}.json", lambda scratch: scratch.write_text(text))

    try:
        result = STAGES[stage](device, budget, save)
    except Exception as error:  # a stage that fails must not take the others with it
        result = {"error": f"{type(error).__name__}: {error}"}
    save(result)
    return int("error" in result)


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

    records: list[dict[str, Any]] = []
    for index, stage in enumerate(args.stage):
        left = seconds_left() if args.device == "cuda" else TOTAL
        budget = args.seconds or share(stage, args.stage[index + 1 :], left)
        path = out / f"{stage}.json"
        path.unlink(missing_ok=True)
        if budget < 5:
            records.append({"stage": stage, "environment": {}, "seconds": 0, "skipped": "no time left"})
        else:
            records.append(_stage(stage, device, budget, out))
        path.write_text(json.dumps(records[-1], indent=1) + "\n")
        said = records[-1].get("error") or records[-1].get("skipped") or "done"
        print(f"{stage}: {said[:2000]} ({records[-1]['seconds']:.0f} s)", flush=True)
        (out / "summary.md").write_text(_summary(records))
    print(f"wrote {out}")
    return int(any("error" in record for record in records))


def seconds_left() -> float:
    """Return in how many seconds the last stage has to be told to end, counted from when bench/gpu.sh began."""
    return float(os.environ.get("ADAMSS_BENCH_BEGAN") or _IMPORTED) + TOTAL - GRACE - time.time()


def share(stage: str, later: list[str], left: float) -> float:
    """Return a stage's part of the seconds that are left: what those after it do not need, up to twice its budget."""
    return min(2 * BUDGETS[stage], left - sum(BUDGETS[name] for name in later))


def _stage(stage: str, device: torch.device, budget: float, out: Path) -> dict[str, Any]:
    """Run a stage in a process of its own and return its record, or as much of it as there is."""
    command = [sys.executable, __file__, "--stage", stage, "--device", device.type, "--out", str(out)]
    start = time.monotonic()
    with _tuned(out / "tune.json") as tuned:
        status, said = _run([*command, "--seconds", str(budget), "--in-this-process"], device, budget + GRACE, **tuned)
    path = out / f"{stage}.json"
    record = {"stage": stage, "environment": environment(device), "seconds": time.monotonic() - start}
    record |= json.loads(path.read_text()) if path.exists() else {}
    if status and "error" not in record:
        record["error"] = f"ended with status {status}: {said[-2000:]}"
    record["environment"]["command"] = ["bench/gpu.py", *sys.argv[1:]]
    return record


@contextlib.contextmanager
def _tuned(path: Path) -> Iterator[dict[str, str]]:
    """Make a file of the tables in the record of stage `tune`, if there is one; yield what names it to a process."""
    tables = json.loads(path.read_text()).get("tuning") if path.exists() else None
    if not tables:
        yield {}
        return
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(tables, file)
        file.flush()
        yield {"ADAMSS_TUNING": file.name}


if __name__ == "__main__":
    sys.exit(main())

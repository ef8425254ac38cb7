"""bench/gpu.sh works before anyone runs it on a GPU: each stage's dry run on the CPU ends well and says what it did."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]


def gpu_sh(out, *arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(ROOT / "bench" / "gpu.sh"), "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.mark.parametrize("stage", ["build", "tests", "tune", "grid", "step", "asa", "sanitize"])
def test_dry_run(stage, tmp_path):
    pytest.importorskip("triton")
    done = gpu_sh(tmp_path, "--stage", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / f"{stage}.json").read_text())
    assert record["stage"] == stage
    assert record["environment"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["environment"]["command"][1:3] == ["--device", "cpu"]
    assert record.get("rows") or record.get("tuning")
    assert not [row for row in record.get("rows", []) if "error" in row]
    assert f"## {stage}" in (tmp_path / "summary.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.json", "summary.md"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = gpu_sh(tmp_path, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cpu" in done.stderr


def test_stages_end_within_ten_minutes(bench):
    gpu = bench("gpu")
    assert list(gpu.BUDGETS) == list(gpu.STAGES)
    assert sum(gpu.BUDGETS.values()) + gpu.GRACE <= gpu.TOTAL < 590
    left, stages = gpu.TOTAL - gpu.GRACE, list(gpu.STAGES)
    for index, stage in enumerate(stages):
        budget = gpu.share(stage, stages[index + 1 :], left)
        assert budget >= gpu.BUDGETS[stage] - (index > 0) * gpu.GRACE
        # The worst: each stage hangs, until it is killed.
        left -= budget + gpu.GRACE if budget >= 5 else 0
    assert left + gpu.GRACE >= 0
    # What a stage did not need goes to the next one.
    assert gpu.share("tests", stages[2:], gpu.TOTAL - gpu.GRACE) == gpu.BUDGETS["build"] + gpu.BUDGETS["tests"]
    assert gpu.share("asa", [], 1000) == 2 * gpu.BUDGETS["asa"]


def test_the_time_that_python_took_to_start_counts(bench, monkeypatch):
    gpu = bench("gpu")
    monkeypatch.setenv("ADAMSS_BENCH_BEGAN", str(time.time() - 100))
    assert gpu.TOTAL - gpu.GRACE - 160 < gpu.seconds_left() <= gpu.TOTAL - gpu.GRACE - 100
    assert "ADAMSS_BENCH_BEGAN" in (ROOT / "bench" / "gpu.sh").read_text()


def test_a_command_that_is_stopped_leaves_no_process_behind(bench):
    # A background process holds the output open; it would keep a reader of a pipe waiting, and the GPU busy.
    status, said = bench("gpu")._run(["bash", "-c", "sleep 600 & echo $!; wait"], torch.device("cpu"), 0.5)
    assert status == 124
    pid, _, note = said.splitlines()
    assert note == "stopped after 5 s"
    state = Path("/proc", pid, "stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.1)


def test_a_stage_that_is_killed_keeps_what_it_had_saved(bench, tmp_path, monkeypatch):
    gpu = bench("gpu")

    def killed(command, *_, **__):
        out = Path(command[command.index("--out") + 1])
        (out / "grid.json").write_text(json.dumps({"stage": "grid", "environment": {}, "rows": [{"us": 1.0}]}))
        return 124, "stopped"

    monkeypatch.setattr(gpu, "_run", killed)
    record = gpu._stage("grid", torch.device("cpu"), 1, tmp_path)
    assert record["rows"] == [{"us": 1.0}]
    assert record["error"] == "ended with status 124: stopped"


def test_failing_tests_are_named(bench, monkeypatch):
    gpu = bench("gpu")
    for said in (
        "[gw1] [ 50%] FAILED tests/test_gpu.py::test_a\nFAILED tests/test_gpu.py::test_a - no\n= 1 failed, 2 passed =",
        "[gw1] [ 50%] FAILED tests/test_gpu.py::test_a\n\nstopped after 140 s",
    ):
        monkeypatch.setattr(gpu, "_run", lambda *_, said=said, **__: (1, said))
        result = gpu.tests(torch.device("cpu"), 1, lambda _: None)
        assert result["error"].count("test_a") == 1
        assert result["rows"] == [{"failed": 1, "passed": 2} if "passed" in said else {}]


def test_what_tune_found_reaches_the_stages_after_it(bench, tmp_path):
    gpu, path = bench("gpu"), tmp_path / "tune.json"
    with gpu._tuned(path) as variables:
        assert variables == {}
    path.write_text(
        json.dumps({"stage": "tune", "tuning": {"configs": {}, "forms": {"forward/16/sm_90/odd": "fused"}}})
    )
    with gpu._tuned(path) as variables:
        tables = json.loads(Path(variables["ADAMSS_TUNING"]).read_text())
    assert tables["forms"] == {"forward/16/sm_90/odd": "fused"}


def test_the_step_has_all_its_layers_and_outlives_a_method_that_fails(bench, monkeypatch):
    llama_step, gpu = bench("llama_step"), bench("gpu")
    measured, models = [], []

    def measure(adapt, device, layers):
        assert not any(model() for model in models)
        model = torch.nn.Module()
        model.__dict__["itself"] = model
        models.append(weakref.ref(model))
        measured.append(layers)
        if len(measured) == 2:
            raise RuntimeError("broken\nlibrary")
        return {"ms": 1.0}

    monkeypatch.setattr(llama_step, "_measure", measure)
    saved = []
    result = llama_step.run(torch.device("cuda"), gpu.BUDGETS["step"], lambda r: saved.append(len(r["rows"])))
    assert measured == [28] * 4
    assert [row.get("error") for row in result["rows"]] == [None, "RuntimeError: broken", None, None]
    assert saved == [1, 2, 3, 4]


class PretendedCUDA:
    """What `gpu_timing` uses of torch.cuda, where a failed capture spoils all later ones, as in torch 2.11."""

    def __init__(self):
        self.mode = "default"
        self.spoiled = self.capturing = False

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def synchronising_copy(self):
        if self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.capturing:
            self.spoiled = True
            raise RuntimeError("operation not permitted when stream is capturing")

    @contextlib.contextmanager
    def graph(self, _):
        if self.spoiled:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


def test_a_call_that_no_graph_can_hold_does_not_spoil_the_others(bench, monkeypatch):
    gpu_timing, cuda = bench("gpu_timing"), PretendedCUDA()
    stream = type("Stream", (), {"wait_stream": lambda *_: None})
    for name, value in {
        "set_sync_debug_mode": cuda.set_sync_debug_mode,
        "graph": cuda.graph,
        "Stream": stream,
        "current_stream": stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": lambda: type("Graph", (), {"replay": staticmethod(lambda: None)}),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timing, "_events", lambda call, before=None: 1e-3)
    monkeypatch.setattr(gpu_timing, "_scratch", lambda _: torch.empty(1))
    calls = {"first": lambda: None, "copies": cuda.synchronising_copy, "last": lambda: None}
    times = gpu_timing.interleaved(calls, torch.device("cuda"), rounds=3, graph=True)
    assert times == {"first": 1e-3, "copies": "RuntimeError: called a synchronizing CUDA operation", "last": 1e-3}
    assert cuda.mode == "default"


def test_the_sanitizer_looks_at_our_kernels_alone(bench):
    command = bench("gpu").sanitizer("compute-sanitizer", "cuda", "memcheck")
    assert command[:3] == ["compute-sanitizer", "--tool", "memcheck"]
    # What torch asks the driver for in vain is no error of ours.
    assert command[command.index("--report-api-errors") + 1] == "no"
    # The filters of --kernel-name: regex=... is searched for, kns=... is a part of the mangled name.
    key, pattern = bench("gpu").sanitizer("compute-sanitizer", "triton", "racecheck")[-1].split("=")
    assert key == "regex"
    triton = (ROOT / "adamss_kernels" / "triton").glob("kernels*.py")
    ours = [name for path in triton for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)]
    assert len(ours) > 10
    assert all(re.search(pattern, name) for name in ours)
    others = ("_ZN2at6native29vectorized_elementwise_kernelILi4E", "_Z17gemv2T_kernel_valIii", "nvjet_hsh_64x8_kernel")
    assert not any(re.search(pattern, name) for name in others)


def test_what_the_sanitizer_said_is_kept(bench, monkeypatch):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "compute-sanitizer")
    monkeypatch.setattr(gpu.ops, "implementation", lambda _: SimpleNamespace(unavailable=lambda *_: None))
    said = "agrees with the reference\n========= ERROR SUMMARY: 0 errors\n\n"
    monkeypatch.setattr(gpu, "_run", lambda command, *_, **__: (0, said))
    rows = gpu.sanitize(torch.device("cuda"), 100, lambda _: None)["rows"]
    assert [(row["status"], row["said"]) for row in rows] == [(0, "========= ERROR SUMMARY: 0 errors")] * 4

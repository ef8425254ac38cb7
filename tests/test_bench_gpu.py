"""bench/gpu.sh works before anyone runs it on a GPU: its dry run on the CPU ends in time, with rows of every stage."""

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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
STAGES = ["build", "tests", "probe", "grid", "step", "asa", "sanitize"]


def gpu_sh(out, *arguments):
    # One thread is what its small products want, and what a loaded machine has.
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = [str(ROOT / "bench" / "gpu.sh"), "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/, by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module


@pytest.fixture
def recorded():
    """A list of rows, and what adds to it."""
    rows = []
    return SimpleNamespace(rows=rows, add=rows.append)


def test_a_dry_run_has_rows_of_every_stage_and_ends_in_time(tmp_path):
    pytest.importorskip("triton")
    began = time.monotonic()
    done = gpu_sh(tmp_path, "--total", "120")
    assert time.monotonic() - began < 120
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "summary.md"}
    first, *rows = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    environment = first["environment"]
    assert environment["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert environment["command"].endswith("--total 120")
    summary = (tmp_path / "summary.md").read_text()
    for stage in STAGES:
        *own, ended = [row for row in rows if row["stage"] == stage]
        assert own, stage
        assert ended["seconds"] <= ended["budget"] + 10
        assert f"## {stage}" in summary
        # On a slow machine the time may not suffice for every test; nothing else may go wrong.
        if stage != "tests":
            assert ended["status"] == 0, (ended, done.stdout)
            assert not [row for row in own if "error" in row]
    outcomes = [row for row in rows if row["stage"] == "tests" and "backend" in row]
    assert not any(row.get("failed") for row in outcomes), outcomes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = gpu_sh(tmp_path, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cpu" in done.stderr


def test_stages_share_the_time_that_is_left(bench):
    gpu = bench("gpu")
    assert list(gpu.SHARES) == list(gpu.STAGES) == STAGES
    left = total = 200.0
    for index, stage in enumerate(STAGES):
        budget = gpu.share(stage, STAGES[index + 1 :], left)
        assert budget >= total * gpu.SHARES[stage] / sum(gpu.SHARES.values()) - 1e-9
        left -= budget
    assert abs(left) < 1e-9
    # What a stage did not need goes to those after it.
    assert gpu.share("sanitize", [], 150.0) == 150.0


def test_the_time_that_python_took_to_start_counts(bench, monkeypatch):
    gpu = bench("gpu")
    monkeypatch.setenv("ADAMSS_BENCH_BEGAN", str(time.time() - 100))
    assert 300 - gpu.GRACE - 160 < gpu.seconds_left(300) <= 300 - gpu.GRACE - 100
    assert "ADAMSS_BENCH_BEGAN" in (ROOT / "bench" / "gpu.sh").read_text()


def test_a_command_that_is_stopped_leaves_no_process_behind(bench):
    # A background process holds the output open; it would keep a reader of a pipe waiting, and the GPU busy.
    status, said = bench("gpu")._run(["bash", "-c", "sleep 600 & echo $!; wait"], torch.device("cpu"), 2)
    assert status == 124
    pid, _, note = said.splitlines()
    assert note == "stopped after 2 s"
    state = Path("/proc", pid, "stat")
    while state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.1)


def test_a_stage_that_is_killed_keeps_its_rows_and_says_so(bench, tmp_path, monkeypatch):
    gpu, path = bench("gpu"), tmp_path / "results.jsonl"

    def killed(command, *_, **__):
        gpu.append(path, {"stage": "grid", "us": 1.0})
        return 124, "half a word\nstopped after 1 s"

    monkeypatch.setattr(gpu, "_run", killed)
    ended = gpu.run_stage("grid", torch.device("cpu"), 1, path)
    assert json.loads(path.read_text()) == {"stage": "grid", "us": 1.0}
    assert (ended["status"], ended["error"]) == (124, "half a word\nstopped after 1 s")
    summary = gpu.summary({"gpu": "some card"}, [{"stage": "grid", "us": 1.0}, ended])
    assert "some card" in summary
    assert "stopped after 1 s" in summary


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            "[gw1] FAILED tests/test_gpu.py::test_a\nFAILED tests/test_gpu.py::test_a - no\n= 1 failed, 2 passed =",
            {"failed": 1, "passed": 2},
        ),
        (
            "[gw1] FAILED tests/test_gpu.py::test_a\n[gw0] PASSED tests/test_gpu.py::test_b \n\nstopped after 9 s",
            {"failed": 1, "passed": 1, "stopped": True},
        ),
    ],
)
def test_failing_tests_are_counted_and_named_also_where_they_were_stopped(bench, said, expected):
    outcome = bench("gpu").outcome(said)
    assert any("tests/test_gpu.py::test_a" in failure for failure in outcome.pop("failures"))
    assert outcome == expected


def test_the_step_has_all_its_layers_and_outlives_a_method_that_fails(bench, monkeypatch, recorded):
    llama_step = bench("llama_step")
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
    llama_step.run(torch.device("cuda"), 100, recorded.add)
    assert measured == [28] * 4
    assert [row.get("error") for row in recorded.rows] == [None, "RuntimeError: broken", None, None]


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
    assert len(ours) > 3
    assert all(re.search(pattern, name) for name in ours)
    others = ("_ZN2at6native29vectorized_elementwise_kernelILi4E", "_Z17gemv2T_kernel_valIii", "nvjet_hsh_64x8_kernel")
    assert not any(re.search(pattern, name) for name in others)


def test_what_the_sanitizer_said_is_kept(bench, monkeypatch, recorded):
    gpu = bench("gpu")
    monkeypatch.setattr(gpu.shutil, "which", lambda _: "compute-sanitizer")
    monkeypatch.setattr(gpu.ops, "implementation", lambda _: SimpleNamespace(why_unavailable=lambda *_: None))
    said = "agrees with the reference\n========= ERROR SUMMARY: 0 errors\n\n"
    monkeypatch.setattr(gpu, "_run", lambda command, *_, **__: (0, said))
    gpu.sanitize(torch.device("cuda"), 100, recorded.add)
    assert [(row["status"], row["said"]) for row in recorded.rows] == [(0, "========= ERROR SUMMARY: 0 errors")] * 4

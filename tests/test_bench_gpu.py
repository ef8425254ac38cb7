"""bench/gpu.sh works before anyone runs it on a GPU: each stage's dry run on the CPU ends well and says what it did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def gpu_sh(out, *arguments):
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(ROOT / "bench" / "gpu.sh"), "--device", "cpu", "--out", str(out), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("stage", ["build", "tests", "sanitize", "tune", "grid", "step", "asa"])
def test_dry_run(stage, tmp_path):
    pytest.importorskip("triton")
    done = gpu_sh(tmp_path, "--stage", stage)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / f"{stage}.json").read_text())
    assert record["stage"] == stage
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["environment"]["command"][1:3] == ["--device", "cpu"]
    assert record.get("rows") or record.get("tuning")
    assert not [row for row in record.get("rows", []) if "error" in row]
    assert f"## {stage}" in (tmp_path / "summary.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_that_there_is_no_gpu(tmp_path):
    done = gpu_sh(tmp_path, "--device", "cuda")
    assert done.returncode == 2
    assert "--device cpu" in done.stderr

"""The commands of docs/distributed.md run on two processes, and its table is the one that the tool computes."""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "distributed.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.S) for line in block.splitlines()]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--master-port"],
    "accelerate": ["accelerate.commands.accelerate_cli", "launch", "--main_process_port"],
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]


def run(command: str, folder: Path) -> str:
    """Run a command of the page, on a port that is free; return its last line."""
    launcher, *words = shlex.split(command)
    if launcher == "accelerate":
        assert words.pop(0) == "launch"
    words[words.index("--output_dir") + 1] = str(folder)
    module, *options = LAUNCHERS[launcher]
    # accelerate uses FSDP on GPUs only.
    paths = [str(ROOT / "tests" / "on_cpu"), str(ROOT / "tests")] if launcher == "accelerate" else []
    command_line = [sys.executable, "-m", module, *options, free_port(), *words]
    return run_to_end(command_line, PYTHONPATH=os.pathsep.join(paths))


def run_to_end(command_line: list[str], **environment: str) -> str:
    settings = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment
    result = subprocess.run(
        command_line, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_one_run_goes_on_from_strategy_to_strategy_as_if_on_one_process(tmp_path):
    commands = [command for command in COMMANDS if command.startswith("torchrun")]
    strategies = [re.search(r"--strategy (\w+)", command).group(1) for command in commands]
    assert strategies == ["fsdp", "tensor", "both"]
    lines = [run(command, tmp_path / "two") for command in commands]
    assert [line.split(",")[0] for line in lines] == ["step 6", "step 12", "step 24"]
    assert (tmp_path / "two" / "adapter" / "adapter.safetensors").is_file()

    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    script = [sys.executable, "examples/distributed.py", "--strategy", "ddp", "--output_dir", str(tmp_path / "one")]
    one = run_to_end(script, **alone)
    (*counts, loss), (*counts_of_one, loss_of_one) = numbers(lines[-1]), numbers(one)
    assert counts == counts_of_one
    assert loss == pytest.approx(loss_of_one, abs=2e-5)


def numbers(line: str) -> tuple[float, float, float]:
    step, loss, active = re.fullmatch(r"step (\d+), loss ([\d.]+), active subspaces (\d+)", line).groups()
    return float(step), float(active), float(loss)


def test_the_trainer_command_prunes_and_saves(tmp_path):
    (command,) = [command for command in COMMANDS if command.startswith("accelerate")]
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert numbers(run(command, tmp_path))[:2] == (16, 6)
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()


def test_the_table_is_the_computed_one():
    script = [sys.executable, "tools/communication.py", "--check"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr

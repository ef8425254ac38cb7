"""Every command and snippet of the README and of docs/ runs, and its numbers are those of the committed results."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
SNIPPETS = [
    (page, snippet) for page, text in TEXTS.items() for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.S)
]
SCRIPTS = {
    title: script
    for text in TEXTS.values()
    for title, script in re.findall(r"""```python title="(.*?)"\n(.*?)```""", text, flags=re.S)
}
COMMANDS = [
    line
    for text in TEXTS.values()
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]
# Of pages' own scripts; those of examples/ run in test_distributed_docs.py.
LAUNCHES = [c for c in COMMANDS if c.startswith("torchrun ") and SCRIPTS.keys() & set(c.split())]


@pytest.mark.parametrize(
    ("page", "snippet"), SNIPPETS, ids=[f"{i}-{Path(page).stem}" for i, (page, _) in enumerate(SNIPPETS)]
)
def test_a_snippet_runs(page, snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, page, "exec"), {})


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("command", LAUNCHES)
def test_a_script_runs_in_several_processes(command, tmp_path):
    """What is meant for two machines runs as two launchers with a process each, that meet on this one."""
    for title, script in SCRIPTS.items():
        (tmp_path / title).write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = shlex.split(command.replace("HOST:29500", address))[1:]
    if "--nnodes" in words:
        words[words.index("--nproc-per-node") + 1] = "1"
    else:
        words = ["--standalone", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *words],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2 if "--nnodes" in words else 1)
    ]
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0] * len(launchers), "\n".join(outputs)
    assert len(list(tmp_path.glob("*/adapter.safetensors"))) == 1


def test_the_readme_shows_commands_and_snippets():
    assert len(COMMANDS) >= 4
    assert len(SNIPPETS) >= 2


@pytest.fixture(scope="module")
def forking():
    """Processes forked from one that has imported what most commands import, which takes longer than they do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["adamss_kernels.cli", "transformers", "peft"])
    return context


def python(words: list[str], log: Path) -> None:
    """Do what `python *words` does from the root, with its output in `log`."""
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.chdir(ROOT)
    # pytest-benchmark refuses to run where it believes itself in a worker of pytest-xdist.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]
    if words[0] == "-m":
        sys.argv = words[1:]
        sys.path.insert(0, str(ROOT))
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(ROOT / Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, forking, tmp_path):
    """Long commands are asked for their help, or for what they would run; short ones run elsewhere in full."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    if words[:2] == ["pip", "install"]:
        # Run for real in test_packaging.py.
        return
    if words[0].endswith(".sh"):
        # Its dry run is in test_bench_gpu.py.
        assert (ROOT / words[0]).is_file()
        return
    if words[0] in ("torchrun", "accelerate"):
        # Run for real above, or in test_distributed_docs.py.
        return
    if words[0] == "adamss-kernels":
        words = ["python", "-m", "adamss_kernels", *words[1:]]
    assert words[0] == "python", command
    process = forking.Process(target=python, args=([*words[1:], "--help"], tmp_path / "said"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "said").read_text()


def test_the_tables_are_those_of_the_committed_results():
    script = [sys.executable, "tools/readme.py", "--check"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_quoted_message_is_one_that_the_package_gives():
    text = (ROOT / "docs" / "tour.md").read_text().split("## Troubleshooting")[1]
    messages = re.findall(r"^\| `(.*?)` \|", text, flags=re.M)
    assert len(messages) > 20
    source = "".join(path.read_text() for path in (ROOT / "adamss_kernels").rglob("*.py"))
    # Messages that are broken over lines, and the values in them.
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    source = re.sub(r"\{[^{}]*\}", "…", source)
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in source, message

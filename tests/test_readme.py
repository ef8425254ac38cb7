"""Every command and snippet of the README runs, and its numbers are those of the committed results."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TEXTS = [README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))]
SNIPPETS = [snippet for text in TEXTS for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.S)]
COMMANDS = [
    line
    for text in TEXTS
    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", text, flags=re.S)
    for line in block.splitlines()
    if line and not line.startswith("#")
]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})


def test_the_readme_shows_commands_and_snippets():
    assert len(COMMANDS) >= 4
    assert len(SNIPPETS) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command):
    """Long commands are asked for their help, or for what they would run; short ones run elsewhere in full."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        command_line = ["make", "--dry-run", *words[1:]]
    elif words[:2] == ["pip", "install"]:
        # Run for real in test_packaging.py.
        return
    elif words[0].endswith(".sh"):
        # Its dry run is in test_bench_gpu.py.
        assert (ROOT / words[0]).is_file()
        return
    elif words[0] in ("torchrun", "accelerate"):
        # Run for real in test_distributed_docs.py.
        return
    elif words[0] == "adamss-kernels":
        command_line = [sys.executable, "-m", "adamss_kernels", *words[1:], "--help"]
    else:
        assert words[0] == "python", command
        command_line = [sys.executable, *words[1:], "--help"]
    # pytest-benchmark refuses to run where it believes itself in a worker of pytest-xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command_line, cwd=ROOT, check=True, capture_output=True, env=environment)


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

"""What `make docs` refuses, and how links in the repository become links in the site."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("griffe")

ROOT = Path(__file__).parent.parent
API = (ROOT / "docs" / "api.md").read_text()


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_site", ROOT / "tools" / "docs_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load_hooks()


def test_every_public_name_is_documented():
    assert hooks.undocumented(ROOT, API) == []


def test_a_public_name_that_the_api_page_lacks_is_named():
    (message,) = hooks.undocumented(ROOT, API.replace("::: adamss_kernels.load_adapter\n", ""))
    assert "adamss_kernels.load_adapter" in message


def test_a_public_name_without_a_docstring_is_named(tmp_path):
    package = tmp_path / "adamss_kernels"
    (package / "adapters").mkdir(parents=True)
    (package / "adapters" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("from .thing import Thing\n__all__ = ['Thing']\n")
    (package / "thing.py").write_text("class Thing:\n    '''Do.'''\n    def go(self): ...\n    def _stay(self): ...\n")
    (message,) = hooks.undocumented(tmp_path, "::: adamss_kernels.Thing\n")
    assert message.startswith("adamss_kernels.thing.Thing.go ")


@pytest.mark.parametrize(
    ("text", "source", "page", "expected"),
    [
        ("[a](docs/asa.md#x)", "README.md", "index.md", "[a](asa.md#x)"),
        ("[docs/notation.md](docs/notation.md)", "README.md", "index.md", "[Notation and mathematics](notation.md)"),
        ("[a](../../README.md#backends)", "docs/howto/peft.md", "howto/peft.md", "[a](../index.md#backends)"),
        ("[a](../README.md#speed-on-the-cpu)", "docs/cpu.md", "cpu.md", "[a](speed.md#speed-on-the-cpu)"),
        ("[a](#speed-on-a-gpu)", "README.md", "index.md", "[a](speed.md#speed-on-a-gpu)"),
        ("[a](#install)", "README.md", "speed.md", "[a](index.md#install)"),
        ("[a](#install)", "README.md", "index.md", "[a](#install)"),
        ("[a](https://example.org/README.md)", "README.md", "index.md", "[a](https://example.org/README.md)"),
        ("`[a](docs/asa.md)`", "README.md", "index.md", "`[a](docs/asa.md)`"),
        ("[a](docs/nowhere.txt)", "CONTRIBUTING.md", "contributing.md", "[a](nowhere.txt)"),
    ],
)
def test_a_link_leads_to_the_page(text, source, page, expected):
    assert hooks.relink(text, source, page) == (expected, [])


def test_a_file_that_is_linked_is_copied():
    text, copied = hooks.relink("[a](hyperparameters.py)", "examples/README.md", "examples.md")
    assert (text, copied) == ("[a](examples/hyperparameters.py)", ["examples/hyperparameters.py"])


def test_what_a_page_loads_from_elsewhere_is_found():
    for tag in (
        '<script src="https://unpkg.com/x.js"></script>',
        '<link rel="stylesheet" href="//fonts.googleapis.com/css">',
        '<img alt="a" src="http://example.org/a.png">',
    ):
        assert hooks.LOADED.search(tag), tag
    for tag in ('<a href="https://example.org">', '<script src="assets/x.js"></script>', '<link rel="icon" href="a">'):
        assert not hooks.LOADED.search(tag), tag


@pytest.mark.slow
def test_the_site_is_not_built_with_faults(tmp_path):
    for name in ("docs", "tools", "adamss_kernels", "examples", "bench"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    faults = "[a](nowhere.md) [b](tour.md#nowhere) [c](../bench/nothing.jsonl) ![d](https://example.org/d.png)"
    (tmp_path / "docs" / "unlisted.md").write_text(f"# A page without a place\n\n{faults}\n")
    command = [sys.executable, "-m", "mkdocs", "build"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 1
    for complaint in ("not included in the", "'nowhere.md'", "'tour.md#nowhere'", "nothing.jsonl", "another host"):
        assert complaint in result.stderr

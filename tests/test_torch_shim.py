"""What the libraries declare of torch by hand is what the installed torch's headers declare."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SHIM = ROOT / "csrc" / "torch" / "shim.h"
CPU = ROOT / "csrc" / "cpu"
OLDEST = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text()).groups()


def errors(shim: Path) -> str:
    """What a compiler says of the check against `shim`, as for the oldest torch that the package takes."""
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    folders = [shim.parent, Path(torch.__file__).parent / "include", CPU]
    target = f"-DTORCH_TARGET_VERSION=(({OLDEST[0]}ULL << 56) | ({OLDEST[1]}ULL << 48))"
    command = [compiler, "-std=c++17", "-fsyntax-only", target, *(f"-I{folder}" for folder in folders)]
    done = subprocess.run([*command, ROOT / "tests" / "torch_shim.cpp"], capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else ""


def test_the_declarations_are_torchs_as_of_the_oldest_torch_that_the_package_takes():
    assert not errors(SHIM)


@pytest.mark.parametrize(
    ("ours", "wrong", "what"),
    [
        ("(Handle, int64_t*))", "(Handle, int32_t*))", "aoti_torch_get_dim"),
        ("(Handle, bool*)", "(Handle, bool)", "aoti_torch_is_contiguous"),
        ("F(int32_t, aoti_torch_dtype_bool)", "F(int64_t, aoti_torch_dtype_bool)", "aoti_torch_dtype_bool"),
        ("typedef uint64_t Value;", "typedef int64_t Value;", "Value"),
        ("GuardHandle*)", "GuardHandle)", "aoti_torch_create_cuda_guard"),
        ("F(torch_delete_list, (", "F(torch_drop_list, (", "torch_drop_list"),
        (f"uint64_t({OLDEST[1]}) << 48", f"uint64_t({OLDEST[1]}0) << 48", "ABI_VERSION"),
    ],
)
def test_a_declaration_that_is_not_torchs_is_found(tmp_path, ours, wrong, what):
    text = SHIM.read_text()
    assert ours in text
    (tmp_path / SHIM.name).write_text(text.replace(ours, wrong, 1))
    found = errors(tmp_path / SHIM.name)
    assert what in found, found


def test_the_version_of_the_running_torch_is_no_part_of_the_library():
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    assert "aoti_torch_abi_version" not in sources

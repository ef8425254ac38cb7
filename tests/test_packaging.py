"""The package builds without torch and without a compiler, and the wheel holds what it should."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build_wheel(folder: Path, **environment: str) -> set[str]:
    """Build the wheel in an isolated environment (which has no torch) and return the names of its files."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=os.environ | {"SKBUILD_BUILD_DIR": str(folder / "build")} | environment)
    (wheel,) = folder.glob("adamss_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if "adamss_kernels/native/build_state.txt" in archive.namelist():
            (folder / "state").write_bytes(archive.read("adamss_kernels/native/build_state.txt"))
        return set(archive.namelist())


def test_the_wheel_holds_sources_types_and_library_and_nothing_else(tmp_path):
    names = build_wheel(tmp_path)
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "adamss_kernels").rglob("*.py")}
    assert sources <= names
    assert "adamss_kernels/py.typed" in names
    libraries = {name for name in names if name.endswith((".so", ".dylib"))}
    assert {Path(name).name.split(".")[0] for name in libraries} == {"libadamss_cpu"}
    assert (tmp_path / "state").read_text().startswith("built with ")
    rest = {n for n in names - sources - libraries if ".dist-info/" not in n}
    assert rest == {"adamss_kernels/py.typed", "adamss_kernels/native/build_state.txt"}
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++"])
def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path, compiler):
    names = build_wheel(tmp_path, CXX=compiler, CC=compiler)
    assert not [name for name in names if name.endswith((".so", ".dylib"))]
    assert "no working C++ compiler was found" in (tmp_path / "state").read_text()

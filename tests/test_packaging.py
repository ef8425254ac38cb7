"""The package builds without torch and without a compiler, and the wheel holds what it should."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from adamss_kernels.compiled import cuda_compile

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


CUDA_SOURCES = {
    f"adamss_kernels/compiled/csrc/{folder}/{p.name}"
    for folder in ("cuda", "torch")
    for p in (ROOT / "csrc" / folder).iterdir()
    if p.suffix in (".cu", ".cpp", ".h")
}


def build_wheel(folder: Path, **environment: str) -> set[str]:
    """Build the wheel in an isolated environment (which has no torch) and return the names of its files."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, env=os.environ | {"SKBUILD_BUILD_DIR": str(folder / "build")} | environment)
    (wheel,) = folder.glob("adamss_kernels-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("build_state.txt", "cuda_build_state.txt"):
            if f"adamss_kernels/compiled/{name}" in archive.namelist():
                (folder / name).write_bytes(archive.read(f"adamss_kernels/compiled/{name}"))
        return set(archive.namelist())


def test_the_wheel_holds_sources_types_and_libraries_and_nothing_else(tmp_path):
    # One architecture, asked for as a user would; the code is what other tests run.
    names = build_wheel(tmp_path, SKBUILD_CMAKE_DEFINE="ADAMSS_CUDA_ARCHITECTURES=80;ADAMSS_OPTIMIZATION=-O0")
    nvcc = cuda_compile.find_nvcc()
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "adamss_kernels").rglob("*.py")}
    assert sources <= names
    assert "adamss_kernels/py.typed" in names
    libraries = {name for name in names if name.endswith((".so", ".dylib"))}
    assert {Path(name).name.split(".")[0] for name in libraries} == {"libadamss_cpu"} | (
        {"libadamss_cuda"} if nvcc else set()
    )
    state = (tmp_path / "cuda_build_state.txt").read_text()
    assert state.startswith("built with nvcc " if nvcc else "not built: no nvcc was found")
    assert "for 80+PTX" in state or not nvcc
    assert (tmp_path / "build_state.txt").read_text().startswith("built with ")
    rest = {n for n in names - sources - libraries if ".dist-info/" not in n}
    states = {f"adamss_kernels/compiled/{name}" for name in ("build_state.txt", "cuda_build_state.txt")}
    assert rest == {"adamss_kernels/py.typed"} | states | CUDA_SOURCES
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name


@pytest.mark.parametrize("compiler", ["/bin/false", "/nonexistent/c++"])
def test_without_a_compiler_the_install_succeeds_and_says_so(tmp_path, compiler):
    # No nvcc either, since it needs a C++ compiler.
    names = build_wheel(tmp_path, CXX=compiler, CC=compiler, CUDACXX="/nonexistent/nvcc")
    assert not [name for name in names if name.endswith((".so", ".dylib"))]
    assert "no working C++ compiler was found" in (tmp_path / "build_state.txt").read_text()
    assert "`adamss-kernels build-cuda` builds it" in (tmp_path / "cuda_build_state.txt").read_text()
    assert names >= CUDA_SOURCES, "what build-cuda compiles later"

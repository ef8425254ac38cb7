"""Fixtures that run the CUDA library without a GPU: its kernels compiled as host C++ (tests/cuda_twin)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from adamss_kernels import cuda, ops
from adamss_kernels.compiled import cuda_library
from adamss_kernels.cuda import hopper

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def twin_file(tmp_path_factory):
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++", "clang++") if c and shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("twin") / "twin.so"
    folders = [f"-I{ROOT / 'tests' / 'cuda_twin'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
    options = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    command = [compiler, *options, *folders, str(ROOT / "tests" / "cuda_twin" / "twin.cpp"), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


class Twin:
    """The pretended device: `seed` orders its threads, `record` runs nothing, `fail` is the next launch's status."""

    def __init__(self, path):
        self.library = cuda_library.open_library(path)
        self._twin = ctypes.CDLL(str(path))
        self._twin.twin_set.argtypes = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32)
        self._twin.twin_launches.restype = ctypes.c_int64

    def set(self, seed=0, record=False, fail=0):
        self._twin.twin_set(seed, record, fail)

    def launches(self):
        """(blocks, threads, bytes of dynamic shared memory) of each launch since `set`."""
        out = (ctypes.c_int64 * 300)()
        count = self._twin.twin_launches(out, 100)
        return [tuple(out[3 * i : 3 * i + 3]) for i in range(count)]


@pytest.fixture
def twin(twin_file, monkeypatch):
    """Backend `cuda` on CPU tensors, its library being the twin and its GPU having two multiprocessors."""
    device = Twin(twin_file)
    device.set()
    monkeypatch.setattr(cuda, "load", lambda: device.library)
    for module in (cuda, hopper):
        monkeypatch.setattr(module, "place", lambda t: (0, None))
    monkeypatch.setattr(hopper, "_is_hopper", lambda _: False)
    monkeypatch.setattr(cuda, "_current", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "_multiprocessors", lambda _: 2)
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type=None, dtype=None: None)
    ops._chosen.cache_clear()
    yield device
    ops._chosen.cache_clear()

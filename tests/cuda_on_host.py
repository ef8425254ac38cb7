"""Fixtures that run the CUDA library without a GPU: its kernels compiled as host C++ (tests/cuda_twin)."""

from __future__ import annotations

import ctypes
import functools
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
        # The library's own registration, but for tensors of the CPU, and once for all tests of this process.
        self.library = _opened(path)
        self.functions = ctypes.CDLL(str(path))
        self.functions.twin_set.argtypes = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_int32)
        for name in ("twin_launches", "twin_guarded"):
            getattr(self.functions, name).restype = ctypes.c_int64

    def set(self, seed=0, record=False, fail=0):
        self.functions.twin_set(seed, record, fail)

    def launches(self):
        """(blocks, threads, bytes of dynamic shared memory, device) of each launch since `set`."""
        out = (ctypes.c_int64 * 400)()
        count = self.functions.twin_launches(out, 100)
        return [tuple(out[4 * i : 4 * i + 4]) for i in range(count)]


@functools.cache
def _opened(path):
    return cuda_library.open_library(path, namespace="adamss_twin", key="CPU", libtorch_cuda=path)


@pytest.fixture
def twin(twin_file, monkeypatch):
    """Backend `cuda` on CPU tensors, its library being the twin and its GPU having two multiprocessors."""
    device = Twin(twin_file)
    device.set()
    monkeypatch.setattr(cuda, "load", lambda: device.library)
    monkeypatch.setattr(hopper, "_is_hopper", lambda _: False)
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type=None, dtype=None: None)
    ops._chosen.cache_clear()
    yield device
    device.functions.twin_memory(0)
    ops._chosen.cache_clear()

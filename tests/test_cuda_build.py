"""How the CUDA library is built into the cache (safely, once, whole), and when it is loaded."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from adamss_kernels import available_backends, cuda, ops
from adamss_kernels.cli import build_cuda, main
from adamss_kernels.compiled import cuda_compile, cuda_library


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty user cache, and a compiler that writes a file and counts how often it runs."""
    base = tmp_path / "cache"
    base.mkdir(mode=0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--version) echo "release 13.0, V13.0.88" ;;\n'
        "--list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;\n"
        f'*) echo run >>{tmp_path}/runs; sleep 0.3; for last; do :; done; echo binary >"$last" ;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    return base


def runs(cache):
    path = cache.parent / "runs"
    return len(path.read_text().splitlines()) if path.exists() else 0


def target():
    return cuda_library.cache_folder() / "nvcc-13.0-sm_80_90" / cuda_compile.NAME


def test_build_cuda_writes_into_a_folder_keyed_on_sources_compiler_and_architectures(cache, monkeypatch):
    nvcc = os.environ["CUDACXX"]
    build_cuda.build(nvcc, ("80", "90"), target())
    assert target().read_text() == "binary\n"
    assert cuda_library._find() == target()
    assert sorted(p.name for p in target().parent.iterdir()) == [cuda_compile.NAME, "lock"]
    build_cuda.build(nvcc, ("80", "90"), target())
    assert runs(cache) == 1
    build_cuda.build(nvcc, ("80", "90"), target(), force=True)
    assert runs(cache) == 2
    before = cuda_library.cache_folder()
    changed = cache.parent / "changed"
    shutil.copytree(cuda_compile.csrc(), changed)
    monkeypatch.setattr(cuda_compile, "csrc", lambda: changed)
    assert cuda_library.cache_folder() == before
    for name in ("cuda/forward.h", "cuda/operators.cpp", "torch/shim.h"):
        text = (changed / name).read_text()
        (changed / name).write_text("// another kernel\n")
        assert cuda_library.cache_folder() != before, name
        (changed / name).write_text(text)
    (changed / "torch/shim.h").write_text("// another shim\n")
    assert cuda_library._find() != before / target().parent.name / cuda_compile.NAME


def test_two_builds_at_once_compile_once(cache):
    threads = [threading.Thread(target=build_cuda.build, args=(os.environ["CUDACXX"], ("90",), target())) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert runs(cache) == 1
    assert target().read_text() == "binary\n"


def test_a_failed_build_leaves_nothing_and_says_why(cache, capsys):
    nvcc = Path(os.environ["CUDACXX"])
    nvcc.write_text(nvcc.read_text().replace('echo binary >"$last"', "echo no such type >&2; exit 2"))
    assert main(["build-cuda"]) == 1
    assert "failed with status 2: no such type" in capsys.readouterr().out
    assert not list(cache.rglob("*.so"))
    assert main(["build-cuda", "--arch", "90", "70"]) == 1
    assert "compiles for 75 80 90, got 70" in capsys.readouterr().out
    assert main(["build-cuda", "--dry-run"]) == 0
    assert "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_90,code=compute_90" in capsys.readouterr().out


def test_without_nvcc_the_commands_say_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cuda_compile, "find_nvcc", lambda: None)
    assert main(["build-cuda"]) == 1
    assert "no nvcc" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["cuda_compile.py", "--out", str(tmp_path)])
    assert cuda_compile._main() == 0
    state = (tmp_path / "cuda_build_state.txt").read_text()
    assert state.startswith("not built: no nvcc was found") and "`adamss-kernels build-cuda`" in state
    assert len(list(tmp_path.iterdir())) == 1


def test_a_newer_build_is_the_one_that_is_loaded(cache):
    for arch in ("80", "90"):
        path = cuda_library.cache_folder() / f"nvcc-13.0-sm_{arch}" / cuda_compile.NAME
        build_cuda.build(os.environ["CUDACXX"], (arch,), path)
        os.utime(path, (time.time() + int(arch),) * 2)
    assert cuda_library._find() == path


def test_says_why_it_cannot_run(monkeypatch):
    assert "NVIDIA GPUs only" in cuda.why_unavailable("cpu")
    assert "float16" in cuda.why_unavailable("cuda", torch.int8)
    if not torch.cuda.is_available():
        assert cuda.why_unavailable() == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_library, "_find", lambda: None)
    monkeypatch.setattr(
        cuda_library, "_build_state", lambda: f"not built: no nvcc was found; {cuda_compile.HOW_TO_BUILD}"
    )
    cuda_library.load.cache_clear()
    assert "`adamss-kernels build-cuda` builds it" in cuda.why_unavailable("cuda", torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert "NVIDIA GPUs only" in cuda.why_unavailable("cuda")


def test_the_library_is_loaded_only_where_torch_sees_a_cuda_device(monkeypatch):
    def refuse(*args):
        raise AssertionError("the library was loaded")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(cuda_library, "open_library", refuse)
    cuda_library.load.cache_clear()
    assert available_backends()["cuda"] == "no CUDA device"
    assert cuda_library.describe()["state"]
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot run torch.float32 on cpu: it runs on NVIDIA GPUs only"
    ):
        ops.choose_backend("cuda", torch.device("cpu"), torch.float32)

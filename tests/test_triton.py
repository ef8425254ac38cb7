"""The Triton backend where it cannot run: why not, what happens instead, and how its tables are chosen and overridden.

What it computes is tested in `triton_interpreter.py`, in processes of its own (`make test`).
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import subprocess
import sys
import warnings
from concurrent.futures.process import BrokenProcessPool

import pytest
import torch

import adamss_kernels.triton as backend
from adamss_kernels import available_backends, cuda, ops
from adamss_kernels.cli import tune
from adamss_kernels.triton import tuning

ARCHS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "gfx90a", "interpreter", "unheard-of")


@pytest.fixture
def user_tables(tmp_path, monkeypatch):
    """An empty user configuration directory; tables are read anew before and after."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("ADAMSS_TUNING", raising=False)
    tuning.reload()
    yield tmp_path / "adamss_kernels" / "tuning.json"
    tuning.reload()


@pytest.mark.slow
def test_nothing_imports_triton_before_a_kernel_runs():
    code = (
        "import sys, adamss_kernels, adamss_kernels.triton; "
        "adamss_kernels.available_backends(); assert 'triton' not in sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment | {"CUDA_VISIBLE_DEVICES": ""}, check=True)


def test_says_why_it_cannot_run():
    assert "TRITON_INTERPRET=1" in backend.why_unavailable("cpu")
    assert "float16, bfloat16, float32" in backend.why_unavailable("cuda", torch.float64)
    assert "mps" in backend.why_unavailable("mps")
    if not torch.cuda.is_available():
        assert available_backends()["triton"] == "no CUDA device"
    with pytest.raises(RuntimeError, match=r"'triton' cannot run torch\.float32 on cpu"):
        ops.choose_backend("triton", torch.device("cpu"), torch.float32)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU on which Triton seems to work; what is chosen there is forgotten afterwards."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_import_error", lambda: None)
    monkeypatch.setattr(backend, "_launch_error", lambda: None)
    ops._chosen.cache_clear()
    ops._warn_of_broken.cache_clear()
    yield
    ops._chosen.cache_clear()
    ops._warn_of_broken.cache_clear()


def test_auto_prefers_triton_on_a_gpu(pretended_gpu):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert ops._chosen("auto", "cuda", dtype, False) == "triton"


@pytest.mark.parametrize("fault", ["_import_error", "_launch_error"])
@pytest.mark.parametrize("cuda_state", [None, "not built: no nvcc was found"])
def test_auto_falls_back_with_one_warning(fault, cuda_state, pretended_gpu, monkeypatch):
    monkeypatch.setattr(backend, fault, lambda: "it is broken")
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type=None, dtype=None: cuda_state)
    chosen = "reference" if cuda_state else "cuda"
    with pytest.warns(UserWarning) as caught:
        for dtype in (torch.bfloat16, torch.float32):
            assert ops._chosen("auto", "cuda", dtype, False) == chosen
    (warning,) = caught
    assert f"using backend '{chosen}' instead: 'triton' cannot run on cuda: it is broken" in str(warning.message)
    assert (cuda_state or "cuda:") in str(warning.message)
    with pytest.raises(RuntimeError, match="'triton' cannot run torch.bfloat16 on cuda: it is broken"):
        ops.choose_backend("triton", torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize("cuda_state", [None, "not built: no nvcc was found"])
def test_float64_on_a_gpu_runs_without_triton_and_without_a_warning(cuda_state, pretended_gpu, monkeypatch):
    monkeypatch.setattr(cuda, "why_unavailable", lambda device_type=None, dtype=None: cuda_state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chosen = ops.choose_backend("auto", torch.device("cuda"), torch.float64)
    assert chosen == ("reference" if cuda_state else "cuda")


BROKEN = "libtriton.so: cannot open shared object file"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "cause"),
    [("sys.modules['triton'] = None", "No module named"), ("sys.path.insert(0, sys.argv[1])", BROKEN)],
    ids=["not installed", "broken"],
)
def test_without_triton_the_cpu_keeps_its_library_and_a_gpu_takes_cuda_with_one_warning(setup, cause, tmp_path):
    """In a fresh process where `import triton` really fails; the GPU is pretended, and the CUDA library with it."""
    (tmp_path / "triton.py").write_text(f"raise ImportError({BROKEN!r})\n")
    code = f"""
import sys, warnings
{setup}
import torch
from adamss_kernels import ops
from adamss_kernels import cuda
choose = lambda device: ops.choose_backend("auto", torch.device(device), torch.bfloat16)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    assert choose("cpu") == "cpu"
torch.cuda.is_available = lambda: True
cuda.why_unavailable = lambda device_type=None, dtype=None: None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert [choose("cuda") for _ in range(3)] == ["cuda"] * 3
assert len(caught) == 1, caught
assert "'triton' cannot run on cuda: cannot import triton: {cause}" in str(caught[0].message), caught[0]
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_broken_installations_are_found_before_use(monkeypatch):
    def broken():
        raise ImportError("libtriton is missing")

    monkeypatch.setattr(backend, "_launchers", broken)
    backend._import_error.cache_clear()
    assert "libtriton is missing" in backend._import_error()
    backend._import_error.cache_clear()


@pytest.mark.parametrize("arch", ARCHS)
def test_tables_always_answer(arch, user_tables):
    for shape in tuning.SHAPES:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for kernel in tuning.KERNELS:
                assert isinstance(tuning.config(kernel, dtype, arch, shape), tuning.Config)


def test_shipped_tables_name_what_exists():
    for kernel, dtype, arch, shape in tuning.CONFIGS:
        assert kernel in tuning.KERNELS
        assert dtype in ("16", "32")
        assert arch in ARCHS
        assert shape in tuning.SHAPES


@pytest.mark.parametrize(
    ("M", "expected"), [(0, "few"), (16, "few"), (17, "small"), (512, "small"), (513, "large"), (1 << 20, "large")]
)
def test_shape_classes(M, expected):
    assert tuning.shape_class(M) == expected


@pytest.mark.parametrize("direction", tuning.DIRECTIONS)
def test_torch_multiplies_what_the_fused_kernel_is_not_for(direction, user_tables):
    def form(dtype=torch.bfloat16, D=768, N=1024, rho=30, precision="ieee"):
        return tuning.form(direction, dtype, "sm_90", (4096, D, N), rho, precision)

    assert form() == form(rho=64) == form(torch.float32, precision="tf32") == "fused"
    assert form(rho=65) == form(D=771) == form(N=1001) == form(torch.float32) == "torch"


@pytest.mark.parametrize(
    ("rows", "cols", "expected"), [(128, 3, 3), (128, 4, 4), (64, 16, 8), (2, 16, 1), (1, 1, 1), (1056, 16, 16)]
)
def test_tiles_that_share_an_inner_product_fill_the_gpu_first(rows, cols, expected):
    assert tuning.run_length("sm_90", rows, cols, 0.125) == expected


@pytest.mark.parametrize(("M", "blocks"), [(1, 1), (16384, 7), (8192, 33), (100, 1000), (1 << 20, 1)])
def test_splits_of_the_tokens_cover_them_and_none_is_empty(M, blocks):
    splits, width = tuning.split_tokens("sm_90", M, 64, blocks)
    assert (splits - 1) * width < M <= splits * width
    assert width % 64 == 0
    assert splits <= 64


def test_user_file_and_environment_override_in_this_order(user_tables, tmp_path, monkeypatch):
    key = ("low_rank_gemm", "16", "sm_90", "few")
    form = ("forward", "16", "sm_90", "few")

    def chosen():
        tuning.reload()
        run = tuning.form("forward", torch.float16, "sm_90", (16, 64, 64), 8, "ieee")
        return tuning.config(key[0], torch.bfloat16, *key[2:]).cols, run

    shipped = chosen()
    tuning.save(user_tables, {key: tuning.Config(16, 512)}, {form: "torch"})
    assert chosen() == (512, "torch")
    named = tmp_path / "named.json"
    tuning.save(named, {key: tuning.Config(16, 32)}, {})
    monkeypatch.setenv("ADAMSS_TUNING", str(named))
    assert chosen() == (32, "torch")
    monkeypatch.delenv("ADAMSS_TUNING")
    # Saving again keeps what is not measured anew.
    tuning.save(user_tables, {}, {form: "fused"})
    assert chosen() == (512, "fused")
    user_tables.unlink()
    assert chosen() == shipped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting"),
        ("[]", "configs"),
        ({"configs": {}}, "forms"),
        ({"configs": {"nonsense/16/sm_90/few": {}}, "forms": {}}, "nonsense"),
        ({"configs": {"low_rank_gemm/16/sm_90/few": {"rows": 17, "cols": 16}}, "forms": {}}, "rows = 17"),
        ({"configs": {"low_rank_gemm/16/sm_90/few": {"rows": 16, "width": 16}}, "forms": {}}, "width"),
        ({"configs": {}, "forms": {"forward/16/sm_90/few": "magic"}}, "magic"),
    ],
)
def test_bad_files_are_named(user_tables, content, message):
    user_tables.parent.mkdir(parents=True)
    user_tables.write_text(content if isinstance(content, str) else json.dumps(content))
    tuning.reload()
    with pytest.raises(ValueError, match=f"tuning.json.*{message}"):
        tuning.config("low_rank_gemm", torch.float16, "sm_90", "few")


def test_a_file_that_is_asked_for_has_to_exist(user_tables, tmp_path, monkeypatch):
    monkeypatch.setenv("ADAMSS_TUNING", str(tmp_path / "absent.json"))
    tuning.reload()
    with pytest.raises(ValueError, match=r"absent\.json"):
        tuning.config("low_rank_gemm", torch.float16, "sm_90", "few")


@pytest.mark.slow
def test_tune_compiles_ahead_in_other_processes(tmp_path):
    out = tmp_path / "tuning.json"
    command = [sys.executable, "-m", "adamss_kernels", "tune", "--device", "cpu", "--dtype", "float32"]
    command += ["--shape", "few", "--jobs", "1", "--seconds", "240", "--out", str(out)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in one process" not in done.stdout
    assert done.stdout.count("us of 2 measured") == len(tuning.KERNELS)
    assert len(json.loads(out.read_text())["configs"]) == len(tuning.KERNELS)


class PretendedPool:
    """One process that ends jobs at once, fails those of 32 rows, and never comes to those of 64."""

    def submit(self, function, case, kernel, config):
        future = concurrent.futures.Future()
        if config.rows != 64:
            future.set_result(config.rows != 32)
        return future


def test_candidates_that_ran_are_measured_first_and_those_that_failed_never():
    tried = {name: [tuning.Config(rows, 16) for rows in (16, 32, 64, 128)] for name in tuning.KERNELS}
    case = ("few", (1, 1, 1), torch.float32, torch.device("cpu"))
    for configs in tune._compile_ahead(case, tried, 0, PretendedPool()).values():
        assert [config.rows for config in configs] == [16, 128, 64]


def test_a_pool_that_breaks_leaves_all_candidates(capsys):
    class Broken:
        def submit(self, *_):
            raise BrokenProcessPool("a process died")

    tried = {"token_products": [tuning.Config(16, 16)]}
    case = ("few", (1, 1, 1), torch.float32, torch.device("cpu"))
    assert tune._compile_ahead(case, tried, 0, Broken()) == tried
    assert "a process died" in capsys.readouterr().out


def test_no_two_candidates_differ_in_what_their_kernel_has_not():
    configs = tune.candidates("token_products", torch.bfloat16, "large", "cuda")
    assert {(config.depth, config.group) for config in configs} == {(64, 8)}

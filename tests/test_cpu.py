"""The CPU library keeps the numerics contract on every instruction set, and stands up to a fuzzer."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ctypes import c_int64, c_void_p
from pathlib import Path

import pytest
import torch
from accuracy import naive, relative_error
from conftest import make_problem

from adamss_kernels import adamss_linear, compiled, ops
from adamss_kernels.compiled.cpu_library import _NAME, load

ROOT = Path(__file__).parent.parent
ISAS = load().isas


@pytest.fixture(params=ISAS)
def isa(request) -> Iterator[str]:
    before = load().isa()
    load().use_isa(request.param)
    assert load().isa() == request.param
    yield request.param
    load().use_isa(before)


def test_every_instruction_set_of_this_machine_is_built_and_run():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if " avx2 " in flags:
        assert "avx2" in ISAS
    if " avx512f " in flags and " avx512vl " in flags:
        assert "avx512" in ISAS
    if " avx512f " in flags and " avx512_bf16 " in flags:
        assert "avx512bf16" in ISAS
    if " amx_bf16 " in flags and " avx512_bf16 " in flags:
        assert ISAS[0] == "amx"
    assert ISAS[-1] == "baseline"


SHAPES = {
    "narrow": {"M": 5, "D": 3, "N": 7, "R": 2, "ranks": (1, 1)},
    "one register of S": {"M": 130, "D": 64, "N": 96, "R": 16, "ranks": (1,) * 10},
    "two registers of S": {"M": 67, "D": 70, "N": 45, "R": 9, "ranks": (3,) * 10},
    "four registers of S": {"M": 33, "D": 40, "N": 80, "R": 20, "ranks": (16, 9, 16, 7)},
    "S in memory": {"M": 40, "D": 50, "N": 120, "R": 12, "ranks": (8,) * 16},
    "rho of 512": {"M": 9, "D": 33, "N": 100, "R": 30, "ranks": (16,) * 32},
    "many shares": {"M": 2100, "D": 20, "N": 24, "R": 4, "ranks": (2, 1)},
    "many tiles": {"M": 333, "D": 300, "N": 270, "R": 40, "ranks": (3,) * 12},
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_keeps_the_numerics_contract(isa, dtype, shape, mode, masked):
    problem = make_problem(**SHAPES[shape]).to(dtype, torch.promote_types(dtype, torch.float32))
    exact, plain = problem.to(torch.float64), problem.to(dtype)
    K = problem.layout.num_subspaces
    active = torch.arange(K) % 3 != 1 if masked else None
    trainable = torch.arange(K) % 2 == 0 if masked else None
    dy = torch.randn(problem.x.shape[0], problem.weight.shape[0]).to(dtype)

    options = {"active": active, "trainable": trainable, "save_for_backward": mode, "backend": "cpu"}
    y = adamss_linear(*problem.operands, **options)
    y.backward(dy)
    y_exact, y_plain = naive(exact, active), naive(plain, active)
    y_exact.backward(dy.double())
    y_plain.backward(dy)
    unit = torch.finfo(dtype).eps / 2
    assert relative_error(y, y_exact) <= 2 * relative_error(y_plain, y_exact) + unit
    layout = problem.layout
    learns = torch.ones(K, dtype=torch.bool) if trainable is None else trainable
    keep_B = learns.repeat_interleave(torch.tensor(layout.ranks))[:, None]
    keep_C = learns[layout.row_subspace.long()][:, None]
    for name, keep in (("x", True), ("B", keep_B), ("C", keep_C)):
        got, want, base = (getattr(p, name).grad for p in (problem, exact, plain))
        error, allowed = relative_error(got, want * keep), 2 * relative_error(base * keep, want * keep) + unit
        assert error <= allowed, (name, error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["projection", "input"])
def test_the_number_of_threads_changes_no_bit(dtype, mode):
    problem = make_problem(M=9001, D=48, N=40, R=8).to(dtype, torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            # The base GEMM is PyTorch's: only what the library computes is compared.
            y = adamss_linear(*problem.operands, save_for_backward=mode, backend="cpu")
            runs.append(torch.autograd.grad(y, (problem.B, problem.C), torch.ones_like(y)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("M", [1, 5, 31])
def test_the_number_of_threads_changes_no_bit_of_few_tokens(dtype, M):
    problem = make_problem(M=M, D=200, N=400, R=70, ranks=(3, 1, 2)).to(dtype, torch.float32)
    runs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7, 64):
            torch.set_num_threads(count)
            with torch.no_grad():
                runs.append(adamss_linear(*problem.operands, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(runs[0], run) for run in runs[1:])


def blocks_of(call) -> list[int]:
    """Return how many blocks each loop of `call` offers to threads, counted at the library's door to torch's."""
    library = ctypes.CDLL(str(compiled.find(_NAME)))
    task = ctypes.CFUNCTYPE(None, c_int64, c_int64, c_void_p)
    blocks = []

    @ctypes.CFUNCTYPE(ctypes.c_int32, c_int64, c_int64, c_int64, task, c_void_p)
    def run_serially(begin, end, grain, run, context):
        blocks.append(end - begin)
        run(begin, end, context)
        return 0

    isa = load().isa()
    assert library.adamss_cpu_init(ctypes.cast(run_serially, c_void_p), isa.encode()) == 0
    try:
        call()
    finally:
        load().use_isa(isa)
    return blocks


def test_the_backward_of_many_tokens_has_work_for_64_threads():
    """On sizes of which nothing but the tokens is large."""
    problem = make_problem(M=9001, D=48, N=40, R=8, dtype=torch.float32)
    y = adamss_linear(*problem.operands, backend="cpu")
    blocks = blocks_of(lambda: torch.autograd.grad(y, (problem.x, problem.B, problem.C), torch.ones_like(y)))
    assert 64 <= max(blocks) < 9001 / 64, "shares of the tokens, each of some blocks"


@pytest.mark.parametrize("threads", [2, 3, 7, 16, 48, 64])
def test_threads_share_the_rows_of_few_tokens_evenly(threads):
    problem = make_problem(M=1, D=32, N=4096, R=100, dtype=torch.float32)
    with torch.no_grad():
        (blocks,) = blocks_of(lambda: adamss_linear(*problem.operands, backend="cpu"))
    most = -(-blocks // threads)  # as torch hands them out
    assert most * threads <= 1.1 * blocks, "the longest share against an even one"


def test_small_layers_wake_no_thread_for_few_tokens():
    problem = make_problem(M=2, D=64, N=64, R=16, dtype=torch.float32)
    with torch.no_grad():
        assert blocks_of(lambda: adamss_linear(*problem.operands, backend="cpu")) == []


def test_the_operators_keep_no_reference_to_what_they_are_given():
    """Their C++ takes owned handles of every tensor: one that is not given back keeps its memory for ever."""
    problem = make_problem(M=40, D=12, N=10, R=8, dtype=torch.float32)
    mask = torch.ones(problem.layout.num_subspaces, dtype=torch.bool)
    *operands, subspaces = problem.raw(mask, mask)
    given = [t.clone() for t in (*operands, *subspaces[:5])]
    x, weight, _, _, _, basis, basis_bias, *_ = given
    forward, backward = ops.OPERATORS["cpu"]

    def users(t):
        return torch._C._storage_Use_Count(t.untyped_storage()._cdata)

    before = [users(t) for t in given]
    for keep in (True, False):
        y, S, P = forward(*given, keep, keep)
        for saved in ({"x": x, "P": None}, {"x": None, "P": x @ basis.T + basis_bias}):
            grads = backward(
                torch.ones_like(y), saved["x"], S if keep else None, saved["P"], weight, *given[3:], mask,
                [True, saved["x"] is not None, True, True, keep],
            )  # fmt: skip
            assert [users(t) for t in grads] == [2] * 5, "the tensor and the storage that asks"
        assert [users(t) for t in (y, S, P)] == [2] * 3
    assert [users(t) for t in given] == before


def test_what_the_operators_refuse_reaches_python_and_loses_nothing():
    *operands, subspaces = make_problem(M=4, D=12, N=10, R=8, dtype=torch.float16).raw()
    with pytest.raises(RuntimeError, match="expected float32, float64 or bfloat16"):
        ops.OPERATORS["cpu"].forward(*operands, *subspaces[:5], True, False)


@pytest.mark.slow
def test_an_instruction_set_is_forced_by_the_environment():
    code = "from adamss_kernels.compiled.cpu_library import load; print(load().isa())"
    for name in ISAS:
        environment = os.environ | {"ADAMSS_CPU_ISA": name}
        result = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout.strip() == name
    code = "import adamss_kernels; print(adamss_kernels.available_backends()['cpu'])"
    environment = os.environ | {"ADAMSS_CPU_ISA": "abacus"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "ADAMSS_CPU_ISA='abacus': this machine and build have" in result.stdout


def test_the_kernels_export_no_template_of_the_standard_library():
    """An inline function of the standard library, kept from the AVX-512 object, would crash on a lesser machine."""
    nm = shutil.which("nm")
    assert nm, "binutils are needed to build the library and so are here"
    library = next(p for folder in compiled.__path__ for p in Path(folder).glob("libadamss_cpu.so"))
    symbols = subprocess.run([nm, "-DC", "--defined-only", str(library)], capture_output=True, text=True, check=True)
    weak = [line for line in symbols.stdout.splitlines() if " W " in line or " V " in line]
    assert not [line for line in weak if "std::vector" in line or "std::min" in line], weak


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """The folder of a library and a fuzz driver with address and undefined-behaviour sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-DADAMSS_OPTIMIZATION=-O0", "-DADAMSS_FUZZ=ON"]
    subprocess.run(configure, check=True, capture_output=True)
    command = ["cmake", "--build", folder, "-j2", "--target", "adamss_fuzz"]
    build = subprocess.run(command, capture_output=True, text=True, check=False)
    assert build.returncode == 0, build.stdout + build.stderr
    return next(folder.rglob("adamss_fuzz")).parent


def fuzz(driver: Path) -> str:
    """Run `driver` for some seconds from the seed in ADAMSS_FUZZ_SEED, or else a new one, and return what it prints."""
    seed = os.environ.get("ADAMSS_FUZZ_SEED") or str(int.from_bytes(os.urandom(4), "little"))
    result = subprocess.run([driver, "8", seed], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise AssertionError(f"again with ADAMSS_FUZZ_SEED={seed}:\n{result.stdout}{result.stderr}")
    return result.stdout


@pytest.mark.slow
def test_fuzzing_under_sanitizers_finds_nothing(sanitized):
    print(fuzz(sanitized / "adamss_fuzz"))


def test_what_fuzzing_finds_can_be_found_again(tmp_path, monkeypatch):
    driver = tmp_path / "driver"
    driver.write_text('#!/bin/sh\necho "seed $2"\nexit 1\n')
    driver.chmod(0o755)
    monkeypatch.delenv("ADAMSS_FUZZ_SEED", raising=False)
    with pytest.raises(AssertionError, match=r"ADAMSS_FUZZ_SEED=(\d+):\nseed \1\n"):
        fuzz(driver)
    monkeypatch.setenv("ADAMSS_FUZZ_SEED", "20")
    with pytest.raises(AssertionError, match="ADAMSS_FUZZ_SEED=20:\nseed 20\n"):
        fuzz(driver)


@pytest.mark.slow
def test_the_backend_is_clean_under_sanitizers(sanitized):
    """These tests again, with PyTorch's own memory and threads around the sanitized library."""
    code = f"""if True:
        import sys, pytest
        from adamss_kernels import compiled
        compiled.__path__.insert(0, {str(sanitized)!r})
        from adamss_kernels.compiled import cpu_library
        assert str(compiled.find(cpu_library._NAME).parent) == {str(sanitized)!r}
        sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--timeout=200", {__file__!r}, "-k",
                              "numerics_contract and masked or number_of_threads"]))"""
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = os.environ | {
        "LD_PRELOAD": runtime.stdout.strip(),
        # Python and PyTorch leak, and catch exceptions that they throw in their own ways.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout

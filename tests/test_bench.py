"""The benchmarks measure what they say, refuse to time what is wrong, and find what got slower and nothing else."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adamss_kernels import ops, over_base, reference
from adamss_kernels.cli import main
from adamss_kernels.cli.bench import bases, bound, layer, measure, methods, providers, results, scaling
from adamss_kernels.cli.bench.bound import Bound
from adamss_kernels.cli.bench.compare import changes
from adamss_kernels.cli.bench.measure import Contender, Rotation, Settings, interleaved, pinned, relocate, summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
TINY = "D=32,M=24,K=3,r=2,R=8"
PLANTED = ["layer", "--shapes", TINY, "--providers", "reference", "merged", "--seconds", "0.15", "--threads", "1"]


@pytest.fixture(autouse=True)
def _as_outside_of_tests(monkeypatch):
    """Let nothing fill memory or warn while a clock runs, and do not spend seconds on measuring the machine."""
    torch.use_deterministic_algorithms(False)
    for module in (layer, sys.modules["adamss_kernels.cli.bench.command"]):
        monkeypatch.setattr(module, "measure_bound", lambda device, dtype: Bound(1e11, {2**20: 1e10, 2**28: 1e9}))


@pytest.fixture
def fresh_kernels():
    """`ops` remembers which functions it calls; forget that around a test that replaces one."""
    ops._chosen.cache_clear()
    yield
    ops._chosen.cache_clear()


def bench(*arguments, out=None):
    assert main(["bench", *arguments, *(["--out", str(out)] if out else [])]) == 0


SMOKE = {
    "layer": (TINY, ["reference", "half-pruned", "merged", "kradapter", "peft-adamss", "peft-lora"]),
    "decode": (TINY, None),
    "methods": (TINY, None),
    "model": ("layers=1,width=32,ffn=48,batch=1,tokens=5,K=3", None),
    "init": ("layers=2,D=32,K=3,R=8", None),
    "asa": ("layers=2,D=32,K=3,R=8", None),
    "mixed": ("rows=4,tokens=3,adapters=3,D=32,K=3,R=8", None),
    "bases": (f"base=int8,{TINY}", None),
    "memory": (TINY, ["linear"]),
    "scaling": (f"of=layer,sweep=M,{TINY}", ["reference"]),
}


@pytest.mark.parametrize("suite", SMOKE)
def test_a_suite_runs_and_writes_what_it_measured(suite, tmp_path, capsys):
    pytest.importorskip("peft")
    if suite == "bases":
        pytest.importorskip("bitsandbytes")
    shape, providers = SMOKE[suite]
    chosen = ["--providers", *providers] if providers else []
    bench(suite, "--shapes", shape, "--seconds", "0", "--threads", "1", *chosen, out=tmp_path)
    first, *rows = map(json.loads, next(tmp_path.glob(f"*-{suite}.jsonl")).read_text().splitlines())
    environment = first["environment"]
    assert environment["threads"] == 1
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["command"]
    rows = [row for row in rows if row["suite"] != "bound"]
    assert {row["suite"] for row in rows} == {suite}
    assert set(providers or []) <= {row["provider"] for row in rows}
    assert len({results.key(row) for row in rows}) == len(rows)
    for row in rows:
        if suite == "memory":
            assert row["peak_bytes"] >= 0
            continue
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert row["rounds"] == len(row["ratios"]) >= measure.MIN_ROUNDS
        assert row["seconds"]["median"] > 0
    # The floor comes first, and is printed with the others.
    out = capsys.readouterr().out
    assert all(row["provider"] in out for row in rows)
    assert rows[0].get("ratio", {"median": 1})["median"] == 1


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_an_adapted_base_that_computes_something_else_is_not_timed(base, monkeypatch):
    pytest.importorskip("bitsandbytes")
    add_update = over_base.add_update
    monkeypatch.setattr(over_base, "add_update", lambda *operands: 1.1 * add_update(*operands))
    case = bases.complete({"base": base, "D": 32, "M": 5, "K": 3, "R": 8})
    with pytest.raises(RuntimeError, match="ours: y and dx are off by"):
        next(bases.measure(case, ["ours"], Settings(CPU, 0.0)))


def test_the_figures_of_a_layer_follow_from_its_shape_and_times(tmp_path):
    pytest.importorskip("peft")
    providers = ["reference", "half-pruned", "peft-adamss", "peft-lora"]
    bench("layer", "--shapes", TINY, "--providers", *providers, "--seconds", "0", "--threads", "1", out=tmp_path)
    _, rows = results.read(tmp_path)
    found = {(row["provider"], row["case"]["pass"]): row for row in rows if row["suite"] == "layer"}
    for (provider, which), row in found.items():
        passes = 1 if which == "forward" else 2
        flops, moved = 2 * 24 * 32 * 32 * passes, 4 * (32 * 32 + 2 * 24 * 32) * passes
        seconds = row["seconds"]["median"]
        assert row["tflop_per_s"] == pytest.approx(flops / seconds / 1e12, rel=1e-4)
        assert row["gb_per_s"] == pytest.approx(moved / seconds / 1e9, rel=1e-4)
        assert row["bound_share"] == pytest.approx(max(flops / 1e11, moved / 1e10) / seconds, rel=1e-4)
        assert row["linear_bound_share"] == found["linear", which]["bound_share"]
        # y, and dx with it, are what any of them allocates.
        assert row["peak_bytes"] >= 24 * 32 * 4 * passes
        if which == "forward":
            assert row["saved_bytes"] == 0
        # Ours make the base product of few tokens themselves.
        assert provider == "half-pruned" or row["aten_calls"] >= found["linear", which]["aten_calls"]
        assert (row["parameters"] == 0) == (provider == "linear")
    training = {provider: found[provider, "forward + backward"] for provider in ("linear", "reference", "peft-lora")}
    assert training["linear"]["saved_bytes"] == 0, "of a frozen layer only the weight is kept"
    # x (24, 32) or P (24, 8), and S (24, 6): 16 R is more than N, so it is x.
    assert training["reference"]["saved_bytes"] == 4 * (24 * 32 + 24 * 6)
    assert training["peft-lora"]["parameters"] == 8 * (32 + 32)


@pytest.mark.parametrize("which", ["forward", "dx", "dB", "dC"])
def test_a_layer_that_computes_something_else_is_not_timed(which, monkeypatch, fresh_kernels):
    forward, backward = reference.forward, reference.backward

    def wrong_forward(*args):
        y, S, P = forward(*args)
        return y * 1.001, S, P

    def wrong_backward(*args):
        grads = list(backward(*args))
        index = {"dx": 0, "dB": 3, "dC": 4}[which]
        grads[index] = grads[index] * 1.01
        return tuple(grads)

    if which == "forward":
        monkeypatch.setattr(reference, "forward", wrong_forward)
    else:
        monkeypatch.setattr(reference, "backward", wrong_backward)
    with pytest.raises(RuntimeError, match=r"reference: .*nothing is timed"):
        bench("layer", "--shapes", TINY, "--providers", "reference", "--threads", "1")


def test_a_planted_regression_is_found_and_named_and_the_same_code_is_no_regression(
    tmp_path, monkeypatch, capsys, fresh_kernels
):
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.002)
    bench(*PLANTED, out=tmp_path / "before")
    for repeat in range(5):
        again = tmp_path / str(repeat)
        bench(*PLANTED, out=again)
        # A quarter: what a busy machine does to calls of some microseconds is no small matter.
        assert main(["bench", "--compare", str(tmp_path / "before"), str(again), "--threshold", "0.25"]) == 0

    forward = reference.forward

    def slow(*args):
        time.sleep(0.005)
        return forward(*args)

    monkeypatch.setattr(reference, "forward", slow)
    ops._chosen.cache_clear()
    bench(*PLANTED, out=tmp_path / "after")
    capsys.readouterr()
    assert main(["bench", "--compare", str(tmp_path / "before"), str(tmp_path / "after"), "--threshold", "0.25"]) == 1
    worse = [line for line in capsys.readouterr().out.splitlines() if line.startswith("worse")]
    assert len(worse) == 2
    assert all(" reference: x " in line for line in worse), worse
    # Forward alone suffers more than forward with backward, so it comes first.
    assert "pass=forward D" in worse[0]


def noisy(seed: int, shift: float, rounds: int = 20) -> dict:
    """Forty rows whose ratios wander by 10 %, neighbours alike, and now and then are three times too high."""
    g = torch.Generator().manual_seed(seed)
    rows = {}
    for index in range(40):
        noise = torch.randn(rounds + 1, generator=g)
        wander = 0.1 * (noise[1:] + noise[:-1]) / 2**0.5
        outliers = 3 ** (torch.rand(rounds, generator=g) < 0.1).float()
        ratios = (wander.exp() * outliers * (shift if index == 7 else 1)).tolist()
        rows[f"row {index}"] = {"ratios": ratios, "aten_calls": 5}
    return rows


def test_noise_moves_nothing_and_a_shift_moves_its_row_only():
    for seed in range(5):
        before = noisy(2 * seed, 1.0)
        assert not [c for c in changes(before, noisy(2 * seed + 1, 1.0)) if c.low > 1.1 or c.high < 1 / 1.1]
        moved = [c.what for c in changes(before, noisy(2 * seed + 1, 2.5)) if c.low > 1.1 or c.high < 1 / 1.1]
        assert moved == ["row 7"], seed


def test_more_operators_or_bytes_are_a_regression(tmp_path, capsys):
    row = {"suite": "memory", "case": {"D": 4}, "provider": "linear"}
    for name, size in (("before", 100), ("after", 120)):
        results.write(tmp_path / name / "cpu-memory.jsonl", {}, [{**row, "peak_bytes": size}])
    assert main(["bench", "--compare", str(tmp_path / "before"), str(tmp_path / "after")]) == 1
    assert "worse: memory D=4 linear peak_bytes: x 1.200" in capsys.readouterr().out
    assert main(["bench", "--compare", str(tmp_path / "after"), str(tmp_path / "before")]) == 0


def test_what_cannot_be_compared_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="--compare: .*found none"):
        main(["bench", "--compare", str(tmp_path), str(tmp_path)])
    row = {"suite": "layer", "provider": "linear", "ratios": [1.1, 1.2]}
    for number in (1, 2):
        results.write(tmp_path / f"{number}.jsonl", {"threads": number}, [{**row, "case": {"D": number}}])
    assert main(["bench", "--compare", str(tmp_path / "1.jsonl"), str(tmp_path / "2.jsonl")]) == 2
    out = capsys.readouterr().out
    assert "threads differs: 1 before, 2 after" in out
    assert "no row is in both" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["juggle"], "expected some of layer"),
        (["layer", "--shapes", "D"], "expected FIELD=VALUE"),
        (["layer", "--shapes", "E=3"], "bench layer has no 'E'"),
        (["--shapes", "D=3"], "expected one suite"),
        (["asa", "--providers", "cpu"], "bench asa: --providers: expected some of"),
        (["layer", "--shapes", TINY, "--providers", "peft-magic"], "got 'peft-magic'"),
    ],
)
def test_what_is_asked_wrongly_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", *arguments])
    assert message in str(error.value) + capsys.readouterr().err


def test_every_contender_has_a_turn_in_every_round_and_preparations_are_not_timed():
    log = []
    contenders = {
        "quick": Contender(lambda: log.append("quick")),
        "slow": Contender(lambda: time.sleep(0.02), lambda: (log.append("prepare"), time.sleep(0.02))),
    }
    times = interleaved(contenders, Settings(CPU, 0.3))
    assert len(times["quick"]) == len(times["slow"]) >= measure.MIN_ROUNDS
    shares = summary(times, "quick")
    assert shares["quick"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    # With its preparation a call would take twice as long; the best of them shows that it is left out.
    assert min(times["slow"]) < 0.035
    turns = re.findall(r"(?:quick )+|(?:prepare )+", " ".join(log) + " ")
    assert len(turns) >= measure.MIN_ROUNDS, "not one after the other is finished"


def test_operands_come_in_turn_from_more_memory_than_the_cache():
    ring = Rotation(lambda: torch.empty(2**18), CPU)
    first, second = next(ring), next(ring)
    assert first.data_ptr() != second.data_ptr()
    seen = {first.data_ptr(), second.data_ptr()}
    for _ in range(200):
        seen.add(next(ring).data_ptr())
    assert len(seen) * 2**20 >= 2 * 2**20


def test_moved_layers_are_elsewhere_and_share_what_they_shared():
    one, two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    two.weight = one.weight
    x, (weight, address) = torch.randn(2, 8), (one.weight, one.weight.data_ptr())
    before = one(x), two(x)
    between = relocate([one, two])
    assert len(between) == 3
    assert one.weight is two.weight is weight
    assert weight.data_ptr() != address
    assert torch.equal(one(x), before[0])
    assert torch.equal(two(x), before[1])


def test_threads_and_cpus_are_as_before_afterwards():
    before, cpus = torch.get_num_threads(), measure._affinity()
    with pinned(1):
        assert torch.get_num_threads() == 1
        assert len(measure._affinity()) <= 1
    assert torch.get_num_threads() == before
    assert measure._affinity() == cpus


def test_the_bound_is_what_products_and_copies_reach(monkeypatch):
    monkeypatch.setattr(bound, "_GEMM", {"cpu": (64,)})
    monkeypatch.setattr(bound, "_COPY", {"cpu": (2**14, 2**20)})
    measured = bound.measure_bound.__wrapped__(CPU, torch.float32)
    assert measured.flops > 0
    assert set(measured.bandwidth) == {2**14, 2**20}
    fixed = Bound(100.0, {10: 5.0, 1000: 2.0})
    assert fixed.seconds(1000, 10) == 10, "limited by the product"
    assert fixed.seconds(10, 2000) == 1000, "limited by the copy of that size"
    assert fixed.seconds(10, 10) == 2
    rows = fixed.rows("layer", "float32")
    assert [row["provider"] for row in rows] == ["gemm", "copy", "copy"]


def test_exponents_are_those_of_the_upper_half_of_a_sweep():
    rows = [
        {
            "suite": "scaling",
            "case": {"of": "layer", "sweep": "M", "D": 8, "M": 2**n},
            "provider": provider,
            "seconds": {"median": max(1e-3, 1e-6 * 2 ** (power * n))},
        }
        for provider, power in (("linear", 1.0), ("cpu", 1.5))
        for n in range(8, 16)
    ]
    fits = {fit["provider"]: fit for fit in scaling.exponents(rows)}
    assert fits["linear"]["exponent"] == pytest.approx(1.0)
    assert fits["cpu"]["exponent"] == pytest.approx(1.5)
    assert fits["cpu"]["range"] == [2**12, 2**15]
    assert fits["cpu"]["case"] == {"of": "layer", "sweep": "M", "D": 8}


def test_the_full_run_sweeps_what_the_short_one_does_and_more():
    short, full = ([tuple(case.items()) for case in scaling.cases(which)] for which in (False, True))
    tops = {"M": 2**15, "K": 64, "r": 16, "D": 4096, "layers": 480}
    for of, variable in itertools.product(("layer", "init", "asa"), tops):
        if of == "layer" or variable != "M":
            for cases, least in ((short, 3), (full, 5)):
                values = [dict(c)[variable] for c in cases if dict(c)["of"] == of and dict(c)["sweep"] == variable]
                assert len(set(values)) >= least
            assert max(values) == tops[variable]
    assert {str(case) for case in methods.cases(False)} <= {str(case) for case in methods.cases(True)}


def test_the_microbenchmarks_run():
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-disable", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", "small and float32 or layout or one_layer"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_freed_memory_stays_with_the_process_while_it_is_measured():
    code = """if True:
        import resource, sys, torch
        from adamss_kernels.compiled.allocator import keep_freed_memory
        kept = keep_freed_memory()
        assert kept or sys.platform != "linux"
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(8 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        # What else lies on the heap may keep a block from fitting where the one before was.
        print(int(kept), min(faults() for _ in range(10)))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = map(int, result.stdout.split())
    assert not kept or faults < 100, "32 MiB of fresh memory would be 8192 pages"


def test_a_profile_gathers_functions_into_words(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "bench"))
    import cpu_profile

    report = """
        40.00% ;libtorch_cpu.so  ;[.] mkl_blas_avx512_sgemm_kernel_0
        20.00% ;[JIT] tid 31001  ;[.] 0x00007fe7ec142043
        10.00% ;libadamss_cpu.so ;[.] avx512::for_tiles<avx512::dot_block<float>(long)::{lambda(auto:1, long)#1}>
         5.00% ;libadamss_cpu.so ;[.] avx512::dot_block<float>
         0.50% ;libadamss_cpu.so ;[.] amx::(anonymous namespace)::Pass::product(long, float const*) const
         4.00% ;libadamss_cpu.so ;[.] avx512::outer_tile<float, 5, 4>
         9.00% ;libgomp.so.1     ;[.] 0x000000000001de62
         7.00% ;libtorch_cpu.so  ;[.] at::native::vectorized_loop<float>
         3.00% ;libpython3.11.so ;[.] _PyEval_EvalFrameDefault
         2.00% ;[kernel.kallsyms];[k] clear_page_erms
    """
    assert cpu_profile.shares(report.splitlines()) == pytest.approx(
        {
            "base product": 0.60,
            "cpu: dot_block": 0.15,
            "waiting for the other thread": 0.09,
            "other PyTorch kernels": 0.07,
            "cpu: outer_tile": 0.04,
            "Python and PyTorch around the kernels": 0.03,
            "operating system": 0.02,
            "cpu: product": 0.005,
        }
    )


def test_a_cuda_graph_holds_no_provider_that_copies_from_the_host():
    known = providers.defaults(torch.device("cpu"), torch.float32)
    kept = providers.defaults(torch.device("cpu"), torch.float32, graph=True)
    assert sorted(set(known) - set(kept)) == ["peft-adamss", "peft-adamss-compiled"]

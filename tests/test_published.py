"""The page of published figures shows what is counted and what was measured."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))

pytestmark = pytest.mark.slow
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def counted():
    import published_counts

    return {row.what: row for row in published_counts.rows()}


def test_the_page_is_that_of_the_committed_results():
    script = [sys.executable, "tools/published.py", "--check"]
    result = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_counts_follow_the_formula(counted):
    """sum_k r_k (R + n_k), by hand."""
    assert counted["RoBERTa-base, K = 10, r_k = 1"].counted == 24 * (10 * 100 + 768) == 42432
    assert counted["RoBERTa-large, K = 10, r_k = 1"].counted == 48 * (10 * 100 + 1024) == 97152
    assert counted["ViT-Base, K = 10, r_k = 3"].counted == 24 * 3 * (10 * 100 + 768)
    llama = 28 * ((32 * 100 + 3072) + (32 * 100 + 1024))
    assert counted["Llama-3.2-3B, K = 32, r_k = 1"].counted == llama == 293888
    assert counted["RoBERTa-base, CoLA, ASA from 10 to 5"].counted == (24 * 5 * 101, 24 * (500 + 768 - 5))


def test_a_verdict_is_about_the_printed_number_as_it_is_rounded():
    from published_counts import Row

    def verdict(printed, counted, unit):
        return Row("", "", printed, counted, unit).verdict()

    assert verdict("42K", 42432, 1000) == "agrees"
    assert verdict("42K", 42501, 1000) == "differs"
    assert verdict("0.097M", 97152, 1000) == "agrees"
    assert verdict("42,432", 42431, 1) == "differs"
    assert verdict("27.0K", (12120, 30312), 100) == "possible"
    assert verdict("0.045M", (4040, 44600), 1000) == "possible"
    assert verdict("31K", (12120, 30312), 1000) == "impossible"


def test_an_interval_is_students():
    import published

    mean, half = published.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    # t of 4 degrees of freedom at 97.5 %, from a printed table.
    assert half == pytest.approx(2.776 * statistics.stdev([1, 2, 3, 4, 5]) / 5**0.5, rel=1e-3)


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results/accuracy").glob("*.jsonl")), ids=lambda path: path.stem)
def test_methods_are_compared_at_equal_parameters_and_with_the_rate_that_did_best_in_trials(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    runs = [row for row in rows if row["suite"] == "accuracy"]
    found = {m: {r["case"]["seed"] for r in runs if r["provider"] == m} for m in ("lora", "adamss")}
    assert found["lora"] == found["adamss"]
    assert len(found["lora"]) >= 5
    counts = {row["parameters"] for row in runs}
    assert max(counts) <= 1.02 * min(counts)
    trials = [row for row in rows if row["suite"] == "accuracy-trial"]
    assert not {row["case"]["seed"] for row in trials} & found["lora"]
    for method in found:
        best = max((row for row in trials if row["provider"] == method), key=lambda row: row["accuracy"])
        assert {row["case"]["rate"] for row in runs if row["provider"] == method} == {best["case"]["rate"]}


def test_the_committed_comparison_is_whole():
    content = json.loads((ROOT / "bench/results/compare-1024x768/experimental_results.json").read_text())
    assert content["settings"]["size"] == [1024, 768]
    assert len(content["settings"]["seeds"]) >= 3
    assert len(content["matrices"]) == 8
    for kind in content["matrices"].values():
        for start, methods in (("zero", 6), ("perturbed", 8)):
            assert len(kind[start]) == methods
            for method, row in kind[start].items():
                assert method == "full" or row["parameters"] <= kind["budget"]
                assert len(row["frobenius"]["values"]) == len(content["settings"]["seeds"])

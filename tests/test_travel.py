"""An adapter written under one number of threads, or by other instructions, loads under another: in every format."""

from __future__ import annotations

import functools

import pytest
from travel import SHAPES, run

pytestmark = pytest.mark.slow

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of what so many threads have written, once for each number."""
    return functools.cache(lambda threads: write(tmp_path_factory.mktemp(f"under-{threads}"), threads))


def write(folder, threads):
    run("write", folder, threads)
    return folder


@pytest.mark.parametrize(
    ("writer", "reader", "environment"), [(2, 1, {}), (1, 2, {}), (1, 1, AVX2)], ids=["2 to 1", "1 to 2", "to AVX2"]
)
def test_an_adapter_loads_silently_with_its_update_whatever_computed_its_basis(written, writer, reader, environment):
    rows = run("read", written(writer), reader, **environment)
    assert {(row["format"], row["layer"]) for row in rows} == {
        (format_, layer) for format_ in ("full", "compact", "peft") for layer in SHAPES
    }
    for row in rows:
        if row["format"] == "compact":
            # Solved from float32 values with a condition number below 100.
            assert row["error"] <= 1e-5
            assert row["reported"] <= 1e-5
        else:
            assert row["same_bits"]

"""The pictures of the benchmarks show the committed numbers, and can be read without colour."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adamss_kernels.cli.bench import plots, results

pytestmark = pytest.mark.slow

pytest.importorskip("matplotlib")
RESULTS = Path(__file__).parent.parent / "bench" / "results"
# Those of one processor: the pictures mix no two.
COMMITTED = [row for file in RESULTS.glob("AMD-EPYC-avx512bf16-*.jsonl") for row in results.read(file)[1]]


@pytest.fixture(scope="module")
def figures():
    """The pictures of the committed results."""
    return plots.draw(COMMITTED)


@pytest.mark.parametrize(
    ("name", "variable", "value"),
    [
        ("ratio-by-tokens", "M", lambda row: row["ratio"]["median"]),
        ("ratio-by-subspaces", None, lambda row: row["ratio"]["median"]),
        ("ratio-by-width", "D", lambda row: row["ratio"]["median"]),
        ("cost", None, lambda row: row["seconds"]["median"] * 1e3),
    ],
)
def test_a_picture_shows_the_committed_numbers_and_all_of_them(name, variable, value, figures):
    words = {word: variable for variable, word in plots._VARIABLES.items()}
    shown = []
    for axes in figures[name].axes:
        sweep = words[axes.get_xlabel()]
        assert variable in (None, sweep)
        title = axes.get_title()
        of = {"init": "initialisation", "asa": "ASA update"}
        subject = next((subject for subject, word in of.items() if title.startswith(word)), "layer")
        which = "forward + backward" if "forward + backward" in title else "forward"
        which = {"init": None, "asa": "update"}.get(subject, which)
        width = re.search(r"D = (\d+), N = (\d+)", title)
        for line in axes.lines:
            expected = sorted(
                (row["case"][sweep], value(row))
                for row in COMMITTED
                if row["suite"] == "scaling"
                and (row["case"]["of"], row["case"]["sweep"], row["case"].get("pass")) == (subject, sweep, which)
                and plots.title(row["provider"]) == line.get_label()
                and (width is None or (row["case"]["D"], row["case"]["N"]) == tuple(map(int, width.groups())))
            )
            points = list(zip(line.get_xdata(), line.get_ydata(), strict=True))
            assert points == [pytest.approx(point) for point in expected]
            shown += points
    sweeps = {"ratio-by-tokens": ("M",), "ratio-by-subspaces": ("K", "r"), "ratio-by-width": ("D",)}.get(name)
    layers = [row for row in COMMITTED if row["suite"] == "scaling" and row["case"]["of"] == "layer"]
    if sweeps:
        assert len(shown) == sum(row["case"]["sweep"] in sweeps for row in layers)
    assert len(shown) > 10


def test_the_memory_picture_and_the_roofline_show_the_committed_numbers(figures):
    sizes = {round(row[f] / 2**20, 6) for row in COMMITTED for f in ("peak_bytes", "saved_bytes") if f in row}
    shown = [y for axes in figures["memory"].axes for line in axes.lines for y in line.get_ydata()]
    assert shown
    assert {round(y, 6) for y in shown} <= sizes
    lines = [line for axes in figures["roofline"].axes for line in axes.lines]
    kernels = [row for row in COMMITTED if row["suite"] in ("layer", "asa") and "flop_per_byte" in row]
    points = [line for line in lines if line.get_linestyle() == "None"]
    shown = {point for line in points for point in zip(*line.get_data(), strict=True)}
    assert shown == {(row["flop_per_byte"], row["tflop_per_s"]) for row in kernels}
    peaks = {row["tflop_per_s"] for row in COMMITTED if row["provider"] == "gemm" and row["case"]["of"] == "layer"}
    assert peaks <= {y for line in lines for y in line.get_ydata()}, "the ceilings"


def test_pictures_have_labels_with_units_and_differ_without_colour(figures):
    for name, figure in figures.items():
        for axes in figure.axes:
            assert axes.get_xlabel(), name
            assert axes.get_ylabel(), name
            assert axes.get_title(), name
            curves = {line.get_label(): (line.get_marker(), str(line._dash_pattern)) for line in axes.lines}
            if name != "roofline":
                assert len(set(curves.values())) == len(curves), name


def test_the_same_rows_give_the_same_files(tmp_path):
    rows = [row for row in COMMITTED if row["case"].get("sweep") == "D" and row["case"]["of"] == "layer"]
    for folder in ("first", "second"):
        plots.save({"ratio-by-width": plots.draw(rows)["ratio-by-width"]}, tmp_path / folder, ("svg", "png"))
    first, second = ((tmp_path / folder / "ratio-by-width.svg").read_bytes() for folder in ("first", "second"))
    assert first == second
    assert (tmp_path / "first" / "ratio-by-width.png").read_bytes().startswith(b"\x89PNG")

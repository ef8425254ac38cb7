"""Write the tables and the picture of docs/published.md: what was published beside what comes out here.

Usage: python tools/published.py [--check]

Parameters are counted anew (published_counts.py); accuracies and fits are those of bench/results. With --check nothing
is written: the exit status is 1 where the page or its picture differs from them.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_counts

from adamss_kernels.cli.bench import plots, results

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "published.md"
PLOTS = ROOT / "docs" / "plots"
ACCURACY = ROOT / "bench" / "results" / "accuracy"
COMPARE = ROOT / "bench" / "results" / "compare-1024x768"
TITLES = {"lora": "LoRA", "adamss": "AdaMSS", "adamss-asa": "AdaMSS with ASA"}
# Those of the KRAdapter authors' script; all start from zero.
PUBLISHED = ("lora", "sinlora", "kradapter", "randlora", "kronecker")
FLAT = ("random", "sparse", "whitened")
Row = dict[str, Any]


def counts_table() -> list[str]:
    """Published numbers of parameters, and what is counted here."""
    lines = ["| source | setting | printed | counted here | | |", "|---|---|---:|---:|---|---|"]
    for row in published_counts.rows():
        counted = row.counted
        text = f"{counted:,}" if isinstance(counted, int) else f"{counted[0]:,} to {counted[1]:,}"
        lines.append(_cells(row.source, row.what, row.printed, text, row.verdict(), row.remark))
    return lines


def accuracy_table() -> list[str]:
    """Means over seeds with 95 % intervals, and the difference from LoRA on the same seeds."""
    head = ("task", "method", "parameters", "at the end", "rate", "seeds", "accuracy", "minus LoRA's, seed by seed")
    lines, sources = [_cells(*head), "|---|---|---:|---:|---:|---:|---:|---:|"], []
    for path in sorted(ACCURACY.glob("*.jsonl")):
        environment, rows = results.read(path)
        found = by_method(rows)
        for method, seeds in found.items():
            first = next(iter(seeds.values()))
            cells = [f"{path.stem}: {first['case']['epochs']} epochs of {first['train']:,}", TITLES[method]]
            for field in ("parameters", "parameters_at_the_end"):
                cells.append(f"{statistics.mean(row[field] for row in seeds.values()):,.0f}")
            cells += [
                f"{first['case']['rate']:g}",
                str(len(seeds)),
                _percent(*interval([r["accuracy"] for r in seeds.values()])),
            ]
            shared = [seed for seed in seeds if seed in found["lora"]]
            differences = [seeds[seed]["accuracy"] - found["lora"][seed]["accuracy"] for seed in shared]
            cells.append("" if method == "lora" else _percent(*interval(differences), sign="+"))
            lines.append(_cells(*cells))
        sources.append(_source(environment, path))
    return [*lines, "", *sources]


def by_method(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Return the reported runs of each method, by seed."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        if row["suite"] == "accuracy":
            found.setdefault(row["provider"], {})[row["case"]["seed"]] = row
    return {method: found[method] for method in TITLES if method in found}


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t over the values)."""
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values), half


def draw_accuracy() -> Any:
    """Plot each run, and the mean with its interval, a panel to a task."""
    from matplotlib.figure import Figure

    files = sorted(ACCURACY.glob("*.jsonl"))
    figure = Figure(figsize=(4 * len(files), 2.6), layout="constrained")
    for index, path in enumerate(files):
        axes = figure.add_subplot(1, len(files), index + 1)
        found = by_method(results.read(path)[1])
        for place, (method, marker) in enumerate(zip(found, "^os", strict=False)):
            values = [100 * row["accuracy"] for row in found[method].values()]
            mean, half = interval(values)
            height = len(found) - place
            axes.plot(values, [height] * len(values), marker, color="0.6", markersize=4, label=f"{method}, runs")
            axes.plot([mean - half, mean + half], [height - 0.2] * 2, "|-", color="0.0", label=f"{method}, interval")
            axes.plot([mean], [height - 0.2], marker, color="0.0", markersize=7, label=f"{method}, mean")
        axes.set_yticks(range(len(found), 0, -1), [TITLES[method] for method in found])
        axes.set(ylim=(0.4, len(found) + 0.5), xlabel="accuracy (%)", ylabel="method")
        axes.set_title(f"{path.stem}: runs, mean and 95 % interval", fontsize="medium", loc="left")
        axes.grid(axis="x", alpha=0.3)
    return figure


def compare_table(start: str, measure: str) -> list[str]:
    """One measure of the comparison: matrices by methods, mean and standard deviation over seeds."""
    matrices = compared()["matrices"]
    methods = list(dict.fromkeys(method for kind in matrices.values() for method in kind[start]))
    target = ["target"] if measure == "effective_rank" else []
    lines = [_cells("matrix", *target, *methods), "|---" + "|---:" * (len(methods) + len(target)) + "|"]
    for name, kind in matrices.items():
        cells = [kind["target"][measure] for _ in target] + [kind[start].get(m, {}).get(measure) for m in methods]
        lines.append(_cells(name, *("-" if c is None else _spread(c) for c in cells)))
    return lines


def statements_table() -> list[str]:
    """What the KRAdapter documents say of effective rank and error, and whether the fits from zero agree."""
    matrices = compared()["matrices"]
    zero = {name: kind["zero"] for name, kind in matrices.items()}

    def mean(name: str, method: str, measure: str) -> float:
        return float(zero[name][method][measure]["mean"])

    def less(one: str, other: str, measure: str, names: list[str]) -> list[str]:
        return [name for name in names if mean(name, one, measure) < mean(name, other, measure)]

    everywhere, flat = list(zero), [name for name in FLAT if name in zero]
    higher = less("lora", "kradapter", "effective_rank", everywhere)
    highest = [n for n in zero if mean(n, "kradapter", "effective_rank") == max(
        mean(n, m, "effective_rank") for m in PUBLISHED)]  # fmt: skip
    worst = [n for n in flat if mean(n, "lora", "nuclear_rms") == max(mean(n, m, "nuclear_rms") for m in PUBLISHED)]
    lower = less("kradapter", "lora", "nuclear_rms", everywhere)
    closer = less("kradapter", "lora", "frobenius", everywhere)
    high, low = (mean(f"{f}_frequency", "lora", "frobenius") for f in ("high", "low"))
    lora_best = [n for n in zero if mean(n, "lora", "frobenius") == min(mean(n, m, "frobenius") for m in PUBLISHED)]

    def order(name: str, measure: str) -> list[str]:
        return sorted(PUBLISHED, key=lambda method: mean(name, method, measure))

    wanted = {name: kind["target"]["effective_rank"]["mean"] for name, kind in matrices.items()}

    def nearer(name: str) -> bool:
        ours, lora = (abs(mean(name, m, "effective_rank") - wanted[name]) for m in ("kradapter", "lora"))
        return ours < lora

    near = [name for name in zero if nearer(name)]
    moved = [n for n in zero if order(n, "nuclear_rms") != order(n, "nuclear_mean_absolute")]
    lines = ["| stated | measured here, from zero | |", "|---|---|---|"]
    lines += [
        _cells(
            "KRAdapter's product tends to a high effective rank by construction (abstract)",
            f"above LoRA's on {_of(higher, everywhere)}; the highest of the five methods on {_of(highest, everywhere)}",
            _verdict(higher, everywhere),
        ),
        _cells(
            "not stated: whether that is the target's effective rank",
            f"nearer to it than LoRA's on {_of(near, everywhere)}",
            "",
        ),
        _cells(
            "LoRA struggles with relatively flat spectra (abstract)",
            f"its nuclear error (RMS) is the largest of the five on {_of(worst, flat)} of the flat ones",
            _verdict(worst, flat),
        ),
        _cells(
            "LoRA struggles with high frequencies (abstract)",
            f"its relative Frobenius error is {high:.3f} on high and {low:.3f} on low frequencies",
            "agrees" if high > low else "differs",
        ),
        _cells(
            "KRAdapter approximates better than LoRA (abstract)",
            f"smaller nuclear error (RMS) on {_of(lower, everywhere)}",
            _verdict(lower, everywhere),
        ),
        _cells(
            "the same by the loss that is trained",
            f"smaller Frobenius error on {_of(closer, everywhere)}; "
            f"LoRA has the smallest of the five on {_of(lora_best, everywhere)}",
            _verdict(closer, everywhere),
        ),
        _cells(
            "nuclear error is the RMS of the differences (README), their mean absolute value (script)",
            f"the two order the five methods differently on {_of(moved, everywhere)}",
            "agrees" if not moved else "differs",
        ),
    ]
    environment = json.loads((COMPARE / "environment.json").read_text())
    return [*lines, "", _source(environment, COMPARE / "experimental_results.json")]


def compared() -> dict[str, Any]:
    """Return the committed comparison."""
    content: dict[str, Any] = json.loads((COMPARE / "experimental_results.json").read_text())
    return content


def _verdict(found: list[str], among: list[str]) -> str:
    return "agrees" if len(found) == len(among) else "agrees in part" if found else "differs"


def _of(found: list[str], among: list[str]) -> str:
    missing = [name for name in among if name not in found]
    if not found or not missing:
        return f"{'all' if found else 'none'} of {len(among)}"
    few = found if len(found) <= len(missing) else missing
    word = "" if few is found else "not "
    return f"{len(found)} of {len(among)} ({word}{', '.join(few)})"


def _percent(mean: float, half: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f} %"


def _spread(cell: Row) -> str:
    return f"{cell['mean']:.4g} ± {cell['deviation']:.2g}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _source(environment: Row, path: Path) -> str:
    e, file = environment, path.relative_to(ROOT)
    threads = f"{e['threads']} thread{'s'[: e['threads'] > 1]}"
    versions = ", ".join(f"{name} {e['versions'][name]}" for name in ("torch", "transformers"))
    return f"{e['cpu']}, {threads}, {versions}; `{e['command']}`, {e['date']} ([{file}](../{file})).  "


TABLES: dict[str, Callable[[], list[str]]] = {
    "counts": counts_table,
    "accuracy": accuracy_table,
    "statements": statements_table,
    **{
        f"{start}-{measure}": (lambda start=start, measure=measure: compare_table(start, measure))
        for start in ("zero", "perturbed")
        for measure in ("effective_rank", "frobenius", "nuclear_rms")
    },
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    old = text = PAGE.read_text()
    for name, table in TABLES.items():
        content = "\n".join(line.rstrip() if not line.endswith(").  ") else line for line in table())
        pattern = rf"(<!-- {name}: written by tools/published.py -->\n).*?(\n<!-- end -->)"
        text, found = re.subn(pattern, lambda m, new=content: m[1] + new + m[2], text, flags=re.S)
        if found != 1:
            print(f"{PAGE.name}: expected one place for the table {name!r}, found {found}")
            return 1
    figure = draw_accuracy()
    picture = PLOTS / "accuracy.svg"
    if not args.check:
        PAGE.write_text(text)
        plots.save({"accuracy": figure}, PLOTS, ("svg",))
    elif text != old or not picture.exists() or plots.digest(figure) not in picture.read_text():
        print(f"{PAGE.name} or {picture.name} differs from the results; run python tools/published.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Pictures of results, readable in black and white; the same rows give the same files."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .layer import FORWARD, FORWARD_BACKWARD
from .results import Row

# Provider to what people call it, and to marker, line and colour; markers and lines tell them apart without colour too.
STYLES: dict[str, tuple[str, str, Any, str]] = {
    "linear": ("nn.Linear", "x", "-", "0.0"),
    "linear-compiled": ("nn.Linear, compiled", "x", ":", "0.4"),
    "cpu": ("adamss_kernels", "o", "-", "tab:blue"),
    "triton": ("adamss_kernels, Triton", "o", "-", "tab:blue"),
    "cuda": ("adamss_kernels, CUDA", "h", "-", "tab:cyan"),
    "ours": ("adamss_kernels", "o", "-", "tab:blue"),
    "reference": ("adamss_kernels, reference", "P", ":", "tab:purple"),
    "cpu-compiled": ("adamss_kernels, compiled", "p", (0, (5, 1, 1, 1)), "tab:cyan"),
    "half-pruned": ("adamss_kernels, half pruned", "v", ":", "tab:green"),
    "merged": ("adamss_kernels, merged", "+", "-", "tab:gray"),
    "peft-adamss": ("PEFT AdaMSS", "s", "--", "tab:red"),
    "peft-adamss-compiled": ("PEFT AdaMSS, compiled", "D", "-.", "tab:brown"),
    "peft-lora": ("PEFT LoRA r = 8", "^", (0, (3, 1)), "tab:orange"),
    "svd": ("SVD alone", "+", "-", "0.0"),
    "adamw": ("AdamW step", "1", "-", "0.0"),
}
_PASSES = (FORWARD, FORWARD_BACKWARD)
_VARIABLES = {
    "M": "tokens M",
    "D": "width D = N",
    "K": "subspaces K",
    "r": "rank r of a subspace",
    "layers": "number of layers",
}


def title(provider: str) -> str:
    """Return what a provider is called in pictures and tables."""
    return STYLES[provider][0] if provider in STYLES else provider


def draw(rows: Iterable[Row]) -> dict[str, Any]:
    """Return the figures that `rows` have data for, by name."""
    rows = list(rows)
    pictures: dict[str, Callable[[list[Row]], Any]] = {
        "ratio-by-tokens": _by_tokens,
        "ratio-by-subspaces": _by_subspaces,
        "ratio-by-width": _by_width,
        "memory": _memory,
        "roofline": _roofline,
        "cost": _cost,
    }
    figures = {name: picture(rows) for name, picture in pictures.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


def save(figures: dict[str, Any], directory: Path, formats: Sequence[str]) -> None:
    """Write each figure as `directory/name.format`; the same figures give the same files."""
    import matplotlib

    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "adamss_kernels", "svg.fonttype": "none"}):
        for name, figure in figures.items():
            for suffix in formats:
                metadata = {"Date": None, "Description": digest(figure)} if suffix == "svg" else None
                figure.savefig(directory / f"{name}.{suffix}", dpi=110, metadata=metadata)


def digest(figure: Any) -> str:
    """Return a hash of what a figure shows: titles, labels and the points of every line."""
    shown = [
        [
            [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()],
            [
                [line.get_label(), [f"{v:.4g}" for v in line.get_xdata()], [f"{v:.4g}" for v in line.get_ydata()]]
                for line in axes.lines
            ],
        ]
        for axes in figure.axes
    ]
    return "plotted data " + hashlib.sha256(json.dumps(shown).encode()).hexdigest()


def _by_tokens(rows: list[Row]) -> Any:
    chosen = _sweep(rows, "layer", "M")
    shapes = sorted({(r["case"]["D"], r["case"]["N"]) for r in chosen})
    panels = [
        (f"D = {D}, N = {N}: {which}", [r for r in chosen if _is(r, D=D, N=N) and r["case"]["pass"] == which])
        for which in _PASSES
        for D, N in shapes
    ]
    return _ratios(panels, "M", len(shapes))


def _by_subspaces(rows: list[Row]) -> Any:
    panels, columns = [], []
    for variable in ("K", "r"):
        chosen = _sweep(rows, "layer", variable)
        if chosen:
            columns.append((variable, _VARIABLES[variable], chosen))
    for which in _PASSES:
        for variable, name, chosen in columns:
            case = chosen[0]["case"]
            other = "r = {r}".format(**case) if variable == "K" else "K = {K}".format(**case)
            text = f"D = N = {case['D']}, M = {case['M']}, {other}: {which}"
            panels.append((text, [r for r in chosen if r["case"]["pass"] == which], variable, name))
    return _grid(panels, _ratio, "ratio to nn.Linear", len(columns)) if panels else None


def _by_width(rows: list[Row]) -> Any:
    chosen = _sweep(rows, "layer", "D")
    panels = [
        (f"M = {r['case']['M']}, K = {r['case']['K']}, r = {r['case']['r']}: {which}",
         [row for row in chosen if row["case"]["pass"] == which])
        for which in _PASSES
        for r in chosen[:1]
    ]  # fmt: skip
    return _ratios(panels, "D", 2)


def _memory(rows: list[Row]) -> Any:
    chosen = [r for r in _sweep(rows, "layer", "M") if r["case"]["pass"] == FORWARD_BACKWARD]
    shapes = sorted({(r["case"]["D"], r["case"]["N"]) for r in chosen})
    if not shapes:
        return None
    fields = (("peak_bytes", "peak"), ("saved_bytes", "kept for backward"))
    figure = None
    for index, (field, word) in enumerate(fields):
        panels = [
            (f"D = {D}, N = {N}: {word}",
             [r for r in chosen if _is(r, D=D, N=N) and (field == "peak_bytes" or r["provider"] != "linear")],
             "M", _VARIABLES["M"])
            for D, N in shapes
        ]  # fmt: skip
        figure = _grid(panels, functools.partial(_mebibytes, field), "MiB", len(shapes), figure, index, len(fields))
    return figure


def _mebibytes(field: str, row: Row) -> float:
    size: int = row[field]
    return size / 2**20


def _cost(rows: list[Row]) -> Any:
    panels = []
    for of, which in (("layer", FORWARD_BACKWARD), ("init", None), ("asa", "update")):
        for variable in ("layers", "D", "K", "r"):
            chosen = [r for r in _sweep(rows, of, variable) if r["case"].get("pass") == which]
            if chosen:
                word = {"layer": which, "init": "initialisation", "asa": "ASA update"}[of]
                fixed = {n: chosen[0]["case"].get(n) for n in ("layers", "D", "M", "K", "r") if n != variable}
                text = ", ".join(f"{n}={value}" for n, value in fixed.items() if value)
                panels.append((f"{word}\n{text}", chosen, variable, _VARIABLES[variable]))
    return _grid(panels, lambda r: r["seconds"]["median"] * 1e3, "milliseconds", 4) if panels else None


def _roofline(rows: list[Row]) -> Any:
    from matplotlib.figure import Figure

    kernels = [r for r in rows if r["suite"] in ("layer", "asa") and "flop_per_byte" in r]
    bounds = [r for r in rows if r["suite"] == "bound" and r["case"]["of"] == "layer"]
    peaks = {r["case"]["dtype"]: r["tflop_per_s"] for r in bounds if r["provider"] == "gemm"}
    dtypes = [dtype for dtype in peaks if any(_dtype(r) == dtype for r in kernels)]
    if not dtypes:
        return None
    figure = Figure(figsize=(3.5 + 4.2 * len(dtypes), 5), layout="constrained")
    handles: dict[str, Any] = {}
    for index, dtype in enumerate(dtypes):
        axes = figure.add_subplot(1, len(dtypes), index + 1)
        members = [r for r in kernels if _dtype(r) == dtype]
        span = (min(r["flop_per_byte"] for r in members) / 2, max(r["flop_per_byte"] for r in members) * 2)
        copies = {
            r["case"]["bytes"]: r["gb_per_s"] / 1e3 for r in bounds if r["provider"] == "copy" and _dtype(r) == dtype
        }
        for size, dash, word in ((min(copies), ":", "smallest"), (max(copies), "--", "largest")):
            slope = copies[size]
            corner = min(max(peaks[dtype] / slope, span[0]), span[1])
            x = [span[0], corner, span[1]]
            y = [min(slope * intensity, peaks[dtype]) for intensity in x]
            (handles[f"bound with the {word} copy ({size / 2**20:g} MiB)"],) = axes.plot(x, y, dash, color="0.2")
        for provider in dict.fromkeys(r["provider"] if r["suite"] == "layer" else "ASA update" for r in members):
            own = [r for r in members if provider == (r["provider"] if r["suite"] == "layer" else "ASA update")]
            word, marker, _, colour = STYLES.get(provider, (provider, "*", "", "black"))
            (handles[word],) = axes.plot(
                [r["flop_per_byte"] for r in own],
                [r["tflop_per_s"] for r in own],
                linestyle="none",
                marker=marker,
                color=colour,
                markerfacecolor="none",
                label=word,
            )
        axes.set(xscale="log", yscale="log")
        axes.set_title(f"{dtype}: GEMM {peaks[dtype]:.3g} TFLOP/s", fontsize="small")
        axes.set_xlabel("FLOP per byte of the bare layer's operands", fontsize="small")
        axes.set_ylabel("TFLOP/s of the bare layer's work", fontsize="small")
        _plain(axes.xaxis, *axes.get_xlim())
        _plain(axes.yaxis, *axes.get_ylim())
        axes.tick_params(labelsize="x-small")
        axes.grid(alpha=0.3)
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize="x-small")
    return figure


def _dtype(row: Row) -> str:
    # The averages of ASA are float32.
    dtype: str = row["case"].get("dtype", "float32")
    return dtype


def _sweep(rows: list[Row], of: str, variable: str) -> list[Row]:
    return [r for r in rows if r["suite"] == "scaling" and _is(r, of=of, sweep=variable)]


def _is(row: Row, **values: Any) -> bool:
    return all(row["case"].get(name) == value for name, value in values.items())


def _ratio(row: Row) -> float:
    ratio: float = row["ratio"]["median"]
    return ratio


def _ratios(panels: list[tuple[str, list[Row]]], variable: str, columns: int) -> Any:
    if not any(members for _, members in panels):
        return None
    named = [(text, members, variable, _VARIABLES[variable]) for text, members in panels]
    return _grid(named, _ratio, "ratio to nn.Linear", columns)


def _grid(
    panels: Sequence[tuple[str, list[Row], str, str]],
    value: Callable[[Row], float],
    label: str,
    columns: int,
    figure: Any = None,
    first_row: int = 0,
    total_rows: int | None = None,
) -> Any:
    """Draw one panel for each (title, rows, variable, label of its axis), one curve for each provider.

    Both axes are logarithmic; whiskers are quartiles where `value` is a ratio. With `figure`, rows of panels are added
    to it.
    """
    from matplotlib.figure import Figure

    lines = -(-len(panels) // columns)
    total = total_rows or lines
    figure = figure or Figure(figsize=(0.5 + 3.4 * columns, 0.6 + 2.7 * total), layout="constrained")
    # What panels that are there already show stays in the legend.
    handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    for index, (text, members, variable, name) in enumerate(panels):
        axes = figure.add_subplot(total, columns, first_row * columns + index + 1)
        for provider in dict.fromkeys(r["provider"] for r in members):
            points = sorted((r for r in members if r["provider"] == provider), key=lambda r: r["case"][variable])
            word, marker, dash, colour = STYLES.get(provider, (provider, "*", ":", "tab:olive"))
            x, y = [r["case"][variable] for r in points], [value(r) for r in points]
            (handles[word],) = axes.plot(
                x, y, linestyle=dash, marker=marker, color=colour, label=word, linewidth=1.2,
                # PEFT's around ours where they meet.
                markersize=7 if provider.startswith("peft") else 4,
                markerfacecolor="none" if provider.startswith("peft") else None,
            )  # fmt: skip
            if value is _ratio:
                axes.vlines(x, [r["ratio"]["low"] for r in points], [r["ratio"]["high"] for r in points], color=colour)
        _scale(axes, sorted({r["case"][variable] for r in members}))
        axes.set_title(text, fontsize="small")
        axes.set_xlabel(name, fontsize="small")
        axes.set_ylabel(label, fontsize="small")
    for old in figure.legends:
        old.remove()
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles), fontsize="small")
    return figure


def _scale(axes: Any, ticks: list[int]) -> None:
    """Logarithmic axes with the measured values as ticks, thinned out, and plain numbers on both."""
    from matplotlib.ticker import NullLocator

    axes.set(xscale="log", yscale="log")
    shown = ticks[:: max(1, -(-len(ticks) // 6))]
    axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    _plain(axes.yaxis, *axes.get_ylim())
    axes.tick_params(labelsize="x-small")
    axes.grid(alpha=0.3)


def _plain(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a logarithmic axis, the more to a decade the fewer decades there are."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    fine = (10, 11, 12, 13, 14, 15, 16, 18, 20, 22, 25, 28, 30, 35, 40, 45, 50, 60, 70, 80, 90)
    steps = ((2.5, fine), (8, (10, 12, 15, 20, 30, 40, 50, 70)), (200, (10, 20, 50)), (float("inf"), (10,)))
    tenths = next(tenths for widest, tenths in steps if high / low < widest)
    axis.set_major_locator(LogLocator(subs=[n / 10 for n in tenths], numticks=40))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

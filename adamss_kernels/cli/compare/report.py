"""What a comparison prints and draws."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

_TITLES = {
    "zero": "from zero: the update alone has to be the matrix",
    "perturbed": "from a perturbed base: the update has to undo noise of {noise:.0%} of the target's norm",
}
_MEASURES = {
    "frobenius": "relative Frobenius error",
    "nuclear_rms": "nuclear error, RMS",
    "nuclear_mean_absolute": "nuclear error, mean absolute",
    "effective_rank": "effective rank",
    "update_effective_rank": "effective rank of the update",
}
# Gray level and hatch of bars, line style of spectra: told apart without colour.
_LOOKS: dict[str, tuple[str, str, Any, str]] = {
    "lora": ("0.85", "", "-", "0.0"),
    "sinlora": ("1.0", "....", (0, (1, 1)), "0.35"),
    "randlora": ("0.7", "////", "--", "0.0"),
    "kronecker": ("1.0", "xxxx", "-.", "0.35"),
    "kradapter": ("0.15", "", (0, (5, 1, 1, 1, 1, 1)), "0.0"),
    "spectral_additive": ("1.0", "\\\\\\\\", ":", "0.0"),
    "spectral_rotational": ("0.5", "", "--", "0.6"),
    "adamss": ("1.0", "----", "-", "0.6"),
}

_TOP = 150
"""Per cent of LoRA's error at which bars are cut and say their height."""


def tables(results: dict[str, Any]) -> str:
    """Return a table for each start and measure, methods by matrices, and what the paper's claim comes to."""
    matrices = results["matrices"]
    lines = []
    for start, title in _TITLES.items():
        methods = list(dict.fromkeys(m for kind in matrices.values() for m in kind[start]))
        lines += ["", title.format(noise=results["settings"]["perturbation"])]
        header = "".join(f"{name:>20}" for name in matrices)
        lines += ["", f"{'parameters used':<32}{header}"]
        lines.append(f"  {'(budget)':<30}" + "".join(f"{kind['budget']:>20,}" for kind in matrices.values()))
        for method in methods:
            cells = (kind[start].get(method) for kind in matrices.values())
            lines.append(f"  {method:<30}" + "".join(f"{'-' if c is None else c['parameters']:>20,}" for c in cells))
        for measure, text in _MEASURES.items():
            if start == "zero" and measure == "update_effective_rank":
                continue
            lines += ["", f"{text:<32}{header}"]
            if measure == "effective_rank":
                lines.append(_row("target", [kind["target"][measure] for kind in matrices.values()]))
            for method in methods:
                lines.append(_row(method, [kind[start].get(method, {}).get(measure) for kind in matrices.values()]))
    if "random" in matrices:
        lines += ["", claim(matrices["random"])]
    return "\n".join(lines)


def _row(name: str, cells: list[dict[str, Any] | None]) -> str:
    texts = ("-" if c is None else f"{c['mean']:.4g} +- {c['deviation']:.2g}" for c in cells)
    return f"  {name:<30}" + "".join(f"{text:>20}" for text in texts)


def claim(random: dict[str, Any]) -> str:
    """Return whether KRAdapter's effective rank on the random matrix is above LoRA's, with the numbers."""
    ours, lora = random["zero"]["kradapter"], random["zero"]["lora"]
    a, b = ours["effective_rank"], lora["effective_rank"]
    verdict = (
        "above LoRA's, as its paper claims" if a["mean"] > b["mean"] else "NOT above LoRA's, unlike its paper's claim"
    )
    return (
        f"KRAdapter's effective rank on the random matrix is {verdict}: "
        f"{a['mean']:.4g} +- {a['deviation']:.2g} with {ours['parameters']:,} parameters, "
        f"{b['mean']:.4g} +- {b['deviation']:.2g} with {lora['parameters']:,}"
    )


def draw_comparison(path: Path, results: dict[str, Any]) -> None:
    """Plot each method's nuclear error as a share of LoRA's, from both starts."""
    from matplotlib.figure import Figure

    matrices = results["matrices"]
    width = max(8.0, 1.6 * len(matrices))
    figure = Figure(figsize=(width, 8), layout="constrained")
    rows = figure.subplots(2, 1)
    for axes, (start, title) in zip(rows, _TITLES.items(), strict=True):
        methods = [m for m in _LOOKS if any(m in kind[start] for kind in matrices.values())]
        step = 0.84 / len(methods)
        for index, method in enumerate(methods):
            gray, hatch, *_ = _LOOKS[method]
            heights, deviations = [], []
            for kind in matrices.values():
                lora = kind[start].get("lora", {}).get("nuclear_rms", {}).get("mean", math.nan)
                cell = kind[start].get(method, {}).get("nuclear_rms", {"mean": math.nan, "deviation": math.nan})
                heights.append(100 * cell["mean"] / lora if lora else math.nan)
                deviations.append(100 * cell["deviation"] / lora if lora else math.nan)
            places = [i + (index - (len(methods) - 1) / 2) * step for i in range(len(matrices))]
            style = {"color": gray, "hatch": hatch, "edgecolor": "black", "linewidth": 0.6}
            axes.bar(places, heights, step, yerr=deviations, capsize=1.5, label=method, error_kw={"lw": 0.7}, **style)
            for place, height in zip(places, heights, strict=True):
                if height > _TOP:
                    axes.text(place + step / 2, _TOP - 2, f" {height:.0f}", ha="left", va="top", fontsize="small")
        axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
        axes.set_xticks(range(len(matrices)), [name.replace("_", "\n") for name in matrices])
        axes.set(ylabel="nuclear error, RMS (% of LoRA's)", ylim=(0, _TOP))
        axes.set_title(title.format(noise=results["settings"]["perturbation"]), loc="left", fontsize="medium")
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=150)


def draw_spectra(path: Path, results: dict[str, Any]) -> None:
    """Plot the singular values of target and fits from zero, a panel to a matrix."""
    from matplotlib.figure import Figure

    matrices = results["matrices"]
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, kind) in zip(grid.flat, matrices.items(), strict=False):
        target = kind["target"]["singular_values"]
        floor = 1e-3 * target[0]
        axes.plot(_shown(target, floor), color="0.8", linewidth=5, label="target")
        for method, (_, _, line, gray) in _LOOKS.items():
            if method in kind["zero"]:
                values = _shown(kind["zero"][method]["singular_values"], floor)
                axes.plot(values, linestyle=line, color=gray, linewidth=1.3, label=method)
        axes.set(yscale="log", ylim=(floor, 2 * target[0]), xlabel="index", ylabel="singular value")
        axes.set_title(f"{name} ({kind['shape'][0]} x {kind['shape'][1]})", fontsize="medium")
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(matrices) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=150)


def _shown(values: list[float], floor: float) -> list[float]:
    """Replace what lies below the plot by NaN, which is not drawn."""
    return [value if value >= floor else math.nan for value in values]

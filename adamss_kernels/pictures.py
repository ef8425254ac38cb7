"""Pictures of what was trained; matplotlib is imported when one is drawn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def draw_history(
    path: str | os.PathLike[str],
    history: Sequence[tuple[int, int, Sequence[int]]],
    sizes: Mapping[str, int],
    begin: int,
    interval: int,
) -> None:
    """Draw the active subspaces of every layer over the events so far into an image file.

    Args:
        path: The file; its suffix says of which kind.
        history: Of a `SubspaceAllocator`: (step, budget, active subspaces of each layer after it).
        sizes: Subspaces of each layer before the first event, by its name.
        begin: Step from which the first state is drawn.
        interval: Steps for which the last state is drawn.

    Raises:
        ValueError: There has been no event yet.
        ImportError: matplotlib is missing (`pip install adamss-kernels[demo]`).
    """
    if not history:
        raise ValueError("plot: expected at least one event in the history, got none")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.2 * len(sizes)), layout="constrained")
    axes = figure.subplots()
    counts = [list(sizes.values()), *(counts for _, _, counts in history)]
    # The state between two events is a cell, which needs both of its ends; the last one is drawn one interval wide.
    steps = [min(begin, history[0][0] - 1), *(step for step, _, _ in history)]
    edges = [*steps, steps[-1] + interval]
    layers = [index - 0.5 for index in range(len(sizes) + 1)]
    mesh = axes.pcolormesh(edges, layers, list(zip(*counts, strict=True)), vmin=0, vmax=max(sizes.values()))
    axes.set_yticks(range(len(sizes)), list(sizes), fontsize="x-small")
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.set_title(f"{sum(counts[-1])} of {sum(sizes.values())} subspaces active after step {steps[-1]}")
    figure.colorbar(mesh, ax=axes, label="active subspaces")
    figure.savefig(path, dpi=150)

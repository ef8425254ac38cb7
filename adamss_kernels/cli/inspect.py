"""Show what is in an adapter: ours, PEFT's AdaMSS or LoRA, or a Trainer's checkpoint; or how two of them differ.

By layer: shape, rank of the basis, subspaces that train, are frozen and are pruned, the size of C, bytes by part; with
`--base` also the update relative to the weight. `--plot` draws which subspaces survived where.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import Contents, LayerContents, read_contents
from .base_model import load_base

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `inspect`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the adapter")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER", help="another one: show what differs")
    parser.add_argument("--base", metavar="MODEL_OR_FOLDER", help="the adapted model: adds the update relative to W")
    parser.add_argument("--model-class", help="class in transformers (default: the base config's first architecture)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="picture of the subspaces, by layer and projection")


def run(args: argparse.Namespace) -> int:
    """Print; the status is 1 where that cannot be done, and with two directories where they differ."""
    try:
        contents = read_contents(args.directory)
        if args.other is not None:
            changes = differences(contents, read_contents(args.other))
            print(json.dumps(changes, indent=2) if args.json else "\n".join(_changes_as_text(changes)))
            return int(bool(changes))
        base = load_base(args.base, args.model_class) if args.base else None
        report = describe(contents, base)
        if args.plot is not None:
            draw(contents, args.plot)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2) if args.json else _as_text(report))
    if args.plot is not None:
        print(f"drawn: {args.plot}", file=sys.stderr)
    return 0


def describe(contents: Contents, base: nn.Module | None = None) -> Row:
    """Return what `inspect` shows, as JSON-serialisable values.

    Args:
        contents: Of the adapter.
        base: The model that it adapts, for the update relative to each weight.

    Raises:
        ValueError: A layer is not in `base`, or has another shape there.
    """
    layers = [_row(name, layer, base) for name, layer in contents.layers.items()]
    parts: dict[str, int] = {}
    for layer in contents.layers.values():
        for part, count in layer.bytes.items():
            parts[part] = parts.get(part, 0) + count
    return {
        "file": str(contents.path),
        "kind": contents.kind,
        "layers": layers,
        "saved_modules": contents.saved,
        "totals": {
            "layers": len(layers),
            "subspaces": sum(row["K"] for row in layers),
            "trained": sum(row["trained"] for row in layers),
            "frozen": sum(row["frozen"] for row in layers),
            "pruned": sum(row["pruned"] for row in layers),
            "trained_numbers": sum(row["trained_numbers"] for row in layers),
            "bytes": parts,
            "file_bytes": contents.file_bytes,
        },
    }


def _row(name: str, layer: LayerContents, base: nn.Module | None) -> Row:
    linear = None if base is None else _linear(name, layer, base)
    row: Row = {
        "name": name,
        "method": layer.method,
        "shape": [layer.out_features, linear.in_features if linear is not None else layer.in_features],
        "R": layer.R,
        "K": len(layer.ranks),
        "ranks": list(layer.ranks),
        "trained": sum(layer.trainable),
        "frozen": sum(layer.active) - sum(layer.trainable),
        "pruned": len(layer.ranks) - sum(layer.active),
        "trained_numbers": layer.trained_numbers,
        "size": layer.size,
        "bytes": layer.bytes,
    }
    if linear is not None:
        norm = layer.update_norm(linear)
        row["relative_update"] = None if norm is None else norm / float(linear.weight.detach().double().norm())
    return row


def _linear(name: str, layer: LayerContents, base: nn.Module) -> nn.Linear:
    try:
        module = base.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{name}: the base has no such layer; is it the model that was adapted?") from None
    if not isinstance(module, nn.Linear) or module.out_features != layer.out_features:
        raise ValueError(f"{name}: expected a linear layer with {layer.out_features} outputs in the base, got {module}")
    return module


def differences(first: Contents, second: Contents) -> list[Row]:
    """Return what differs between two adapters: layers, shapes, ranks, masks and values, a row each."""
    rows: list[Row] = []
    for name in dict.fromkeys((*first.layers, *second.layers)):
        a, b = first.layers.get(name), second.layers.get(name)
        if a is None or b is None:
            rows.append({"layer": name, "what": "layer", "first": a is not None, "second": b is not None})
            continue
        for what in ("method", "out_features", "R", "ranks", "active", "trainable"):
            before, after = getattr(a, what), getattr(b, what)
            if before != after:
                rows.append({"layer": name, "what": what, "first": before, "second": after})
        for key in a.tensors.keys() & b.tensors.keys():
            change = _relative_change(a.tensors[key], b.tensors[key])
            if change:
                rows.append({"layer": name, "what": key, "relative_change": change})
    return rows


def _relative_change(a: Tensor, b: Tensor) -> float | None:
    if a.dtype == torch.bool or a.shape != b.shape or torch.equal(a, b):
        return None
    return float((b.double() - a.double()).norm() / a.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def _as_text(report: Row) -> str:
    has_update = any("relative_update" in row for row in report["layers"])
    head = ["layer", "shape", "R", "K", "ranks", "trained", "frozen", "pruned", "size of C", "bytes"]
    table = [head + (["update / W"] if has_update else [])]
    for row in report["layers"]:
        ranks = sorted(set(row["ranks"]))
        N, D = row["shape"]
        cells = [
            row["name"] if row["method"] == "adamss" else f"{row['name']} ({row['method']})",
            f"{N} x {D}",
            "" if row["R"] is None else str(row["R"]),
            str(row["K"]),
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            *(str(row[what]) for what in ("trained", "frozen", "pruned")),
            f"{row['size']:.4g}",
            f"{sum(row['bytes'].values()):,}",
        ]
        if has_update:
            update = row["relative_update"]
            cells.append("" if update is None else f"{update:.2%}")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{report['file']}: {report['kind']}", ""]
    for cells in table:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))  # noqa: B905
        lines.append("  ".join((first, *rest)).rstrip())
    totals = report["totals"]
    lines += [
        "",
        f"{totals['layers']} layers, {totals['subspaces']} subspaces: {totals['trained']} trained, "
        f"{totals['frozen']} frozen, {totals['pruned']} pruned; {totals['trained_numbers']:,} numbers train",
        f"{totals['file_bytes']:,} bytes: " + ", ".join(f"{part} {n:,}" for part, n in totals["bytes"].items()),
    ]
    if report["saved_modules"]:
        lines.append(
            "saved whole: " + ", ".join(f"{n} ({count:,} bytes)" for n, count in report["saved_modules"].items())
        )
    return "\n".join(lines)


def _changes_as_text(changes: list[Row]) -> list[str]:
    if not changes:
        return ["the same"]
    lines = []
    for row in changes:
        if "relative_change" in row:
            lines.append(f"{row['layer']}: {row['what']} differs by {row['relative_change']:.2g} (relative)")
        elif row["what"] == "layer":
            lines.append(f"{row['layer']}: only in the {'first' if row['first'] else 'second'}")
        else:
            lines.append(f"{row['layer']}: {row['what']} {_short(row['first'])} became {_short(row['second'])}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], bool):
        return f"{sum(value)} of {len(value)} [{''.join('x' if on else '.' for on in value)}]"
    return str(value)


_STATES = (("pruned", "0.88"), ("frozen", "tab:blue"), ("trained", "tab:orange"))
_HATCHES = {"frozen": "///"}


def draw(contents: Contents, path: Path) -> None:
    """Draw every subspace as a cell, by block of the model and projection, coloured by whether it survived.

    Args:
        contents: Of an AdaMSS adapter.
        path: Image file; its suffix says of which kind.

    Raises:
        ValueError: There is no AdaMSS layer.
        ImportError: matplotlib is missing.
    """
    layers = {name: layer for name, layer in contents.layers.items() if layer.method == "adamss"}
    if not layers:
        raise ValueError(f"{contents.path}: --plot: has no AdaMSS layer, and so no subspaces to draw")
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'adamss-kernels[demo]'") from error

    panels: dict[str, list[tuple[str, LayerContents]]] = {}
    for name, layer in layers.items():
        block = re.search(r"(?:^|\.)(\d+)\.", name)
        panels.setdefault(re.sub(r"(?:^|.*\.)\d+\.", "", name), []).append((block[1] if block else name, layer))
    tallest = max(map(len, panels.values()))
    widest = max(len(layer.ranks) for layer in layers.values())
    size = (1.2 + len(panels) * max(1.6, 0.16 * widest), 1.3 + 0.2 * tallest)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (projection, rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for y, (_, layer) in enumerate(rows):
            for k, (active, trained) in enumerate(zip(layer.active, layer.trainable, strict=True)):
                state, colour = _STATES[int(active) + int(trained)]
                cell = Rectangle((k + 0.06, y - 0.44), 0.88, 0.88, facecolor=colour, hatch=_HATCHES.get(state))
                cell.set_edgecolor("white")
                axes.add_patch(cell)
        axes.set_xlim(0, max(len(layer.ranks) for _, layer in rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize="x-small")
        axes.set_xticks([])
        axes.set_title(projection, fontsize="small")
        axes.set_xlabel("subspace", fontsize="small")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    figure.axes[0].set_ylabel("block", fontsize="small")
    counted = {state: 0 for state, _ in _STATES}
    for layer in layers.values():
        for active, trained in zip(layer.active, layer.trainable, strict=True):
            counted[_STATES[int(active) + int(trained)][0]] += 1
    key = [
        Patch(facecolor=colour, edgecolor="white", hatch=_HATCHES.get(state), label=f"{state} ({counted[state]})")
        for state, colour in reversed(_STATES)
        if counted[state]
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=len(key), fontsize="small", frameon=False)
    figure.savefig(path, dpi=160)

"""How cost grows with M, K, r, D and the number of layers, for layer, initialisation and ASA."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from . import asa, init, layer, providers
from .measure import Settings
from .results import Row

DEFAULTS = {"of": "layer", "sweep": "M", **layer.DEFAULTS}
_SUBJECTS = {"layer": layer, "init": init, "asa": asa}
# Subject and variable to what stays fixed, and the values: of the short run, and of the full one.
_LAYER, _CHAIN = {"M": 1024}, {"D": 128, "M": 256, "R": 32}
_SWEEPS: list[tuple[str, str, dict[str, Any], Sequence[int], Sequence[int]]] = [
    ("layer", "M", {"D": 384}, (16, 128, 1024, 4096), [2**n for n in range(4, 16)]),
    ("layer", "M", {"D": 768}, (16, 128, 1024, 4096), [2**n for n in range(4, 16)]),
    ("layer", "M", {"D": 1024, "N": 4096}, (16, 128, 1024), [2**n for n in range(4, 16)]),
    ("layer", "D", _LAYER, (256, 768, 2048), (128, 256, 384, 768, 1024, 1536, 2048, 3072, 4096)),
    ("layer", "K", _LAYER, (1, 8, 64), (1, 2, 4, 8, 16, 32, 64)),
    ("layer", "r", _LAYER, (1, 4, 16), (1, 2, 3, 4, 8, 12, 16)),
    ("layer", "layers", _CHAIN, (1, 8, 60), (1, 2, 6, 12, 24, 48, 96, 240, 480)),
    ("init", "D", {"layers": 1}, (256, 768, 2048), (128, 256, 512, 768, 1024, 2048, 4096)),
    ("init", "K", {"layers": 1}, (1, 8, 64), (1, 2, 4, 8, 16, 32, 64)),
    ("init", "r", {"layers": 1}, (1, 4, 16), (1, 2, 4, 8, 16)),
    ("init", "layers", {"D": 128, "R": 32}, (1, 6, 24), (1, 2, 6, 12, 24, 48, 96, 240, 480)),
    ("asa", "D", {"layers": 12}, (256, 768, 2048), (128, 256, 512, 768, 1024, 2048, 4096)),
    ("asa", "K", {"layers": 12, "D": 256}, (1, 8, 64), (1, 2, 4, 8, 16, 32, 64)),
    ("asa", "r", {"layers": 12, "D": 256}, (1, 4, 16), (1, 2, 4, 8, 16)),
    ("asa", "layers", {"D": 256}, (1, 8, 60), (1, 2, 6, 12, 24, 48, 96, 240, 480)),
]


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Measure one point of a sweep as its own suite does; by default the bare layer, ours and PEFT's AdaMSS."""
    subject = _SUBJECTS[case["of"]]
    rest = {name: value for name, value in case.items() if name not in ("of", "sweep")}
    if names is None and subject is layer:
        able = providers.defaults(settings.device, getattr(torch, case["dtype"]), settings.graph)
        # The first after the bare layer is the backend that "auto" takes.
        names = [name for name in able if name in (able[0], able[1], "peft-adamss")]
    extra = {"passes": ("update",)} if subject is asa else {}
    for row in subject.measure(rest, names, settings, **extra):
        yield {**row, "suite": "scaling", "case": {"of": case["of"], "sweep": case["sweep"], **row["case"]}}


def exponents(rows: Iterable[Row]) -> list[Row]:
    """Fit seconds = constant * variable ** exponent to every curve of a sweep.

    Least squares over the logarithms of the upper half of the points (at least two of them): overheads that do not
    grow hide the growth of what does in the lower half.

    Returns:
        One row for each curve: suite "exponent", the case without the variable, provider, exponent, and the range
        that it was fitted to.
    """
    curves: dict[str, tuple[Row, list[tuple[float, float]]]] = {}
    for row in rows:
        if row["suite"] != "scaling":
            continue
        case = fixed(row["case"])
        curve = curves.setdefault(f"{case} {row['provider']}", ({"case": case, "provider": row["provider"]}, []))
        curve[1].append((row["case"][case["sweep"]], row["seconds"]["median"]))
    fits = []
    for head, points in curves.values():
        points.sort()
        upper = points[min(len(points) // 2, len(points) - 2) :] if len(points) > 1 else []
        if upper:
            slope = _slope([(math.log(a), math.log(b)) for a, b in upper])
            fits.append({"suite": "exponent", **head, "exponent": slope, "range": [upper[0][0], upper[-1][0]]})
    return fits


def fixed(case: dict[str, Any]) -> dict[str, Any]:
    """Return what stays the same along a sweep: with D, N goes along where it is the same number."""
    moving = {case["sweep"]} | ({"N"} if case["sweep"] == "D" else set())
    return {name: value for name, value in case.items() if name not in moving}


def _slope(points: Sequence[tuple[float, float]]) -> float:
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open."""
    of, sweep = case.get("of", "layer"), case.get("sweep", "M")
    rest = {name: value for name, value in case.items() if name not in ("of", "sweep")}
    return {"of": of, "sweep": sweep, **_SUBJECTS[of].complete(rest)}


def cases(full: bool) -> list[dict[str, Any]]:
    """Return the points of all sweeps."""
    return [
        complete({"of": of, "sweep": sweep, **rest, sweep: value})
        for of, sweep, rest, short, long in _SWEEPS
        for value in (long if full else short)
    ]

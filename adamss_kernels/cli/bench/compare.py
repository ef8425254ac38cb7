"""Two runs against each other: what moved by more than their noise, and by more than matters.

Times are compared as ratios to the base of their own run, so that a faster machine is not a faster kernel. The noise of
a median over rounds is its bootstrap standard error, over blocks of rounds because neighbours are alike. A row has
moved where its interval, wide enough to hold for all rows at once with 99 % confidence, lies wholly outside of the band
of `threshold` around "unchanged": two runs of the same code differ by a little more than their rounds tell, in where
their memory lies for example. What is counted rather than timed (bytes, operators) has moved where it leaves that band.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .results import Row, key, read

_COUNTED = ("peak_bytes", "saved_bytes", "aten_calls")
_CONFIDENCE = 0.99
_RESAMPLES = 1000
# What numbers depend on besides the code.
_CONDITIONS = ("cpu", "gpu", "threads", "torch_isa", "cpu_library", "versions")


class Change(NamedTuple):
    """How one figure of one row changed: after / before, with the interval that is sure."""

    what: str
    factor: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return one line of the report."""
        return f"{self.what}: x {self.factor:.3f} [{self.low:.3f}, {self.high:.3f}]"


def report(before: Path, after: Path, threshold: float) -> int:
    """Print what moved from `before` to `after`, files or directories; the status is 1 where something got worse."""
    (old, old_rows), (new, new_rows) = read(before), read(after)
    for name in _CONDITIONS:
        if old.get(name) != new.get(name):
            print(f"note: {name} differs: {old.get(name)} before, {new.get(name)} after")
    known, measured = ({key(row): row for row in rows} for rows in (old_rows, new_rows))
    for name, rows, others in (("before", known, measured), ("after", measured, known)):
        alone = [row for row in rows if row not in others]
        if alone:
            print(f"note: {len(alone)} rows only {name}, such as {alone[0]!r}")
    found = changes(known, measured)
    if not found:
        print("nothing to compare: no row is in both")
        return 2
    worse = [change for change in found if change.low > 1 + threshold]
    better = [change for change in found if change.high < 1 / (1 + threshold)]
    for word, moved in (("worse", worse), ("better", better)):
        for change in sorted(moved, key=lambda change: change.factor, reverse=word == "worse"):
            print(f"{word}: {change}")
    print(f"{len(found)} figures compared: {len(worse)} worse, {len(better)} better, the rest within {threshold:.0%}")
    return int(bool(worse))


def changes(before: dict[str, Row], after: dict[str, Row]) -> list[Change]:
    """Return every figure that is in both runs, by the name of its row; bases, which are 1 by definition, left out."""
    shared = [name for name in before if name in after]
    timed = [n for n in shared if _is_timed(before[n]) and _is_timed(after[n])]
    # Bonferroni: the interval of each holds so surely that those of all do together.
    z = statistics.NormalDist().inv_cdf(1 - (1 - _CONFIDENCE) / 2 / max(1, len(timed)))
    found = []
    for name in timed:
        logs = [np.log(np.asarray(row["ratios"])) for row in (before[name], after[name])]
        change = float(np.median(logs[1]) - np.median(logs[0]))
        margin = _student(z, min(map(len, logs)) - 1) * math.hypot(*(_standard_error(log) for log in logs))
        found.append(Change(name, *(math.exp(value) for value in (change, change - margin, change + margin))))
    for name in shared:
        for field in _COUNTED:
            old, new = before[name].get(field), after[name].get(field)
            if old is not None and new is not None and (old or new):
                factor = new / old if old else math.inf
                found.append(Change(f"{name} {field}", factor, factor, factor))
    return found


def _is_timed(row: Row) -> bool:
    ratios: Sequence[float] = row.get("ratios", ())
    return any(ratio != 1 for ratio in ratios)


def _student(z: float, freedom: int) -> float:
    """Return about the quantile of Student's t where the normal one is `z`: few rounds do not know their own noise.

    The first terms of its expansion in 1 / `freedom` (Abramowitz and Stegun 26.7.5).
    """
    n = max(1, freedom)
    return z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)


def _standard_error(values: np.ndarray) -> float:
    """Return the standard error of the median of `values` (n,), from resampled blocks of about sqrt(n) neighbours.

    Half of the range that holds the middle 68 % of the resampled medians: a few wild ones do not count.
    """
    n = len(values)
    block = max(1, round(n**0.5))
    generator = np.random.default_rng(0)
    starts = generator.integers(0, n, size=(_RESAMPLES, -(-n // block), 1))
    resampled = values[(starts + np.arange(block)) % n].reshape(_RESAMPLES, -1)[:, :n]
    low, high = np.quantile(np.median(resampled, axis=1), (0.16, 0.84))
    return float(high - low) / 2

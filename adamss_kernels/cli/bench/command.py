"""The options of `adamss-kernels bench`, and what it prints and writes."""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...compiled.allocator import keep_freed_memory
from . import asa, bases, compare, decode, init, layer, memory, methods, mixed, model, results, scaling
from .bound import measure_bound
from .measure import Settings, pinned
from .providers import UnknownProviderError
from .results import Row

# Suite to its module and to the seconds for each group of contenders, in the short run and in the full one. A module
# has DEFAULTS (the fields of a case), `complete(case)`, `cases(full)` and `measure(case, providers, settings)`.
SUITES: dict[str, tuple[ModuleType, float, float]] = {
    "layer": (layer, 5, 20),
    "decode": (decode, 1.5, 10),
    "methods": (methods, 3, 20),
    "model": (model, 12, 60),
    "init": (init, 4, 20),
    "asa": (asa, 3, 10),
    "mixed": (mixed, 5, 20),
    "bases": (bases, 1.5, 10),
    "memory": (memory, 0, 0),
    "scaling": (scaling, 0.3, 2),
}

_NEEDS = {"model": "transformers", "bases": "bitsandbytes"}
"""What a suite cannot run without."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench`."""
    known = f"of {', '.join(SUITES)}; default all that can run"
    parser.add_argument("suites", nargs="*", type=_suite, metavar="SUITE", help=known)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16"), help="instead of the cases'")
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="FIELD=VALUE,...", help="cases, such as D=768,M=4096,K=10,r=3"
    )
    parser.add_argument("--providers", nargs="+", metavar="NAME", help="besides the base; default all that can run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write one file of JSON lines for each suite")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw what was measured, as PNG and SVG")
    parser.add_argument("--full", action="store_true", help="more cases, more rounds: an hour on two cores")
    parser.add_argument("--seconds", type=float, help="for each group of contenders; at least eight rounds are made")
    parser.add_argument("--threads", type=int, help="CPU threads, pinned to as many cores; default torch's number")
    parser.add_argument("--graph", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="compare two files or directories; 1 if B is slower"
    )
    parser.add_argument(
        "--threshold", type=float, default=0.1, help="what --compare ignores, relative (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, write and draw; or compare."""
    if args.compare:
        before, after = args.compare
        try:
            return compare.report(before, after, args.threshold)
        except ValueError as error:
            raise SystemExit(f"--compare: {error}") from error
    suites = args.suites or [name for name in SUITES if importlib.util.find_spec(_NEEDS.get(name, "torch"))]
    if args.shapes and len(suites) != 1:
        raise SystemExit("--shapes: expected one suite beside it, whose fields it names")
    device = torch.device(args.device)
    everything: list[Row] = []
    keeps_memory = keep_freed_memory()
    with pinned(args.threads or torch.get_num_threads()):
        for suite in suites:
            start = time.monotonic()
            environment = results.environment(device) | {"keeps_freed_memory": keeps_memory}
            file = args.out / f"{results.machine(device)}-{suite}.jsonl" if args.out else None
            rows: list[Row] = []
            try:
                for row in _printed(_rows(suite, args, device)):
                    rows.append(row)
            except UnknownProviderError as error:
                raise SystemExit(f"bench {suite}: --{error}") from None
            except KeyboardInterrupt:
                if file is not None and rows:
                    # Beside an earlier complete result, and not read with it.
                    partial = file.with_suffix(".jsonl.partial")
                    results.write(partial, environment, rows)
                    print(f"\nwhat was measured of {suite}: {partial}")
                raise
            everything += rows
            print(f"{suite}: {time.monotonic() - start:.0f} s\n", flush=True)
            if device.type == "cuda":
                environment["gpu_state_after"] = results.gpu_state()
            if file is not None:
                results.write(file, environment, rows)
    for fit in scaling.exponents(everything):
        print(f"{_exponent_text(fit)}")
    if args.plots:
        from . import plots

        plots.save(plots.draw(everything), args.plots, ("png", "svg"))
    return 0


def _rows(suite: str, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    module, short, long = SUITES[suite]
    seconds = args.seconds if args.seconds is not None else long if args.full else short
    settings = Settings(device, seconds, args.graph and suite in ("layer", "decode", "scaling"))
    cases = [module.complete(_known(shape, module, suite)) for shape in args.shapes or ()] or module.cases(args.full)
    if args.dtype:
        # Cases that differ in nothing else become one.
        cases = list({str(case): case for case in ({**case, "dtype": args.dtype} for case in cases)}.values())
    dtypes = []
    for case in cases:
        dtype = case.get("dtype", "float32")
        if module in (layer, decode, methods, scaling) and dtype not in dtypes:
            dtypes.append(dtype)
            yield from measure_bound(device, getattr(torch, dtype)).rows(suite, dtype)
        yield from module.measure(case, args.providers, settings)


def _printed(rows: Iterator[Row]) -> Iterator[Row]:
    """Print rows as they come, under a line for each case."""
    header = ""
    for row in rows:
        case = " ".join(f"{name}={value}" for name, value in row["case"].items())
        if f"{row['suite']} {case}" != header:
            header = f"{row['suite']} {case}"
            print(header)
        print(f"  {row['provider']:<22}{'  '.join(_cells(row))}", flush=True)
        yield row


def _cells(row: Row) -> Iterator[str]:
    if "ratio" in row:
        ratio = row["ratio"]
        yield f"{ratio['median']:6.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        yield f"{row['seconds']['median'] * 1e3:9.3f} ms"
    for field, unit in (("gb_per_s", "GB/s"), ("tflop_per_s", "TFLOP/s")):
        if field in row:
            yield f"{row[field]:7.3f} {unit}"
    if "bound_share" in row:
        yield f"{row['bound_share']:4.0%} of the bound (linear {row['linear_bound_share']:.0%})"
    for field, word in (("adapter_bytes", "an adapter"), ("file_bytes", "its compact file")):
        if row.get(field):
            yield f"{word} {row[field] / 1024:.4g} KiB"
    for field, word in (("peak_bytes", "peak"), ("saved_bytes", "saved")):
        if field in row:
            yield f"{word} {row[field] / 2**20:.4g} MiB"
    for field, word in (("aten_calls", "aten calls"), ("parameters", "parameters")):
        if field in row:
            yield f"{row[field]} {word}"


def _exponent_text(fit: Row) -> str:
    case, (low, high) = fit["case"], fit["range"]
    which = " ".join(f"{name}={value}" for name, value in case.items() if name not in ("of", "sweep"))
    return f"{case['of']} ~ {case['sweep']}^{fit['exponent']:.2f} for {low} to {high}: {fit['provider']}, {which}"


def _suite(text: str) -> str:
    if text not in SUITES:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(SUITES)}, got {text!r}")
    return text


def _shape(text: str) -> dict[str, Any]:
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and value for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE,..., got {text!r}")
    return {name: int(value) if value.isdecimal() else value for name, _, value in pairs}


def _known(shape: dict[str, Any], module: ModuleType, suite: str) -> dict[str, Any]:
    unknown = sorted(set(shape) - set(module.DEFAULTS))
    if unknown:
        raise SystemExit(
            f"--shapes: bench {suite} has no {unknown[0]!r}; expected some of {', '.join(module.DEFAULTS)}"
        )
    return shape

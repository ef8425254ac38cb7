"""The command `compare`: run every fit that is not done yet, then write results, tables and plots."""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ... import __version__
from ...atomic import replace_file
from ..bench.results import environment
from .fit import PERTURBATION, STARTS, budget, fit, setting
from .matrices import DRAWN, drawn_matrix, pretrained_matrices
from .metrics import effective_rank, errors, singular_values
from .report import draw_comparison, draw_spectra, tables

RESULTS = "experimental_results.json"
ENVIRONMENT = "environment.json"
SMALL = 256 * 256
"""Entries of a matrix up to which a second thread costs more than it brings."""


class Task(NamedTuple):
    """One fit: which method, from which start, to which draw of which matrix."""

    matrix: str
    seed: int
    start: str
    method: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `compare`."""
    parser.add_argument("--output", type=Path, default=Path("compare-output"), help="folder for results and plots")
    parser.add_argument("--size", type=_size, default=(128, 128), help="128 or 1024x768: rows x columns (default: 128)")
    parser.add_argument("--seeds", type=_positive, default=3, help="draws of each matrix and start (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--iterations", type=_positive, default=300, help="optimizer steps to a fit (default: 300)")
    parser.add_argument("--learning-rate", type=float, default=0.1, help="of AdamW, constant (default: 0.1)")
    parser.add_argument("--matrices", nargs="+", help="only these kinds of matrix (default: all there are)")
    parser.add_argument("--clip", type=Path, help="safetensors file of a CLIP model, for clip_language and clip_vision")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size as in 128 or 1024x768, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def run(args: argparse.Namespace) -> int:
    """Run the comparison, going on where a run with the same settings in the same folder was stopped."""
    conditions = environment()
    pretrained, skipped = pretrained_matrices(args.size, args.clip)
    names = [*DRAWN, *pretrained]
    if args.matrices is not None:
        if unknown := set(args.matrices) - set(names):
            raise SystemExit(
                f"--matrices: expected some of {names}, got {min(unknown)!r} ({skipped.get(min(unknown))})"
            )
        names, skipped = [name for name in names if name in args.matrices], {}
    if args.size[0] * args.size[1] <= SMALL:
        torch.set_num_threads(1)
    for name, reason in skipped.items():
        print(f"{name}: skipped, {reason}")

    settings = {
        "size": list(args.size),
        "seeds": list(range(args.seed, args.seed + args.seeds)),
        "iterations": args.iterations,
        "learning_rate": args.learning_rate,
        "perturbation": PERTURBATION,
        "versions": {"adamss_kernels": __version__, "torch": torch.__version__},
    }

    @functools.cache
    def target(name: str, seed: int) -> Tensor:
        return pretrained[name] if name in pretrained else drawn_matrix(name, args.size, seed)

    @functools.cache
    def spectrum(name: str, seed: int) -> Tensor:
        return singular_values(target(name, seed))

    # Fits are kept one by one until all are there. Other settings, or other weights, have other names.
    weights = {name: singular_values(pretrained[name]).tolist() for name in names if name in pretrained}
    digest = hashlib.sha256(json.dumps([settings, weights]).encode()).hexdigest()[:12]
    folder = args.output / "fits"
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[Task, dict[str, Any]] = {}
    with tqdm(list(_tasks(names, settings["seeds"], target)), desc="compare", unit="fit") as bar:
        for task in bar:
            bar.set_postfix_str(" ".join(map(str, task)))
            path = folder / f"{digest}-{'-'.join(map(str, task))}.json"
            if not path.exists():
                _write(path, _fitted(task, target(task.matrix, task.seed), spectrum(task.matrix, task.seed), args))
            done[task] = json.loads(path.read_text())

    results: dict[str, Any] = {"settings": settings, "skipped": skipped, "matrices": {}}
    for name in names:
        shape = target(name, args.seed).shape
        spectra = [spectrum(name, seed) for seed in settings["seeds"]]
        results["matrices"][name] = _summary(name, (shape[0], shape[1]), spectra, done)
    _write(args.output / RESULTS, results)
    _write(args.output / ENVIRONMENT, conditions)
    shutil.rmtree(folder)
    print(tables(results))
    print(f"\nresults: {args.output / RESULTS}")
    if importlib.util.find_spec("matplotlib") is None:
        print("plots: not drawn, matplotlib is missing")
        return 0
    draw_comparison(args.output / "peft_comparison.png", results)
    draw_spectra(args.output / "spectra.png", results)
    print(f"plots: {args.output}")
    return 0


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    replace_file(path, lambda scratch: scratch.write_text(text))


def _tasks(names: list[str], seeds: list[int], target: Any) -> Iterator[Task]:
    for name in names:
        shape = tuple(target(name, seeds[0]).shape)
        for seed in seeds:
            for start, methods in STARTS.items():
                yield from (Task(name, seed, start, m) for m in methods if setting(m, shape) is not None)


def _fitted(task: Task, target: Tensor, spectrum: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    start = torch.zeros_like(target)
    if task.start == "perturbed":
        noise = torch.randn(target.shape, generator=torch.Generator().manual_seed(task.seed))
        start = target + PERTURBATION * target.norm() / noise.norm() * noise
    matrix, used = fit(task.method, target, start, task.seed, args.iterations, args.learning_rate)
    values = singular_values(matrix)
    # From zero the update is the matrix.
    update = effective_rank(singular_values(matrix - start) if start.any() else values)
    measured = errors(matrix, target, values, spectrum) | {"update_effective_rank": update}
    return {"parameters": used, "singular_values": values.tolist(), **measured}


def _summary(
    name: str, shape: tuple[int, int], spectra: list[Tensor], done: dict[Task, dict[str, Any]]
) -> dict[str, Any]:
    """Return what one kind of matrix gave: its targets, and for each start and method every number over the seeds."""
    summary: dict[str, Any] = {
        "shape": list(shape),
        "budget": budget(shape),
        "target": {
            "effective_rank": _spread([effective_rank(values) for values in spectra]),
            "singular_values": _rounded(spectra[0].tolist()),
        },
    }
    for start, methods in STARTS.items():
        summary[start] = {}
        for method in methods:
            fits = [fitted for task, fitted in done.items() if task[0] == name and task[2:] == (start, method)]
            if not fits:
                continue
            numbers = [key for key, value in fits[0].items() if isinstance(value, float)]
            summary[start][method] = {
                "parameters": max(fitted["parameters"] for fitted in fits),
                "options": setting(method, shape),
                **{key: _spread([fitted[key] for fitted in fits]) for key in numbers},
                "singular_values": _rounded(fits[0]["singular_values"]),
            }
    return summary


def _spread(values: list[float]) -> dict[str, Any]:
    """Return the mean, the standard deviation (0 of one value) and the values, rounded to six digits."""
    t = torch.tensor(values, dtype=torch.float64)
    deviation = t.std().item() if len(values) > 1 else 0.0
    mean, deviation = _rounded([t.mean().item(), deviation])
    return {"mean": mean, "deviation": deviation, "values": _rounded(values)}


def _rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.6g}") for value in values]

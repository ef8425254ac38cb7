"""Initialisation of a stack of layers against the truncated SVD of each weight, which none can do without."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...config import AdaMSSConfig
from ...decompose import augmented
from ...model import adamss_layers, inject_adamss
from .measure import Contender, Settings, interleaved, summary
from .providers import chosen_providers
from .results import Row

BASE = "svd"
DEFAULTS = {"layers": 24, "D": 768, "N": None, "K": 10, "r": 1, "R": 100}


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Time how long each provider takes to adapt fresh copies of the same layers.

    Yields:
        One row for each provider: ratio to the SVD alone, seconds.

    Raises:
        RuntimeError: PEFT assigns rows to subspaces otherwise than we do.
    """
    torch.manual_seed(0)
    with settings.device:
        base = nn.ModuleDict({f"layer{i}": nn.Linear(case["D"], case["N"]) for i in range(case["layers"])})
    options = {"r": case["R"], "num_subspaces": case["K"], "subspace_rank": case["r"], "target_modules": list(base)}
    adapt: dict[str, Callable[[nn.ModuleDict], Any]] = {
        BASE: lambda model: [_svd(layer, case["R"]) for layer in model.values()],
        "ours": lambda model: inject_adamss(model, AdaMSSConfig(**options), progress=False),
    }
    if importlib.util.find_spec("peft"):
        import peft

        adapt["peft-adamss"] = lambda model: peft.inject_adapter_in_model(peft.AdamssConfig(**options), model)
        _check(adapt["ours"](copy.deepcopy(base)), adapt["peft-adamss"](copy.deepcopy(base)))
    chosen = chosen_providers(names, BASE, adapt)
    results = summary(interleaved({name: _contender(adapt[name], base) for name in chosen}, settings), BASE)
    for name in chosen:
        yield {"suite": "init", "case": case, "provider": name, **results[name]}


def _svd(layer: Any, R: int) -> object:
    matrix = augmented(layer.weight, layer.bias)
    return torch.svd_lowrank(matrix, q=min(R, *matrix.shape), niter=2)


def _contender(adapt: Callable[[nn.ModuleDict], Any], base: nn.ModuleDict) -> Contender:
    models: list[nn.ModuleDict] = []
    return Contender(lambda: adapt(models.pop()), lambda: models.append(copy.deepcopy(base)))


def _check(ours: nn.Module, theirs: Any) -> None:
    for name, layer in adamss_layers(ours).items():
        segments = theirs[name].seg_result["default"]
        if not all(torch.equal(layer.layout.rows(k).cpu(), segments[k].cpu()) for k in range(len(segments))):
            raise RuntimeError(f"{name}: the rows of the subspaces differ from PEFT's: nothing is timed")


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open; N is D unless given."""
    full = DEFAULTS | case
    return full | {"N": full["N"] or full["D"]}


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default."""
    return [complete({}), *([complete({"layers": 48, "D": 1024})] if full else [])]

"""One ASA update, and one with a pruning event, against the AdamW step that it follows.

The models are stacks of square linear layers that share one frozen weight and one clustering, since ASA sees only the
trainable matrices; those are separate. An update comes after an optimizer step, which leaves weights and gradients in
the caches: such a step precedes every timed update.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...asa import SubspaceAllocator
from ...config import AdaMSSConfig
from ...linear import FusedAdaMSSLinear
from .measure import Contender, Settings, interleaved, summary
from .providers import chosen_providers
from .results import Row

BASE = "adamw"
DEFAULTS = {"layers": 48, "D": 1024, "K": 10, "r": 1, "R": 100}
_ASA = {"init_warmup": 1, "final_warmup": 10**9, "asa_target_subspaces": 1, "use_asa": True}
# Optimizer steps between events: step 2 is one, or it is not.
PASSES = {"update": 10**9 - 1, "update with event": 1}
UPDATE_BYTES = 6 * 4
"""An update reads weight, gradient and both averages of each float32 element, and writes the averages."""
UPDATE_FLOPS = 8
"""Operations for each element: |w g|, its deviation, two averages."""


def measure(
    case: dict[str, Any], names: Sequence[str] | None, settings: Settings, passes: Sequence[str] = tuple(PASSES)
) -> Iterator[Row]:
    """Time one update of the allocator on a model whose parameters and gradients are random.

    Yields:
        One row for each pass and provider: ratio to a fused AdamW step on the same parameters, seconds; and of our
        updates without an event what they reach in GB/s.

    Raises:
        RuntimeError: After one update our averages are not what they are defined to be.
    """
    known = [BASE, "ours", *(["peft-adamss"] if importlib.util.find_spec("peft") else [])]
    chosen = chosen_providers(names, BASE, known)
    for direction in passes:
        contenders, elements = _contenders(chosen, case, PASSES[direction], settings.device)
        results = summary(interleaved(contenders, settings), BASE)
        for name in chosen:
            row = {"suite": "asa", "case": {"pass": direction, **case}, "provider": name, **results[name]}
            if name == "ours" and direction == "update":
                row["gb_per_s"] = UPDATE_BYTES * elements / results[name]["seconds"]["median"] / 1e9
                row["tflop_per_s"] = UPDATE_FLOPS * elements / results[name]["seconds"]["median"] / 1e12
                row["flop_per_byte"] = UPDATE_FLOPS / UPDATE_BYTES
            yield row


def _contenders(
    names: Sequence[str], case: dict[str, Any], interval: int, device: torch.device
) -> tuple[dict[str, Contender], int]:
    """Return the contenders, and how many elements the trainable matrices have."""
    model, allocator = _ours(case, interval, device)
    parameters = _fill_gradients(model)
    if interval > 2:
        _check(model, allocator)
    contenders = {BASE: Contender(_optimizer(parameters, fused=True).step)}
    if "ours" in names:
        contenders["ours"] = Contender(lambda: allocator.update_and_allocate(2), _optimizer(parameters).step)
    if "peft-adamss" in names:
        theirs = _peft(case, interval, device)
        update = theirs.base_model.update_and_allocate
        contenders["peft-adamss"] = Contender(lambda: update(2), _optimizer(_fill_gradients(theirs)).step)
    return contenders, sum(p.numel() for p in parameters)


def _ours(case: dict[str, Any], interval: int, device: torch.device) -> tuple[nn.Sequential, SubspaceAllocator]:
    config = AdaMSSConfig(**_options(case), mask_interval=interval)
    torch.manual_seed(0)
    layer = FusedAdaMSSLinear.from_linear(nn.Linear(case["D"], case["D"]).to(device), config)
    frozen = {id(p): p for p in (*layer.parameters(), *layer.buffers()) if not p.requires_grad}
    model = nn.Sequential(*(copy.deepcopy(layer, dict(frozen)) for _ in range(case["layers"])))
    for part in model:
        part.active, part.trainable = layer.active.clone(), layer.trainable.clone()
    return model, SubspaceAllocator(model, config)


def _peft(case: dict[str, Any], interval: int, device: torch.device) -> Any:
    import peft

    config = peft.AdamssConfig(**_options(case), mask_interval=interval, target_modules=["linear"])
    torch.manual_seed(0)
    linear = nn.Linear(case["D"], case["D"]).to(device)
    model = nn.Sequential(*(nn.ModuleDict({"linear": copy.deepcopy(linear)}) for _ in range(case["layers"])))
    return peft.get_peft_model(model, config)


def _options(case: dict[str, Any]) -> dict[str, Any]:
    return {"num_subspaces": case["K"], "subspace_rank": case["r"], "r": case["R"], **_ASA}


def _fill_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Give the trainable parameters of `model` random values and gradients, and return them."""
    torch.manual_seed(1)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)
    return trained


def _optimizer(parameters: list[nn.Parameter], fused: bool | None = None) -> torch.optim.Optimizer:
    """Return an AdamW that changes nothing, so that every repetition sees the same numbers."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=fused)


def _check(model: nn.Sequential, allocator: SubspaceAllocator) -> None:
    """Compare the averages after a first update, which start from zero, with their definition."""
    allocator.update_and_allocate(2)
    state, config = allocator.state_dict(), allocator.config
    betas = {"importance": config.asa_importance_beta, "uncertainty": config.asa_uncertainty_beta}
    for which, beta in betas.items():
        for name, got in state[which].items():
            p = model.get_parameter(name)
            if p.grad is None or not torch.allclose(got, (1 - beta) * (p * p.grad).abs(), rtol=1e-5, atol=1e-12):
                raise RuntimeError(f"{name}: the {which} after one update is not (1 - beta) |w g|: nothing is timed")


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open."""
    return DEFAULTS | case


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default."""
    return [complete({}), *([complete({"layers": 480})] if full else [])]

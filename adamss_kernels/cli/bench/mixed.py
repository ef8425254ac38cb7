"""A batch whose rows take different adapters, against the bare frozen `nn.Linear`: serving, and training many."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bank import AdapterBank
from ...config import AdaMSSConfig
from ...linear import FusedAdaMSSLinear
from .layer import FORWARD, FORWARD_BACKWARD
from .measure import Contender, Rotation, Settings, interleaved, summary
from .providers import chosen_providers
from .results import Row

BASE = "linear"
DEFAULTS = {"D": 768, "rows": 64, "tokens": 64, "adapters": 64, "K": 10, "r": 3, "R": 100, "dtype": "float32"}

# Prompts and decoding of 64 users, each with an adapter; eight runs in one batch.
CASES: list[dict[str, Any]] = [
    {},
    {"tokens": 1},
    {"D": 2048, "tokens": 1},
    {"r": 1},
    {"r": 1, "tokens": 1},
    {"D": 2048, "r": 1, "tokens": 1},
    {"rows": 8, "tokens": 512, "adapters": 8},
]


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Time the bare layer, a bank, one adapter for all rows, and PEFT's LoRA with `adapter_names`.

    Yields:
        One row for each pass and provider: ratio to the bare layer, seconds; of ours and LoRA also the bytes of an
        adapter's parameters, and of ours those of its compact file. PEFT mixes adapters in forward only.

    Raises:
        RuntimeError: A row of a batch does not get what its adapter alone gives; nothing is timed then.
    """
    device, dtype = settings.device, getattr(torch, case["dtype"])
    torch.manual_seed(0)
    linear = nn.Linear(case["D"], case["D"])
    nn.init.normal_(linear.weight, std=case["D"] ** -0.5)
    linear = linear.to(device, dtype).requires_grad_(False)
    wanted = [str(row % case["adapters"]) for row in range(case["rows"])]
    bank = _bank(linear, case)
    single = _single(bank)
    lora = _lora(linear, case["adapters"]) if importlib.util.find_spec("peft") else None
    calls: dict[str, Callable[[Tensor], Tensor]] = {BASE: linear, "ours": bank.model, "one adapter": single}
    if lora is not None:
        calls["peft-lora"] = lambda x: lora(x, adapter_names=wanted)
    chosen = chosen_providers(names, BASE, calls)
    shape = (case["rows"], case["tokens"], case["D"])
    _check(bank, linear, lora, wanted, torch.randn(shape, device=device).to(dtype))

    x = Rotation(lambda: torch.randn(shape, device=device).to(dtype).requires_grad_(), device)
    dy = Rotation(lambda: torch.randn(shape, device=device).to(dtype), device)
    trained = {
        BASE: [],
        "ours": [p for name in bank.names for p in bank.parameters(name)],
        "one adapter": [single.B, single.C],
    }
    used = {BASE: 0, "ours": _bytes(bank.parameters("0")), "one adapter": _bytes([single.B, single.C])}
    if lora is not None:
        used["peft-lora"] = _bytes([lora.lora_A["0"].weight, lora.lora_B["0"].weight])
    with bank.select(wanted):
        for direction in (FORWARD, FORWARD_BACKWARD):
            backward = direction == FORWARD_BACKWARD
            contenders = {
                name: Contender(_step(calls[name], x, dy, trained[name] if backward else None))
                for name in chosen
                if not (backward and name == "peft-lora")
            }
            for name, result in summary(interleaved(contenders, settings), BASE).items():
                row = {"suite": "mixed", "case": {"pass": direction, **case}, "provider": name, **result}
                row["adapter_bytes"] = used[name]
                if name == "ours":
                    row["file_bytes"] = _file_bytes(bank)
                yield row


def _bank(linear: nn.Linear, case: dict[str, Any]) -> AdapterBank:
    config = AdaMSSConfig(r=case["R"], num_subspaces=case["K"], subspace_rank=case["r"], target_modules=["0"])
    bank = AdapterBank(nn.Sequential(copy.copy(linear)))
    for i in range(case["adapters"]):
        bank.add(str(i), config)
        nn.init.normal_(bank.parameters(str(i))[1], std=0.02)
    return bank


def _single(bank: AdapterBank) -> FusedAdaMSSLinear:
    layer: Any = bank.model[0]  # type: ignore[index]
    single: FusedAdaMSSLinear = layer.take(0)
    return single


def _lora(linear: nn.Linear, count: int) -> Any:
    import peft

    model = nn.ModuleDict({"linear": copy.copy(linear)})
    for i in range(count):
        peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=["linear"]), model, adapter_name=str(i))
    layer: Any = model["linear"]
    for i in range(count):
        nn.init.normal_(layer.lora_B[str(i)].weight, std=0.02)
    return layer.eval()


def _step(
    call: Callable[[Tensor], Tensor], x: Iterator[Tensor], dy: Iterator[Tensor], trained: list[nn.Parameter] | None
) -> Callable[[], object]:
    """Return a forward without gradients, or one with backward to x and what is trained."""

    def forward() -> None:
        with torch.no_grad():
            call(next(x))

    def both() -> None:
        leaf = next(x)
        torch.autograd.grad(call(leaf), (leaf, *(trained or ())), next(dy))

    return forward if trained is None else both


@torch.no_grad()
def _check(bank: AdapterBank, linear: nn.Linear, lora: Any, wanted: list[str], x: Tensor) -> None:
    """Compare rows of a mixed batch with float64, which may be off by eight times what the bare layer is."""
    layer: Any = bank.model[0]  # type: ignore[index]
    rows = sorted({0, len(wanted) // 2, len(wanted) - 1})
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    limit = 8 * _difference(linear(x), exact) + torch.finfo(x.dtype).eps
    with bank.select(wanted):
        y = bank.model(x)
    mixed = {"ours": y} if lora is None else {"ours": y, "peft-lora": lora(x, adapter_names=wanted)}
    for provider, got in mixed.items():
        for row in rows:
            alone = layer.take(int(wanted[row]))
            delta = alone.delta_weight() if provider == "ours" else lora.get_delta_weight(wanted[row])
            expected = exact[row] + x[row].double() @ delta.double().T
            expected += alone.delta_bias() if provider == "ours" else 0
            error = _difference(got[row], expected)
            if not error <= limit:
                raise RuntimeError(f"{provider}: row {row} is off by {error:.2g}, expected at most {limit:.2g}")


def _difference(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def _bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def _file_bytes(bank: AdapterBank) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return bank.save("0", Path(folder), compact=True).stat().st_size


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open."""
    return DEFAULTS | case


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default; in full, also in bfloat16."""
    more = [{**case, "dtype": "bfloat16"} for case in CASES] if full else []
    return [complete(case) for case in (*CASES, *more)]

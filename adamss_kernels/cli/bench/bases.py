"""AdaMSS over layers that bitsandbytes has quantised, each against its own bare layer: forward, and with backward."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...bases import dense, require_base
from ...config import AdaMSSConfig
from ...over_base import adapt
from .layer import FORWARD, FORWARD_BACKWARD, check, forward, forward_backward
from .measure import Contender, Rotation, Settings, interleaved, relocate, summary
from .providers import Provider, chosen_providers
from .results import Row

BASE = "bare base"
DEFAULTS = {"base": "nf4", "D": 768, "N": None, "M": 512, "K": 10, "r": 3, "R": 100, "dtype": "float32"}

# One token and a batch, where the update is small beside the base product and where it is not.
CASES: list[dict[str, Any]] = [
    {"base": base, "D": D, "M": M, "dtype": dtype}
    for base in ("nf4", "int8")
    for D in (768, 4096)
    for dtype in ("float32", "bfloat16")
    for M in (1, 512)
]


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Time the bare quantised layer, ours over it and PEFT's LoRA over it, after checking what they compute.

    All of them train, also in the forward without gradients: in eval mode bitsandbytes' CPU kernels take weights and
    x rounded once more, which an adapted layer does not.

    Yields:
        One row for each pass and provider: ratio to the bare layer, seconds.

    Raises:
        RuntimeError: A provider computes something else than it should.
        ValueError: A provider or a base has another name.
    """
    # It warns in every call that it casts x.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    device, dtype, shape = settings.device, getattr(torch, case["dtype"]), (case["M"], case["D"], case["N"])
    built = _build(names, case, device)
    check(built, shape, dtype, device)
    x = Rotation(lambda: torch.randn(*shape[:2], device=device).to(dtype).requires_grad_(), device)
    dy = Rotation(lambda: torch.randn(shape[0], shape[2], device=device).to(dtype), device)
    between: list[Tensor] = []

    def move() -> None:
        between.extend(relocate(provider.layer for provider in built.values()))
        x.renew()
        dy.renew()

    for direction, call in ((FORWARD, forward), (FORWARD_BACKWARD, forward_backward)):
        contenders = {name: Contender(call(provider.layer, x, dy)) for name, provider in built.items()}
        for name, result in summary(interleaved(contenders, settings, move), BASE).items():
            yield {"suite": "bases", "case": {"pass": direction, **case}, "provider": name, **result}


def _build(names: Sequence[str] | None, case: dict[str, Any], device: torch.device) -> dict[str, Provider]:
    """Build the named providers around one frozen quantised layer."""
    torch.manual_seed(0)
    base = _quantised(case, device)
    weight, of_base = dense(base, require_base("base", base))
    assert of_base is not None
    W, bias = weight.double(), of_base.double()
    built = {BASE: _provider(base, (W, bias), (torch.zeros_like(W), torch.zeros_like(bias)), None)}
    known = {"ours": _ours} | ({"peft-lora": _lora} if importlib.util.find_spec("peft") else {})
    for name in chosen_providers(names, BASE, known)[1:]:
        layer, *update = known[name](base, case)
        built[name] = _provider(layer, (W, bias), update, 2)
    return built


def _provider(layer: nn.Module, frozen: Sequence[Tensor], update: Sequence[Tensor], degree: int | None) -> Provider:
    weight, bias = update
    acts_as = frozen[0] + weight, frozen[1] + bias
    return Provider(layer, lambda: acts_as, lambda: (weight, bias), degree)


def _quantised(case: dict[str, Any], device: torch.device) -> nn.Module:
    from bitsandbytes import nn as bnb

    dtype, size = getattr(torch, case["dtype"]), (case["D"], case["N"])
    layers = {
        "nf4": lambda: bnb.Linear4bit(*size, quant_type="nf4", compute_dtype=dtype),
        "int8": lambda: bnb.Linear8bitLt(*size, has_fp16_weights=False),
    }
    if case["base"] not in layers:
        raise ValueError(f"base: expected one of {sorted(layers)}, got {case['base']!r}")
    base: Any = layers[case["base"]]()
    nn.init.normal_(base.weight.data, std=case["D"] ** -0.5)
    # Quantised when it comes to its device.
    quantised: nn.Module = base.to(dtype).to(device).requires_grad_(False)
    return quantised


def _ours(base: nn.Module, case: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    layer = adapt("base", base, AdaMSSConfig(r=case["R"], num_subspaces=case["K"], subspace_rank=case["r"]))
    nn.init.normal_(layer.C, std=0.02)
    delta_bias = layer.delta_bias()
    assert delta_bias is not None
    return layer, layer.delta_weight().double(), delta_bias.double()


def _lora(base: nn.Module, case: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    import peft

    model = nn.ModuleDict({"linear": base})
    # As transformers marks a model that it has quantised.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = case["base"] == "nf4", case["base"] == "int8"
    lora: Any = peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=["linear"]), model)["linear"]
    nn.init.normal_(lora.lora_B["default"].weight, std=0.02)
    delta = lora.get_delta_weight("default").detach().double()
    return lora, delta, delta.new_zeros(case["N"])


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open; N is D unless given."""
    full = DEFAULTS | case
    return full | {"N": full["N"] or full["D"]}


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured."""
    return [complete(case) for case in CASES]

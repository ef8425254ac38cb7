"""One training step of a BERT-shaped encoder, adapted in every linear layer, against the same model all frozen."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...config import AdaMSSConfig
from ...model import inject_adamss
from .measure import Contender, Settings, interleaved, summary
from .providers import chosen_providers
from .results import Row

BASE = "frozen"
DEFAULTS = {"layers": 6, "width": 384, "ffn": 1536, "batch": 16, "tokens": 64, "K": 10, "r": 1, "dtype": "float32"}
_TARGETS = ["query", "key", "value", "dense"]


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Time forward, backward and AdamW of the encoder under each provider, x requiring grad.

    Yields:
        One row for each provider: ratio to the frozen model, seconds, trained parameters.

    Raises:
        RuntimeError: transformers is missing, or a freshly adapted model is not the frozen one.
    """
    torch.manual_seed(0)
    base = _encoder(case).to(settings.device, getattr(torch, case["dtype"])).requires_grad_(False)
    options = {"r": 100, "num_subspaces": case["K"], "subspace_rank": case["r"], "target_modules": _TARGETS}
    adapt: dict[str, Callable[[nn.Module], nn.Module]] = {
        BASE: lambda model: model,
        "ours": lambda model: inject_adamss(model, AdaMSSConfig(**options), progress=False),
    }
    if importlib.util.find_spec("peft"):
        import peft

        lora = peft.LoraConfig(r=8, target_modules=_TARGETS)
        adapt["peft-adamss"] = lambda model: peft.inject_adapter_in_model(peft.AdamssConfig(**options), model)
        adapt["peft-lora"] = lambda model: peft.inject_adapter_in_model(lora, model)
    chosen = chosen_providers(names, BASE, adapt)
    models = {name: adapt[name](copy.deepcopy(base)) for name in chosen}

    shape = (case["batch"], case["tokens"], case["width"])
    x = torch.randn(shape, device=settings.device, dtype=getattr(torch, case["dtype"]), requires_grad=True)
    _check(models, x)
    results = summary(interleaved({n: Contender(_step(m, x)) for n, m in models.items()}, settings), BASE)
    for name, model in models.items():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        yield {"suite": "model", "case": case, "provider": name, **results[name], "parameters": trained}


def _encoder(case: dict[str, Any]) -> nn.Module:
    """Return a post-norm transformer encoder whose linear layers are all plain `nn.Linear`s."""
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise RuntimeError(f"bench model needs transformers (pip install adamss-kernels[bench]): {error}") from error
    config = BertConfig(
        vocab_size=32,
        hidden_size=case["width"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["width"] // 64 or 1,
        intermediate_size=case["ffn"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False).encoder


def _step(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Fused: the plain one takes its time for each of many small parameters, whatever layer they belong to.
    optimizer = torch.optim.AdamW(parameters, fused=True) if parameters else None

    def run() -> None:
        model(x).last_hidden_state.square().mean().backward()
        x.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return run


@torch.no_grad()
def _check(models: dict[str, nn.Module], x: torch.Tensor) -> None:
    """Compare outputs before training, when every adapter is still the identity."""
    expected = models[BASE](x).last_hidden_state.float()
    for name, model in models.items():
        error = float((model(x).last_hidden_state.float() - expected).norm() / expected.norm())
        limit = 16 * torch.finfo(x.dtype).eps
        if not error <= limit:
            raise RuntimeError(f"{name}: the output is off by {error:.2g}, expected at most {limit:.2g}")


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open."""
    return DEFAULTS | case


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default."""
    return [complete({}), *([complete({"dtype": "bfloat16"})] if full else [])]

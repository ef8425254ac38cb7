"""Who is compared, all around one frozen weight: the bare layer, ours by backend, the related methods, PEFT's."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...adapters import METHODS
from ...config import BACKENDS, AdaMSSConfig
from ...linear import FusedAdaMSSLinear
from ...ops import choose_backend, implementation

_COMPILED = "-compiled"
_PEFT = ("peft-adamss", "peft-lora")
# Products of two factors; the other methods are not polynomials of their parameters.
_BILINEAR = ("lora", "randlora", "kronecker", "kradapter")


class Provider(NamedTuple):
    """A layer, and what it should compute.

    Attributes:
        layer: What is called.
        acts_as: Returns the weight (N, D) and bias (N,) of the plain linear layer that it equals.
        update: Returns the part of both that comes from its trainable parameters.
        degree: The update is a homogeneous polynomial of this degree in them; None where it is not.
    """

    layer: nn.Module
    acts_as: Callable[[], tuple[Tensor, Tensor]]
    update: Callable[[], tuple[Tensor, Tensor]]
    degree: int | None


def defaults(device: torch.device, dtype: torch.dtype, graph: bool = False) -> list[str]:
    """Return the providers that can run: the bare layer, every backend, both compiled, ours pruned and merged, PEFT's.

    With `graph`, those that a CUDA graph can hold: PEFT's AdaMSS copies an index from the host in each forward.
    """
    backends = [name for name in BACKENDS if implementation(name).why_unavailable(device.type, dtype) is None]
    ours = choose_backend("auto", device, dtype)
    backends.sort(key=lambda name: name != ours)
    peft = [*_PEFT, f"{_PEFT[0]}{_COMPILED}"] if importlib.util.find_spec("peft") else []
    peft = [name for name in peft if not (graph and name.startswith(_PEFT[0]))]
    return ["linear", *backends, "linear" + _COMPILED, ours + _COMPILED, "half-pruned", "merged", *peft]


def build(names: Sequence[str], case: dict[str, Any], device: torch.device) -> dict[str, Provider]:
    """Build the named providers around one frozen `nn.Linear`; AdaMSS ones have the same trained update.

    Args:
        names: "linear", a backend, "half-pruned", "merged", a key of `METHODS`, "peft-adamss", "peft-lora"; with
            "-compiled" behind it, the same under `torch.compile`.
        case: D, N, K, r (rank of a subspace), R (of the basis) and dtype.
        device: Where the layers are.

    Raises:
        ValueError: A name is none of these.
    """
    if any(name.endswith(_COMPILED) for name in names):
        # Otherwise they run into dynamo's recompilation limit and go eager.
        torch._dynamo.reset()
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    linear = nn.Linear(case["D"], case["N"])
    # Outputs as large as inputs, so that chains of layers neither vanish nor explode.
    nn.init.normal_(linear.weight, std=case["D"] ** -0.5)
    linear = linear.to(device, dtype).requires_grad_(False)
    config = AdaMSSConfig(r=case["R"], num_subspaces=case["K"], subspace_rank=case["r"])
    ours = FusedAdaMSSLinear.from_linear(linear, config)
    nn.init.normal_(ours.C, std=0.02)
    built = {}
    for name in names:
        plain = name.removesuffix(_COMPILED)
        provider = _provider(plain, linear, ours)
        built[name] = provider if name == plain else provider._replace(layer=_compiled(provider.layer))
    return built


def _provider(name: str, linear: nn.Linear, ours: FusedAdaMSSLinear) -> Provider:
    if name == "linear":
        return _checked(linear, linear, lambda: torch.zeros_like(linear.weight), None, None)
    if name == "merged":
        return _checked(ours.to_linear().requires_grad_(False), linear, ours.delta_weight, ours.delta_bias, None)
    if name in (*BACKENDS, "half-pruned"):
        # The frozen weight is shared: copies would compete for the cache.
        frozen = {id(t): t for t in (linear.weight, linear.bias)}
        layer = copy.deepcopy(ours, dict(frozen))
        if name == "half-pruned":
            layer.active[::2] = False
        else:
            layer.config = dataclasses.replace(ours.config, backend=name)
        return _checked(layer, linear, layer.delta_weight, layer.delta_bias, 2)
    if name in METHODS:
        adapter = METHODS[name].from_linear(linear)
        for parameter in (p for p in adapter.parameters() if p.requires_grad):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
        return _checked(adapter, linear, adapter.delta_weight, None, 2 if name in _BILINEAR else None)
    if name == "peft-adamss":
        config = ours.config
        adamss = _peft(linear, "AdamssConfig", r=config.r, num_subspaces=config.num_subspaces,
                       subspace_rank=config.subspace_rank)  # fmt: skip
        B, C = ours.layout.unpack(ours.B.data, ours.C.data)
        for parameters, values in ((adamss.adamss_A["default"], B), (adamss.adamss_B["default"], C)):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.data.copy_(value)
        return _checked(adamss, linear, ours.delta_weight, ours.delta_bias, 2)
    if name == "peft-lora":
        lora = _peft(linear, "LoraConfig", r=8)
        nn.init.normal_(lora.lora_B["default"].weight, std=0.02)
        return _checked(lora, linear, lambda: lora.get_delta_weight("default"), None, 2)
    expected = ["linear", *BACKENDS, "half-pruned", "merged", *METHODS, *_PEFT]
    raise UnknownProviderError(
        f"providers: expected some of {expected}, {_COMPILED!r} behind them or not, got {name!r}"
    )


class UnknownProviderError(ValueError):
    """A suite was asked to measure what it does not know, or cannot for want of a library."""


def chosen_providers(names: Sequence[str] | None, base: str, known: Iterable[str]) -> list[str]:
    """Return `base` and then those of `names` that are not it, by default all that are `known`.

    Raises:
        UnknownProviderError: One of `names` is neither.
    """
    known = [base, *(name for name in known if name != base)]
    for name in names or ():
        if name not in known:
            raise UnknownProviderError(f"providers: expected some of {known}, got {name!r}")
    return [base, *(name for name in names or known if name != base)]


def _peft(linear: nn.Linear, config: str, **options: object) -> Any:
    import peft

    model = nn.ModuleDict({"linear": linear})
    return peft.inject_adapter_in_model(getattr(peft, config)(target_modules=["linear"], **options), model)["linear"]


def _compiled(layer: nn.Module) -> nn.Module:
    compiled: Any = torch.compile(layer)
    return compiled


def _checked(
    layer: nn.Module,
    linear: nn.Linear,
    delta_weight: Callable[[], Tensor],
    delta_bias: Callable[[], Tensor | None] | None,
    degree: int | None,
) -> Provider:
    @torch.no_grad()
    def update() -> tuple[Tensor, Tensor]:
        bias = None if delta_bias is None else delta_bias()
        return delta_weight().double(), torch.zeros_like(linear.bias).double() if bias is None else bias.double()

    def acts_as() -> tuple[Tensor, Tensor]:
        delta, delta_b = update()
        return linear.weight.double() + delta, linear.bias.double() + delta_b

    return Provider(layer, acts_as, update, degree)

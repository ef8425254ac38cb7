"""One layer, or a chain of them, against the bare frozen `nn.Linear`: forward, and forward with backward."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...linear import FusedAdaMSSLinear
from . import providers
from .bound import Bound, linear_work, measure_bound, update_work
from .measure import Contender, Rotation, Settings, interleaved, relocate, summary
from .probe import probe
from .providers import Provider
from .results import Row

BASE = "linear"
DEFAULTS = {"D": 768, "N": None, "M": 4096, "K": 10, "r": 1, "R": 100, "layers": 1, "dtype": "float32"}
FORWARD, FORWARD_BACKWARD = "forward", "forward + backward"

# BERT- and Llama-sized layers, long and short batches.
CASES: list[dict[str, Any]] = [
    {"D": 768, "M": 4096, "r": 3},
    {"D": 768, "M": 512},
    {"D": 384, "M": 512},
    {"D": 1024, "N": 4096, "M": 2048},
    {"D": 4096, "M": 512, "r": 3},
    {"D": 768, "M": 4096, "r": 3, "dtype": "bfloat16"},
]


def measure(case: dict[str, Any], names: Sequence[str] | None, settings: Settings) -> Iterator[Row]:
    """Time the named providers (None: all that can run) on one case, after checking what they compute.

    Yields:
        One row for each pass and provider: ratio to the bare layer, seconds, GB/s and TFLOP/s of the bare layer's work,
        shares of the machine's bound, bytes and operators.

    Raises:
        RuntimeError: A provider computes something else than it should.
    """
    device, dtype = settings.device, getattr(torch, case["dtype"])
    names = [BASE, *(name for name in names or providers.defaults(device, dtype, settings.graph) if name != BASE)]
    built = providers.build(names, case, device)
    shape = (case["M"], case["D"], case["N"])
    check(built, shape, dtype, device)
    layers = {name: _chain(provider.layer, case["layers"]) for name, provider in built.items()}
    bound = measure_bound(device, dtype)

    x = Rotation(lambda: torch.randn(*shape[:2], device=device).to(dtype).requires_grad_(), device)
    dy = Rotation(lambda: torch.randn(shape[0], shape[2], device=device).to(dtype), device)
    between: list[Tensor] = []

    def move() -> None:
        between.extend(relocate(layers.values()))
        x.renew()
        dy.renew()

    for direction, call in ((FORWARD, forward), (FORWARD_BACKWARD, forward_backward)):
        contenders = {name: Contender(call(layer, x, dy)) for name, layer in layers.items()}
        results = summary(interleaved(contenders, settings, move), BASE)
        flops, moved = linear_work(case["D"], case["N"], case["M"], dtype.itemsize, direction == FORWARD_BACKWARD)
        least = bound.seconds(flops * case["layers"], moved * case["layers"])
        for name, layer in layers.items():
            seconds = results[name]["seconds"]["median"]
            extra = _least_seconds(built[name].layer, case, bound, direction == FORWARD_BACKWARD)
            yield {
                "suite": "layer",
                "case": {"pass": direction, **case},
                "provider": name,
                **results[name],
                "gb_per_s": moved * case["layers"] / seconds / 1e9,
                "tflop_per_s": flops * case["layers"] / seconds / 1e12,
                "flop_per_byte": flops / moved,
                "bound_share": least / seconds,
                "linear_bound_share": least / results[BASE]["seconds"]["median"],
                "least_ratio": 1 + extra / results[BASE]["seconds"]["median"] if extra else None,
                **probe(layer, next(x), next(dy), direction == FORWARD_BACKWARD),
                "parameters": sum(p.numel() for p in layer.parameters() if p.requires_grad),
            }


def _least_seconds(layer: nn.Module, case: dict[str, Any], bound: Bound, backward: bool) -> float | None:
    """Return what the work of an AdaMSS update costs at the machine's bound; None for other layers."""
    if not isinstance(layer, FusedAdaMSSLinear):
        return None
    ranks = [r_k * active for r_k, active in zip(layer.layout.ranks, layer.active.tolist(), strict=True)]
    entries = sum(n_k * r_k for n_k, r_k in zip(layer.layout.sizes, ranks, strict=True))
    work = update_work(case, sum(ranks), entries, layer.weight.element_size(), backward)
    return bound.seconds(*work) * case["layers"]


def forward(layer: nn.Module, x: Iterator[Tensor], dy: Iterator[Tensor]) -> Callable[[], object]:
    """Return a forward without gradients."""

    @torch.no_grad()
    def run() -> None:
        layer(next(x))

    return run


def forward_backward(layer: nn.Module, x: Iterator[Tensor], dy: Iterator[Tensor]) -> Callable[[], object]:
    """Return a forward and backward with x requiring grad; gradients are dropped as an optimizer step would."""
    trained = [p for p in layer.parameters() if p.requires_grad]

    def run() -> None:
        leaf = next(x)
        torch.autograd.grad(layer(leaf), (leaf, *trained), next(dy))

    return run


def check(built: dict[str, Provider], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    """Compare y and dx of every provider, and its parameters' gradients, with float64.

    y and dx may be off by eight times what the bare layer, the first, is off by, plus one rounding. For the gradients,
    Euler's theorem: an update that is homogeneous of degree n in the parameters p has sum <p, dp> = n <dy, update(x)>.

    Raises:
        RuntimeError: A provider is further off; nothing is to be timed then.
    """
    M, D, N = shape
    x, dy = torch.randn(M, D, device=device).to(dtype), torch.randn(M, N, device=device).to(dtype)
    rows = torch.linspace(0, M - 1, min(M, 128), device=device).long()
    x64, dy64 = x.double(), dy.double()
    outer, total = dy64.T @ x64, dy64.sum(0)
    eps = torch.finfo(dtype).eps
    limit = 0.0
    for name, provider in built.items():
        W, b = provider.acts_as()
        leaf = x.detach().clone().requires_grad_()
        trained = [p for p in provider.layer.parameters() if p.requires_grad]
        y = provider.layer(leaf)
        dx, *grads = torch.autograd.grad(y, (leaf, *trained), dy)
        errors = [_difference(y[rows], x64[rows] @ W.T + b), _difference(dx[rows], dy64[rows] @ W)]
        limit = limit or 8 * max(errors) + eps
        if not max(errors) <= limit:
            raise RuntimeError(f"{name}: y and dx are off by {errors}, expected at most {limit:.2g}: nothing is timed")
        if provider.degree is not None:
            pairs = [(p.detach().double(), g.double()) for p, g in zip(trained, grads, strict=True)]
            weight, bias = provider.update()
            expected = provider.degree * ((outer * weight).sum() + (total * bias).sum())
            got = sum(((p * g).sum() for p, g in pairs), start=expected.new_zeros(()))
            scale = sum((p.norm() * g.norm() for p, g in pairs), start=expected.new_zeros(()))
            if not abs(got - expected) <= limit * scale:
                raise RuntimeError(f"{name}: <p, dp> is {got:.6g}, expected {expected:.6g}: nothing is timed")


def _difference(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact).norm() / exact.norm())


def _chain(layer: nn.Module, length: int) -> nn.Module:
    """Return `length` independent copies one after the other; one is the layer itself."""
    return layer if length == 1 else nn.Sequential(*(copy.deepcopy(layer) for _ in range(length)))


def complete(case: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a case leaves open; N is D unless given."""
    full = DEFAULTS | case
    return full | {"N": full["N"] or full["D"]}


def cases(full: bool) -> list[dict[str, Any]]:
    """Return what is measured by default; in full, also the first shapes on one token and in bfloat16."""
    more = [{"D": 768, "M": 1}, {"D": 4096, "M": 1}, *({**case, "dtype": "bfloat16"} for case in CASES[1:5])]
    return [complete(case) for case in itertools.chain(CASES, more if full else ())]

"""The related methods with the options that tests try, and their updates as they are published."""

from __future__ import annotations

import torch
from torch import Tensor

from adamss_kernels.adapters import METHODS, AdapterLinear

VARIANTS = [
    *((method, {}) for method in METHODS),
    ("lora", {"rank": 3, "alpha": 6.0}),
    ("sinlora", {"rank": 2, "omega": 3.0, "alpha": 0.7, "learn_sine": True}),
    ("randlora", {"rank": 2}),
    ("randlora", {"rank": 4, "num_bases": 3, "scaling": 0.5, "basis_seed": 5}),
    ("kronecker", {"rank": 3}),
    ("kronecker", {"rank": 2, "rank_in": 5}),
    ("kronecker", {"rank": 1}),
    ("kradapter", {"scaling": 1.0}),
    ("spectral_additive", {"rank": 3, "window": "bottom"}),
    ("spectral_rotational", {"rank": 3, "window": "bottom"}),
]


IDS = [method + "".join(f"-{key}={value}" for key, value in options.items()) for method, options in VARIANTS]


def update_parameters(layer: AdapterLinear) -> dict[str, Tensor]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def move(layer: AdapterLinear, seed: int = 0) -> AdapterLinear:
    """Move all parameters, as training would: at initialisation the update hides errors."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in update_parameters(layer).values():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.3 * noise.to(parameter.dtype))
    return layer


def cayley(R: Tensor) -> Tensor:
    K = (R - R.T) / 2
    identity = torch.eye(len(R), dtype=R.dtype)
    return (identity - K) @ torch.linalg.inv(identity + K)


def naive_update(layer: AdapterLinear, p: dict[str, Tensor]) -> Tensor:
    """dW of the published formulas, in the dtype of p; of a Spectral Adapter for the singular columns it has."""
    o, (N, D), dtype = layer.options, (layer.out_features, layer.in_features), next(iter(p.values())).dtype
    b = {name: t.to(dtype) for name, t in layer.named_buffers() if t.is_floating_point()}
    if layer.method == "lora":
        return o["alpha"] / o["rank"] * p["B"] @ p["A"]
    if layer.method == "sinlora":
        return p.get("alpha", o["alpha"]) * torch.sin(p.get("omega", o["omega"]) * (p["B"] @ p["A"]))
    if layer.method == "randlora":
        update = torch.zeros(max(N, D), min(N, D), dtype=dtype)
        for k in range(len(p["A"])):
            update = update + b["basis_a"][k] @ torch.diag(p["A"][k]) @ b["basis_b"] @ torch.diag(p["B"][k])
        return o["scaling"] * (update if N >= D else update.T)
    if layer.method == "kronecker":
        product = torch.kron(p["A"], p["B"])
        assert product.shape[0] >= N
        assert product.shape[1] >= D
        return product[:N, :D]
    if layer.method == "kradapter":
        r = p["u"].shape[1]
        c = torch.arange(max(N, D))
        update = p["v"][:, c // r] * p["u"][:, c % r]
        return o["scaling"] * (update if N <= D else update.T)
    U1, S1, V1 = b["U1"], b["S1"], b["V1"]
    if layer.method == "spectral_additive":
        # The published difference, in which the large terms have cancelled.
        return p["dU"] @ torch.diag(S1) @ (V1 + p["dV"]).T + U1 @ torch.diag(S1) @ p["dV"].T
    core = cayley(p["R_A"]) @ torch.diag(S1 * p["c"]) @ cayley(p["R_B"]).T - torch.diag(S1)
    return U1 @ core @ V1.T

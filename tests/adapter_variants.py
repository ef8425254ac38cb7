"""The related methods with the options that tests try."""

from __future__ import annotations

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

"""`inject_adapter`: replace the targeted linear layers of a model by those of any related method."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..bases import dense, require_base
from ..config import AdaMSSConfig
from ..frozen_linear import LAYERS_BY_METHOD, LAYERS_OVER_BASE
from ..model import replace_targets
from .kradapter import KRAdapterLinear
from .kronecker import KroneckerLinear
from .layer import AdapterLinear
from .lora import LoRALinear
from .over_base import METHODS_OVER_BASE
from .randlora import RandLoRALinear
from .sinlora import SinLoRALinear
from .spectral_additive import SpectralAdditiveLinear
from .spectral_rotational import SpectralRotationalLinear

METHODS: dict[str, type[AdapterLinear]] = {
    layer.method: layer
    for layer in (
        LoRALinear,
        SinLoRALinear,
        RandLoRALinear,
        KroneckerLinear,
        KRAdapterLinear,
        SpectralAdditiveLinear,
        SpectralRotationalLinear,
    )
}
"""Name of each method and the layer that has it; AdaMSS itself is `FusedAdaMSSLinear`."""
LAYERS_BY_METHOD.update(METHODS)
LAYERS_OVER_BASE.update(METHODS_OVER_BASE)


def inject_adapter(
    model: nn.Module,
    method: str,
    target_modules: str | list[str] | tuple[str, ...] | None = None,
    *,
    modules_to_save: list[str] | tuple[str, ...] | None = None,
    progress: bool = True,
    **options: Any,
) -> nn.Module:
    """Replace the targeted linear layers by layers of `method` and freeze everything else.

    As `inject_adamss` does: the update of every adapted layer and all parameters under `modules_to_save` train, a
    module with several names is wrapped once, and either all targets are replaced or none. Bases of other libraries are
    those that `inject_adamss` takes. They go on computing their own product, to which x dW^T is added; nothing is kept
    of a dequantised weight but, by the Spectral Adapters, the singular columns that they tune.

    Args:
        model: Changed in place.
        method: A key of `METHODS`.
        target_modules: Name suffixes, or one regular expression matched against full names; None takes every
            linear layer outside `modules_to_save`.
        modules_to_save: Name suffixes of modules that are trained in full and saved with the adapter.
        progress: Show a progress bar with layer names and remaining time.
        **options: Settings of the method, the same for every layer: see its class.

    Returns:
        `model` itself.

    Raises:
        ValueError: The method is unknown, an option is outside its domain, a pattern matches nothing, or `model` is
            itself the linear layer.
        TypeError: The method has no such option, or a target cannot be adapted. The message names the layer.
    """
    if method not in METHODS:
        advice = "; AdaMSS itself is inject_adamss" if str(method).lower() == "adamss" else ""
        raise ValueError(f"method: expected one of {tuple(METHODS)}, got {method!r}{advice}")
    known = [
        name for name, p in inspect.signature(METHODS[method].__init__).parameters.items() if p.kind is p.KEYWORD_ONLY
    ]
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(f"method {method!r}: unexpected keyword argument {unknown[0]!r}, expected some of {known}")
    choice = AdaMSSConfig(target_modules=target_modules, modules_to_save=modules_to_save)

    def build(base: nn.Module, name: str) -> AdapterLinear:
        kind, own = require_base(name, base), base._parameters
        layer: AdapterLinear
        try:
            if kind is None:
                layer = METHODS[method](own["weight"], own["bias"], **options)  # type: ignore[arg-type]
            else:
                layer = METHODS_OVER_BASE[method](base, kind, dense(base, kind)[0], **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        layer.modules_to_save = tuple(choice.modules_to_save or ())
        return layer

    replace_targets(model, choice, build, title=f"{method} init", progress=progress)
    return model

"""Which linear layers of a model a config means."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from .bases import is_base, require_base
from .config import AdaMSSConfig
from .frozen_linear import FrozenLinear
from .offload import is_offloaded


def modules_named(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules that a config's `modules_to_save` names.

    Raises:
        ValueError: A name matches no module.
    """
    found: dict[str, nn.Module] = {}
    for suffix in names:
        matches = {name: m for name, m in model.named_modules() if _ends_in(name, suffix)}
        if not matches:
            top = [name for name, _ in model.named_children()]
            raise ValueError(f"modules_to_save: {suffix!r} matches no module; top-level modules are {top}")
        found.update(matches)
    return found


def target_linears(model: nn.Module, config: AdaMSSConfig) -> dict[str, nn.Module]:
    """Return the linear layers to replace under every name they are registered by.

    Those are plain `nn.Linear`s and the layers of other libraries that `bases.py` knows.

    Raises:
        ValueError: There is none, and the message lists candidates; or one has its weight elsewhere.
        TypeError: One that is meant by name cannot be adapted.

    Warns:
        UserWarning: Without `target_modules`, layers that are linear in name but cannot be adapted are passed over; and
            so are the experts of a mixture whose weights are one three-dimensional parameter, wherever they are meant;
            or a name in `target_modules` is of no layer that is adapted.
    """
    excluded = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in config.modules_to_save or ()]
    targets: dict[str, nn.Module] = {}
    passed_over: dict[str, str] = {}
    experts: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(pattern.match(name) for pattern in excluded):
            continue
        experts += [
            parameter
            for parameter in _expert_weights(name, module)
            if (config.target_modules is None or _matches(name, config) or _matches(parameter, config))
            and _in_layers(parameter, config)
        ]
        if not name:
            continue
        if config.target_modules is None:
            if not is_base(name, module):
                kind = type(module).__name__
                is_leaf = next(module.children(), None) is None
                if is_leaf and ("Linear" in kind or kind == "Conv1D") and not isinstance(module, FrozenLinear):
                    passed_over[name] = kind
                continue
        elif not _matches(name, config) or next(_expert_weights(name, module), None):
            continue
        if not _in_layers(name, config):
            continue
        require_base(name, module)
        targets[name] = module
    if not targets:
        candidates = _ends(model, excluded)
        kind = " as a regular expression for whole names" if isinstance(config.target_modules, str) else ""
        kind += f" outside modules_to_save={config.modules_to_save}" if config.modules_to_save else ""
        advice = ""
        if config.target_modules == "all-linear":
            advice = "; target_modules=None takes them all"
        elif config.target_modules in candidates:
            advice = f"; for all that end so: target_modules=[{config.target_modules!r}]"
        kind += f" ({_said_of(experts)})" if experts else ""
        raise ValueError(
            f"target_modules={config.target_modules!r} (layers_to_transform={config.layers_to_transform!r}) matches "
            f"no linear layer{kind}; names of linear layers in this model end in {candidates}{advice}"
        )
    if isinstance(config.target_modules, tuple):
        unmatched = [end for end in config.target_modules if not any(_ends_in(name, end) for name in targets)]
        if unmatched:
            warnings.warn(
                f"target_modules: {unmatched} match no linear layer that is adapted ({len(targets)} are); names "
                f"of linear layers in this model end in {_ends(model, excluded)}",
                stacklevel=4,
            )
    _require_weights(model, targets)
    if passed_over:
        kinds = ", ".join(sorted(set(passed_over.values())))
        warnings.warn(
            f"target_modules=None passes over {len(passed_over)} layers that cannot be adapted ({kinds}), such as "
            f"{min(passed_over)!r}; {len(targets)} are adapted",
            stacklevel=4,
        )
    if experts:
        warnings.warn(f"passing over {_said_of(experts)}; {len(targets)} layers are adapted", stacklevel=4)
    return targets


def _ends(model: nn.Module, excluded: list[re.Pattern[str]]) -> list[str]:
    """Return how the names of the linear layers of `model` end, but for those that `excluded` match."""
    names = [name for name, module in model.named_modules() if name and is_base(name, module)]
    return sorted({name.rsplit(".", 1)[-1] for name in names if not any(pattern.match(name) for pattern in excluded)})


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


def _expert_weights(name: str, module: nn.Module) -> Iterator[str]:
    """Yield the names of the parameters in which a module holds the weights of all experts of a mixture."""
    if "expert" in type(module).__name__.lower() or "expert" in name.rpartition(".")[2].lower():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and min(parameter.shape) > 1:
                yield f"{name}.{key}" if name else key


def _said_of(experts: list[str]) -> str:
    return (
        f"{len(experts)} weights of experts that are three-dimensional parameters, not layers, such as {min(experts)!r}"
    )


def _require_weights(model: nn.Module, targets: dict[str, nn.Module]) -> None:
    """Raise where a target's weight is on the meta device though the model has weights: nothing could be decomposed."""
    if all(parameter.is_meta for parameter in model.parameters()) and not any(map(is_offloaded, targets.values())):
        return
    for name, module in targets.items():
        on_meta = any(parameter is not None and parameter.is_meta for parameter in module._parameters.values())
        if on_meta and not is_offloaded(module):
            raise ValueError(
                f"{name}: the base weight is on the meta device: it was never loaded, or a module around it brings it. "
                "Adapt the model before it is dispatched (accelerate.dispatch_model), or load it with a device_map and "
                "max_memory that put every adapted layer on a device"
            )


def _matches(name: str, config: AdaMSSConfig) -> bool:
    patterns = config.target_modules
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(_ends_in(name, suffix) for suffix in patterns or ())


def _in_layers(name: str, config: AdaMSSConfig) -> bool:
    """Whether `name` lies in one of `layers_to_transform`; its layer index is the first number after a list's name."""
    if config.layers_to_transform is None:
        return True
    for pattern in config.layers_pattern or (r"[^.]*",):
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1)) in config.layers_to_transform  # type: ignore[operator]
    return False

"""Which linear layers of a model a config means."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable

from torch import nn

from .config import AdaMSSConfig
from .frozen_linear import FrozenLinear, plain_linear


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


def target_linears(model: nn.Module, config: AdaMSSConfig) -> dict[str, nn.Linear]:
    """Return the linear layers to replace under every name they are registered by.

    Raises:
        ValueError: There is none; the message lists candidates.
        TypeError: One that is meant by name cannot be adapted.

    Warns:
        UserWarning: Without `target_modules`, layers that are linear in name but no `nn.Linear` are passed over; or a
            name among them is of no layer that is adapted.
    """
    excluded = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in config.modules_to_save or ()]
    targets: dict[str, nn.Linear] = {}
    passed_over: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(pattern.match(name) for pattern in excluded):
            continue
        if config.target_modules is None:
            if type(module) is not nn.Linear:
                kind = type(module).__name__
                is_leaf = next(module.children(), None) is None
                if is_leaf and ("Linear" in kind or kind == "Conv1D") and not isinstance(module, FrozenLinear):
                    passed_over[name] = kind
                continue
        elif not _matches(name, config):
            continue
        if not _in_layers(name, config):
            continue
        targets[name] = plain_linear(name, module)
    if not targets:
        candidates = _ends(model, excluded)
        kind = " as a regular expression for whole names" if isinstance(config.target_modules, str) else ""
        kind += f" outside modules_to_save={config.modules_to_save}" if config.modules_to_save else ""
        advice = ""
        if config.target_modules == "all-linear":
            advice = "; target_modules=None takes them all"
        elif config.target_modules in candidates:
            advice = f"; for all that end so: target_modules=[{config.target_modules!r}]"
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
    if passed_over:
        kinds = ", ".join(sorted(set(passed_over.values())))
        warnings.warn(
            f"target_modules=None passes over {len(passed_over)} layers that are no torch.nn.Linear itself ({kinds}), "
            f"such as {min(passed_over)!r}; {len(targets)} are adapted",
            stacklevel=4,
        )
    return targets


def _ends(model: nn.Module, excluded: list[re.Pattern[str]]) -> list[str]:
    """Return how the names of the linear layers of `model` end, but for those that `excluded` match."""
    names = [name for name, module in model.named_modules() if name and type(module) is nn.Linear]
    return sorted({name.rsplit(".", 1)[-1] for name in names if not any(pattern.match(name) for pattern in excluded)})


def _ends_in(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)


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

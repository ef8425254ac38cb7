"""`inject_adamss`: replace the targeted linear layers of a model in place, all or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from torch import nn

from .config import AdaMSSConfig
from .decompose import decompose
from .frozen_linear import FrozenLinear
from .linear import FusedAdaMSSLinear


def inject_adamss(model: nn.Module, config: AdaMSSConfig, *, progress: bool = True) -> nn.Module:
    """Replace the targeted `nn.Linear`s by `FusedAdaMSSLinear` and freeze everything else.

    Trainable afterwards: B and C of every adapted layer, and all parameters under `config.modules_to_save`. A module
    that is registered under several names is wrapped once and stays shared. Either all targets are replaced or, when
    an error is raised, none.

    Args:
        model: Changed in place.
        config: Hyperparameters; `target_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` choose
            the layers, as in PEFT.
        progress: Show a progress bar with layer names and remaining time (initialisation runs an SVD per layer).

    Returns:
        `model` itself.

    Raises:
        ValueError: A pattern matches nothing, or `model` is itself the linear layer.
        TypeError: A target is not exactly an `nn.Linear`, so that its forward cannot be replaced safely.
    """

    def build(linear: nn.Linear, name: str) -> FusedAdaMSSLinear:
        decomposition = decompose(linear.weight, linear.bias, config, name=name)
        return FusedAdaMSSLinear(linear.weight, linear.bias, decomposition, config)

    replace_targets(model, config, build, title="AdaMSS init", progress=progress)
    return model


def replace_targets(
    model: nn.Module,
    choice: AdaMSSConfig,
    build: Callable[[nn.Linear, str], FrozenLinear],
    *,
    title: str,
    progress: bool,
) -> None:
    """Replace the linear layers that `choice` targets by what `build(linear, name)` makes of each, all or none.

    `build` shares the parameters of the linear layer and leaves them as they are. Raises as `inject_adamss` does.
    """
    from tqdm.auto import tqdm

    if isinstance(model, nn.Linear):
        raise ValueError("model: is itself an nn.Linear, which cannot be replaced in place; use from_linear")
    saved = modules_to_save(model, choice.modules_to_save or ())
    targets = _targets(model, choice)

    layers: dict[nn.Linear, FrozenLinear] = {}
    with tqdm(targets.items(), desc=title, unit="layer", disable=not progress) as bar:
        for name, linear in bar:
            bar.set_postfix_str(name)
            if linear not in layers:
                layers[linear] = build(linear, name).train(linear.training)
    replace_modules(model, {name: layers[linear] for name, linear in targets.items()}, saved.values())


def replace_modules(model: nn.Module, layers: dict[str, FrozenLinear], saved: Iterable[nn.Module]) -> None:
    """Put `layers` in place under their names, then train their updates and the `saved` modules and nothing else."""
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    model.requires_grad_(False)
    for layer in layers.values():
        layer.train_update()
    for module in saved:
        module.requires_grad_(True)


def modules_to_save(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules that a config's `modules_to_save` names.

    Raises:
        ValueError: A name matches no module.
    """
    found: dict[str, nn.Module] = {}
    for suffix in names:
        matches = {name: m for name, m in model.named_modules() if name == suffix or name.endswith("." + suffix)}
        if not matches:
            top = [name for name, _ in model.named_children()]
            raise ValueError(f"modules_to_save: {suffix!r} matches no module; top-level modules are {top}")
        found.update(matches)
    return found


def adapted_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """Return the layers of any method in `model` by name, each once, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def adamss_layers(model: nn.Module) -> dict[str, FusedAdaMSSLinear]:
    """Return the adapted layers of `model` by name, each once, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedAdaMSSLinear)}


def unwrap(model: nn.Module) -> nn.Module:
    """Look through DDP (`module`) and `torch.compile` (`_orig_mod`), whose prefixes are not part of layer names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _targets(model: nn.Module, config: AdaMSSConfig) -> dict[str, nn.Linear]:
    """Return the linear layers to replace under every name they are registered by."""
    excluded = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in config.modules_to_save or ()]
    targets: dict[str, nn.Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(pattern.match(name) for pattern in excluded):
            continue
        if config.target_modules is None:
            if type(module) is not nn.Linear:
                continue
        elif not _matches(name, config):
            continue
        if not _in_layers(name, config):
            continue
        if type(module) is not nn.Linear:
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            raise TypeError(f"target_modules: {name!r} is a {kind}; only torch.nn.Linear itself can be adapted")
        targets[name] = module
    if not targets:
        candidates = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if type(m) is nn.Linear})
        raise ValueError(
            f"target_modules={config.target_modules!r} (layers_to_transform={config.layers_to_transform!r}) matches "
            f"no linear layer; names of linear layers in this model end in {candidates}"
        )
    return targets


def _matches(name: str, config: AdaMSSConfig) -> bool:
    patterns = config.target_modules
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == suffix or name.endswith("." + suffix) for suffix in patterns or ())


def _in_layers(name: str, config: AdaMSSConfig) -> bool:
    """Whether `name` lies in one of `layers_to_transform`; its layer index is the first number after a list's name."""
    if config.layers_to_transform is None:
        return True
    for pattern in config.layers_pattern or (r"[^.]*",):
        match = re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name)
        if match:
            return int(match.group(1)) in config.layers_to_transform  # type: ignore[operator]
    return False

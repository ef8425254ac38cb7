"""`inject_adamss`: replace linear layers of a model in place by adapted ones, and tell which those are."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .bases import foreign_kind
from .config import AdaMSSConfig, require_config
from .decompose import Decomposition
from .frozen_linear import FrozenLinear
from .linear import FusedAdaMSSLinear
from .offload import is_offloaded, take_weights, weights_present
from .over_base import adapt
from .targets import modules_named, target_linears

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def inject_adamss(
    model: nn.Module, config: AdaMSSConfig, *, progress: bool = True, group: ProcessGroup | None = None
) -> nn.Module:
    """Replace the targeted linear layers by `FusedAdaMSSLinear` and freeze everything else.

    Those are plain `nn.Linear`s and, as bases that go on computing their own product (`AdaMSSOverBase`), Conv1D of
    transformers and layers that bitsandbytes (NF4, FP4, int8) or torchao (int8, float8) has quantised. Of these it is
    the dequantised weight that is decomposed, one layer at a time, and nothing of it is kept. Likewise weights that
    accelerate offloads are brought for their decomposition and for each call; B and C stay where they compute.

    Trainable afterwards: B and C of every adapted layer, and all parameters under `config.modules_to_save`. What an
    earlier call has adapted is left as it is and trains too. A module that is registered under several names is
    wrapped once and stays shared. Either all targets are replaced or, when an error is raised, none.

    Args:
        model: Changed in place.
        config: Hyperparameters; `target_modules`, `modules_to_save`, `layers_to_transform` and `layers_pattern` choose
            the layers, as in PEFT.
        progress: Show a progress bar with layer names and remaining time (initialisation runs an SVD per layer).
        group: Ranks that have the same model and share its layers out among themselves: each decomposes some, and all
            get the results, so that all start from the same bits. Every one of them has to call. None for alone.

    Returns:
        `model` itself.

    Raises:
        ValueError: A pattern matches nothing, or `model` is itself the linear layer, has adapters of PEFT, or is
            wrapped in DDP; or a target's weight is not there, or what `modules_to_save` names is offloaded by
            accelerate: the message names the first.
        TypeError: A target is none of these (but a subclass, parametrised, sharded, quantised otherwise), so that its
            forward cannot be replaced safely. The message names it and says why.
        RuntimeError: Another rank of `group` has failed.

    Warns:
        UserWarning: Without `target_modules`, such layers are passed over; the message says how many of which class.
            Or one of several names in `target_modules` is of no layer that is adapted.
            Experts of a mixture whose weights are one three-dimensional parameter always are, and counted.
    """
    require_config(config)

    shared: dict[str, Decomposition] = {}

    def share_out(linears: Mapping[str, nn.Linear]) -> None:
        from .shared_init import decompose_on_ranks

        assert group is not None
        shared.update(decompose_on_ranks(linears, config, group, progress=progress))

    def build(base: nn.Module, name: str) -> FusedAdaMSSLinear:
        if name not in shared:
            return adapt(name, base, config)
        weight: Any = base.weight
        bias: Any = base.bias
        return FusedAdaMSSLinear(weight, bias, shared[name], config)

    prepare = None if group is None else share_out
    replace_targets(model, config, build, prepare, title="AdaMSS init", progress=progress and group is None)
    return model


def replace_targets(
    model: nn.Module,
    selection: AdaMSSConfig,
    build: Callable[[nn.Module, str], FrozenLinear],
    prepare: Callable[[Mapping[str, nn.Linear]], None] | None = None,
    *,
    title: str,
    progress: bool,
) -> None:
    """Replace the linear layers that `selection` targets by what `build(linear, name)` makes of each, all or none.

    `build` shares the parameters of the linear layer and leaves them as they are. Where there is a `prepare`, it is
    called before that with all that `build` will be called for and that has values. Raises as `inject_adamss` does.
    """
    from tqdm.auto import tqdm

    if isinstance(model, nn.Linear) or foreign_kind("model", model) is not None:
        raise ValueError(
            f"model: is itself a linear layer ({type(model).__name__}), which cannot be replaced in place; for an "
            "nn.Linear use from_linear"
        )
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            raise ValueError(
                f"model: {name!r} has an adapter of PEFT, which would be frozen; merge it first, or, if it is PEFT's "
                "AdaMSS, let it be and call apply_adamss_kernels"
            )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("model: is wrapped in DDP, which would not see new parameters; adapt it before wrapping it")
    for name, module in modules_named(model, selection.modules_to_save or ()).items():
        if any(map(is_offloaded, module.modules())):
            raise ValueError(f"modules_to_save: {name!r} is to train, but accelerate takes its weights away (offload)")
    targets = target_linears(model, selection)

    if prepare is not None:
        first = {layer: name for name, layer in reversed(targets.items()) if type(layer) is nn.Linear}
        prepare({name: linear for linear, name in first.items() if not linear.weight.is_meta})
    layers: dict[nn.Module, FrozenLinear] = {}
    with tqdm(targets.items(), desc=title, unit="layer", disable=not progress) as bar:
        for name, linear in bar:
            bar.set_postfix_str(name)
            if linear not in layers:
                with weights_present(linear):
                    layers[linear] = build(linear, name).train(linear.training)
                take_weights(layers[linear], linear)
    replace_modules(model, {name: layers[linear] for name, linear in targets.items()})


def replace_modules(model: nn.Module, layers: Mapping[str, FrozenLinear]) -> None:
    """Put `layers` in place under their names, then train all adapted layers' updates and what they save, no more."""
    by_module = {model.get_submodule(name): layer for name, layer in layers.items()}
    swap(model, {**by_module, **layers})
    _keep_encoders_calling(model)
    model.requires_grad_(False)
    for layer in adapted_layers(model).values():
        layer.train_update()
    for module in saved_modules(model).values():
        module.requires_grad_(True)


_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def swap(model: nn.Module, replacements: Mapping[Any, nn.Module]) -> None:
    """Replace modules, given by name or for all their names by themselves, by ones that take over their hooks."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        new = replacements.get(name, replacements.get(module))
        if new is not None:
            for key in _HOOKS:
                setattr(new, key, getattr(module, key))
            if "_hf_hook" in module.__dict__:
                importlib.import_module(f"{__package__}.integrations.accelerate").move_hook(module, new)
            model.set_submodule(name, new)


def _keep_encoders_calling(model: nn.Module) -> None:
    """Make PyTorch's transformer encoder call its adapted layers, whose weights alone it would use in eval mode.

    There `nn.TransformerEncoderLayer` passes all its weights to one fused kernel, unless a module in it has a hook, and
    `nn.TransformerEncoder` packs padded batches into nested tensors for that kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and adapted_layers(module):
            module.use_nested_tensor = False
        elif isinstance(module, nn.TransformerEncoderLayer):
            for layer in (module.linear1, module.linear2):
                if isinstance(layer, FrozenLinear) and do_nothing not in layer._forward_pre_hooks.values():
                    layer.register_forward_pre_hook(do_nothing)


def do_nothing(module: nn.Module, args: object) -> None:
    """Be a hook: that there is one is all that counts."""


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters of `model` train, of how many, in PEFT's line of text.

    "trainable params: 42,432 || all params: 124,690,176 || trainable%: 0.0340". Shared parameters count once, and those
    that bitsandbytes packs into 4 bits as many as they were.

    Args:
        model: Any model; FSDP2's parameters count whole.
    """
    trained = everything = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        count = parameter.numel() * (2 * parameter.element_size() if packed else 1)
        everything += count
        trained += count if parameter.requires_grad else 0
    share = 100 * trained / everything if everything else 0.0
    print(  # noqa: T201 (that is what it is for)
        f"trainable params: {trained:,d} || all params: {everything:,d} || trainable%: {share:.4f}"
    )


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that train and are saved with the adapted layers of `model`, by name."""
    return modules_named(model, saved_names(model))


def saved_names(model: nn.Module) -> list[str]:
    """Return the names that the configs of the adapted layers of `model` have in `modules_to_save`."""
    return list(dict.fromkeys(name for layer in adapted_layers(model).values() for name in layer.modules_to_save))


def adapted_layers(model: nn.Module) -> dict[str, FrozenLinear]:
    """Return the layers of any method in `model` by name, each once, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}


def adamss_layers(model: nn.Module) -> dict[str, FusedAdaMSSLinear]:
    """Return the AdaMSS layers of `model` by name, each once, in registration order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedAdaMSSLinear)}


def merge_adapter(model: nn.Module) -> nn.Module:
    """Call `merge_and_unload` by the name that 0.1.0 had for it.

    Warns:
        FutureWarning: Always; the name goes with the next release.
    """
    warnings.warn("merge_adapter is called merge_and_unload now", FutureWarning, stacklevel=2)
    from .merge import merge_and_unload

    return merge_and_unload(model)

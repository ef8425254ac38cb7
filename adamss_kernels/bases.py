"""What can be adapted: `nn.Linear` itself, and linear layers of other libraries, each read by its integration.

A base of another library keeps its own forward, to whose output the update is added (`over_base.py`). What the core
needs to know of it is a `Kind`, which the module of `integrations` for its library gives; that is imported when such a
layer is met, and then the library itself is there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, bfloat16, float16, float32, float64, nn
from torch.nn.utils import parametrize

from .frozen_linear import FrozenLinear

_DTYPES = (float32, float64, bfloat16, float16)
_READERS = {"transformers": "conv1d", "bitsandbytes": "bitsandbytes", "torchao": "torchao"}
"""For the package that a layer's class or its weight's is of, the module of `integrations` that reads it."""
_ADAPTABLE = (
    "what can be adapted is torch.nn.Linear itself, Conv1D of transformers, and linear layers that bitsandbytes or "
    "torchao has quantised"
)


class Kind(NamedTuple):
    """How a kind of linear layer of another library is read; functions of a module, so that a layer can be pickled.

    Attributes:
        name: What messages call it.
        is_quantised: Whether its weight is coarser than an update, so that none can be merged into it.
        weight: Returns W (N, D) of a layer, dequantised into memory of its own, or a view.
        forward: Maps a layer and x (..., D) to y (..., N), with the layer's own gradient of x.
        stored: Returns a weight (N, D) as the layer stores it; only where it is not quantised.
        adopt: Makes a layer ready that is from now on called through `forward` alone.
    """

    name: str
    is_quantised: bool
    weight: Callable[[nn.Module], Tensor]
    forward: Callable[[nn.Module, Tensor], Tensor]
    stored: Callable[[Tensor], Tensor] | None = None
    adopt: Callable[[nn.Module], None] | None = None


def foreign_kind(name: str, module: nn.Module) -> Kind | None:
    """Return how `module` is read if it is a linear layer of another library, None if it is anything else.

    Raises:
        TypeError: It is one in a state that cannot be adapted; the message names it and says why.
    """
    for owner in (type(module), type(module._parameters.get("weight"))):
        reader = _READERS.get(owner.__module__.partition(".")[0])
        if reader is not None:
            found = importlib.import_module(f"{__package__}.integrations.{reader}").kind_of(name, module)
            if found is not None:
                _require_own_forward(name, module)
                return found
    return None


def require_base(name: str, module: nn.Module) -> Kind | None:
    """Return how `module` is read if it can be adapted, None if it is a plain `nn.Linear`.

    Raises:
        TypeError: It cannot be adapted; the message names it and says why.
    """
    kind = foreign_kind(name, module)
    if kind is None:
        plain_linear(name, module)
    return kind


def is_base(name: str, module: nn.Module) -> bool:
    """Whether a model's module is a linear layer that AdaMSS adapts where no layers are named."""
    return type(module) is nn.Linear or foreign_kind(name, module) is not None


def dense(module: nn.Module, kind: Kind | None) -> tuple[Tensor, Tensor | None]:
    """Return W (N, D) of a base, dequantised where it is, and its bias (N,) or None, detached.

    Args:
        module: A plain `nn.Linear`, or a layer of another library.
        kind: As `require_base` returns.
    """
    bias = module._parameters.get("bias")
    weight = module.weight if kind is None else kind.weight(module)
    assert isinstance(weight, Tensor)
    return weight.detach(), None if bias is None else bias.detach()


def plain_linear(name: str, module: nn.Module) -> nn.Linear:
    """Return `module` if it is a plain `nn.Linear`.

    Raises:
        TypeError: It is not exactly an `nn.Linear`, its forward was replaced, or its weight is not a plain
            floating-point parameter (but quantised, sharded, or computed from others). The message says which and why.
    """
    if type(module) is not nn.Linear:
        raise TypeError(f"{name!r} is a {_class_name(module)}{_why_not(name, module)}")
    _require_own_forward(name, module)
    if "weight" not in module._parameters:
        sources = [key for key in module._parameters if key.startswith("weight_")]
        raise TypeError(
            f"the weight of {name!r} is computed from {', '.join(sources) or 'something else'} before each call (by "
            "pruning or weight norm), which an adapted layer would not do; make that permanent first (prune.remove)"
        )
    weight: object = module.weight
    if foreign_kind(name, module) is not None:
        raise TypeError(f"the weight of {name!r} is quantised by torchao{_why_not(name, module)}")
    if type(weight) is not nn.Parameter:
        raise TypeError(
            f"the weight of {name!r} is a {type(weight).__module__}.{type(weight).__qualname__}; only a plain "
            "torch.nn.Parameter can be adapted, or what torchao quantises: adapt the model before it is sharded"
        )
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"the weight of {name!r} is of dtype {weight.dtype}; expected one of {_DTYPES}, so adapt the model before "
            "it is quantised"
        )
    return module


def _why_not(name: str, module: nn.Module) -> str:
    """Return the rest of the message that refuses a module of another class than `nn.Linear`."""
    if isinstance(module, FrozenLinear):
        return ", which is adapted already"
    if type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return (
            ": nn.MultiheadAttention reads the weight of its out_proj and never calls it, so that an update there would"
            " have no effect"
        )
    if parametrize.is_parametrized(module):
        which = ", ".join(
            f"{key} by {' and '.join(type(p).__name__ for p in found)}"
            for key, found in module.parametrizations.items()  # type: ignore[union-attr, operator]
        )
        return (
            f", whose parameters are computed anew in each call ({which}); make that permanent first "
            "(torch.nn.utils.parametrize.remove_parametrizations)"
        )
    if foreign_kind(name, module) is not None:
        return ", which inject_adamss adapts; this takes a plain torch.nn.Linear only"
    if isinstance(module, nn.Linear):
        own = "with a forward of its own" if type(module).forward is not nn.Linear.forward else "a subclass"
        return f", {own}, which an adapted layer would not call; {_ADAPTABLE}"
    if "Linear" not in type(module).__name__ and next(module.children(), None) is not None:
        return "; a whole model goes to inject_adamss"
    return f"; {_ADAPTABLE}"


def _require_own_forward(name: str, module: nn.Module) -> None:
    # accelerate's hooks replace it, too, and go with the layer (`model.swap`).
    if "forward" in module.__dict__ and "_hf_hook" not in module.__dict__:
        raise TypeError(
            f"the forward of {name!r} was replaced on this module alone, by something that an adapted layer would not "
            "call; adapt the model before that"
        )


def _class_name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"

"""`OverBase`: a layer over a linear layer of another library, which goes on computing its own product.

x goes through the base's own forward, and with it come the base's own kernels, dtypes and gradient; then the update is
added to that output: for `AdaMSSOverBase` by `add_update`, in place. The backward pass is theirs one after the other:
dy reaches the base as it is, and the update's gradient of x is added to the base's dx by autograd.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .added_update import add_update
from .bases import Kind, dense, require_base
from .config import AdaMSSConfig
from .decompose import Decomposition, decompose
from .frozen_linear import FrozenLinear
from .linear import FusedAdaMSSLinear
from .offload import weights_present
from .ops import UPDATE_OPERATORS

Self = TypeVar("Self", bound="OverBase")


class OverBase(FrozenLinear):
    """A frozen linear layer of another library with a trainable update, which goes before the class of that update.

    Parameters, buffers and their names are those of the base beside the update's, and so is the state dict; nothing of
    the weight is kept twice.

    Attributes:
        weight: As the base stores it: packed, or transposed. `base_parameters` returns W (N, D).
        kind: How the base is read.
        other_ways: What the refusal to merge names beside what every method has.
    """

    kind: Kind
    other_ways: ClassVar[str] = ""

    def bind_base(self, base: nn.Module, kind: Kind) -> None:
        """Take weight and bias from a base, in place of those that the update's constructor was given.

        Args:
            base: Left as it is; its parameters are shared.
            kind: How it is read.
        """
        self.kind = kind
        own = copy_of(base)
        self._base_names = (tuple(own._parameters), tuple(own._buffers))
        # One namespace for both: what is moved, cast, assigned or loaded here is what the base computes with.
        of_update = {name: p for name, p in self._parameters.items() if name not in ("weight", "bias")}
        self.__dict__["_parameters"] = {**own._parameters, **of_update}
        self.__dict__["_buffers"] = {**own._buffers, **self._buffers}
        self._non_persistent_buffers_set |= own._non_persistent_buffers_set
        share(own, self._parameters, self._buffers, self._non_persistent_buffers_set)
        if kind.adopt is not None:
            kind.adopt(own)
        # Not a submodule, whose parameters would have names of their own.
        self.__dict__["_base"] = own

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to y (..., N), of the dtype that the base returns."""
        base: nn.Module = self.__dict__["_base"]
        y = self.kind.forward(base, x)
        return y if self.merged else self.with_update(y, x)

    def bare_base(self) -> nn.Module:
        """Return the base by itself, as it was before it was adapted or merged; parameters are shared."""
        base = copy_of(self.__dict__["_base"])
        parameters, buffers = self._base_names
        own = {name: self._parameters[name] for name in parameters}
        if self._original is not None:
            own |= zip(("weight", "bias"), self._original, strict=True)
        share(
            base, own, {name: self._buffers[name] for name in buffers}, base._non_persistent_buffers_set & set(buffers)
        )
        return base.train(self.training)

    def base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W (N, D), dequantised where it is quantised, and bias, without the update."""
        with weights_present(self):
            return dense(self.bare_base(), self.kind)

    def merge(self, *, keep_original_on: str | torch.device = "cpu") -> None:
        """Fold the update into the base's weight, as `FrozenLinear.merge` does.

        Raises:
            TypeError: The weight is quantised, and would lose the update again in rounding.
            ValueError: As `FrozenLinear.merge`.
        """
        if self.kind.is_quantised:
            raise TypeError(
                f"merge: the weight of a {self.kind.name} is quantised, and would round the update away. "
                "to_linear(dtype) and merge_and_unload(model, dtype) give plain layers of the dequantised weight and "
                "the update; save_adapter and load_adapter bring the update onto the base in full precision"
                f"{self.other_ways}"
            )
        super().merge(keep_original_on=keep_original_on)

    def unloaded(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return what `merge_and_unload` puts in this layer's place: `to_linear`, or a `Conv1D` over a Conv1D."""
        if self.kind.stored is None:
            return self.to_linear(dtype)
        linear, base = self.to_linear(dtype), self.bare_base()
        base.weight = nn.Parameter(self._stored(linear.weight.detach()))
        if linear.bias is not None:
            base.bias = linear.bias
        return base

    def update_state(self) -> dict[str, Tensor]:
        """Return what of the state dict is the update's, without what the base adds to it."""
        state: dict[str, Tensor] = {}
        nn.Module._save_to_state_dict(self, state, "", False)
        of_base = {name for names in self._base_names for name in names}
        return {key: t for key, t in state.items() if key not in of_base}

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        return dense(self.__dict__["_base"], self.kind)

    def _stored(self, weight: Tensor) -> Tensor:
        assert self.kind.stored is not None
        return self.kind.stored(weight)

    def _save_base(self, *args: Any) -> None:
        self.__dict__["_base"]._save_to_state_dict(*args)

    def _load_base(self, *args: Any) -> None:
        self.__dict__["_base"]._load_from_state_dict(*args)

    def train(self: Self, mode: bool = True) -> Self:
        """Set whether this layer and its base train, as `nn.Module.train`."""
        self.__dict__["_base"].train(mode)
        return super().train(mode)

    def _replicate_for_data_parallel(self: Self) -> Self:
        replica: Any = super()._replicate_for_data_parallel()
        base = copy_of(replica._base)
        # `DataParallel` gives the replica its parameters later, as attributes: to this namespace.
        base.__dict__["_parameters"] = {}
        replica.__dict__["_base"] = base
        return replica

    def extra_repr(self) -> str:
        """Summarise the layer for `print(model)`."""
        return f"{super().extra_repr()}, base={self.kind.name}"


class AdaMSSOverBase(OverBase, FusedAdaMSSLinear):
    """A frozen linear layer of another library with a trainable AdaMSS update."""

    other_ways = "; export_lora serves it beside this base"

    def __init__(self, base: nn.Module, kind: Kind, decomposition: Decomposition, config: AdaMSSConfig) -> None:
        """Assemble a layer from parts; `inject_adamss` is the usual way.

        Args:
            base: Left as it is; its parameters are shared.
            kind: How it is read.
            decomposition: Basis, layout, B and C for its weight.
            config: Uses save_for_backward and backend.

        Raises:
            ValueError: `config.backend` names one that has no kernel for the update alone.
        """
        if config.backend not in ("auto", "reference", *UPDATE_OPERATORS):
            expected = ", ".join(map(repr, ("auto", "reference", *UPDATE_OPERATORS)))
            raise ValueError(
                f"backend: expected one of {expected}, which compute the update alone, over a {kind.name}, got "
                f"{config.backend!r}"
            )
        N, D = decomposition.layout.num_rows, decomposition.basis.shape[1]
        FusedAdaMSSLinear.__init__(self, nn.Parameter(torch.empty(N, D, device="meta")), None, decomposition, config)
        self.bind_base(base, kind)

    def with_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., N), which the base has computed of x (..., D), plus the update, in y's memory."""
        options = self.config.save_for_backward, self.config.backend
        return add_update(y, x, self.B, self.C, self._subspaces(), *options)


def adapt(name: str, base: nn.Module, config: AdaMSSConfig) -> FusedAdaMSSLinear:
    """Return an AdaMSS layer over a linear layer, which is left as it is.

    Args:
        name: What messages call it.
        base: A plain `nn.Linear`, or a layer of another library.
        config: Hyperparameters.

    Raises:
        TypeError: It cannot be adapted; the message says why.
        ValueError: The weight is empty or not finite.
    """
    kind = require_base(name, base)
    # W is gone before the next layer comes.
    return layer_over(base, kind, decompose(*dense(base, kind), config, name=name), config)


def layer_over(
    base: nn.Module, kind: Kind | None, decomposition: Decomposition, config: AdaMSSConfig
) -> FusedAdaMSSLinear:
    """Return the layer that has this decomposition: of the class that a base of this kind takes."""
    if kind is not None:
        return AdaMSSOverBase(base, kind, decomposition, config)
    own: Any = base._parameters
    return FusedAdaMSSLinear(own["weight"], own["bias"], decomposition, config)


def copy_of(base: nn.Module) -> nn.Module:
    """Return a module with the attributes of `base`, but methods of its class where some were replaced on it alone.

    Those are bound to it: accelerate's hooks, and the text that torchao prints.
    """
    copied = type(base).__new__(type(base))
    replaced = ("forward", "_hf_hook", "_old_forward", "extra_repr")
    copied.__dict__.update((key, value) for key, value in base.__dict__.items() if key not in replaced)
    return copied


def share(base: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any], not_persistent: set[str]) -> None:
    """Let `base` take its parameters and buffers out of these dictionaries."""
    base.__dict__.update(_parameters=parameters, _buffers=buffers, _non_persistent_buffers_set=not_persistent)

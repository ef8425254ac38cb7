"""The modules that an `AdapterBank` puts into its model, in which each row of a batch takes its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .added_update import add_update
from .bases import dense
from .config import AdaMSSConfig
from .decompose import Decomposition, decompose
from .grouped import grouped_linear
from .linear import FusedAdaMSSLinear
from .mixed_batch import current_batch
from .over_base import AdaMSSOverBase, copy_of, share
from .subspaces import Subspaces


class BankLinear(nn.Module):
    """A frozen linear layer under the AdaMSS updates of many adapters, which share its basis and row map.

    The state dict is the frozen layer's own: adapters are saved by their bank.

    Attributes:
        weight: W (N, D), frozen, the parameter of the layer it replaces.
        bias: (N,), frozen, or None.
        basis, basis_bias, row_subspace, offsets: As in `FusedAdaMSSLinear`.
        B: (slots, RHO, R), the adapters' B, one in each slot that is taken.
        C: (slots, N, r_max), likewise.
        active, trainable: (slots, K) bool masks, likewise.
        config: That of the adapters.
    """

    weight: Tensor
    bias: Tensor | None
    basis: Tensor
    basis_bias: Tensor | None
    row_subspace: Tensor
    offsets: Tensor
    B: Tensor
    C: Tensor
    active: Tensor
    trainable: Tensor

    def __init__(self, layer: FusedAdaMSSLinear, bank: int) -> None:
        """Take basis, row map and frozen parameters from a layer; there are no adapters yet.

        Args:
            layer: Shared, not copied.
            bank: Number of the bank, by which rows find their adapters.
        """
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.bank, self.config, self.layout = bank, layer.config, layer.layout
        self.weight = layer.weight
        self.register_parameter("bias", None)
        self.bias = layer.bias
        for name in ("basis", "basis_bias", "row_subspace", "offsets"):
            self.register_buffer(name, getattr(layer, name), persistent=False)
        for name in ("B", "C", "active", "trainable"):
            of_layer = getattr(layer, name).detach()
            self.register_buffer(name, of_layer.new_empty(0, *of_layer.shape), persistent=False)
        self._leaves: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        self._untrained: tuple[Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        return self.B.shape[0]

    def grow(self, capacity: int) -> None:
        """Have at least `capacity` slots; optimizers of the adapters' parameters go on."""
        if capacity <= self.capacity:
            return
        for name in ("B", "C", "active", "trainable"):
            old = getattr(self, name)
            grown = old.new_zeros(capacity, *old.shape[1:])
            grown[: len(old)] = old
            setattr(self, name, grown)
        for slot in self._leaves:
            self._share(slot)

    @torch.no_grad()
    def put(self, slot: int, layer: FusedAdaMSSLinear) -> None:
        """Fill a slot with the B, C and masks of `layer`, which has this one's basis and row map."""
        for name in ("B", "C", "active", "trainable"):
            getattr(self, name)[slot] = getattr(layer, name)
        self._leaves[slot] = (nn.Parameter(self.B[slot]), nn.Parameter(self.C[slot]))

    @torch.no_grad()
    def take(self, slot: int) -> FusedAdaMSSLinear:
        """Return a layer of its own that computes what rows with this slot get; values are copied."""
        self.follow(slot)
        decomposition = Decomposition(
            self.basis, self.basis_bias, self.layout, self.B[slot].clone(), self.C[slot].clone()
        )
        layer = self.layer_of(decomposition, self.config)
        layer.set_masks(self.active[slot], self.trainable[slot])
        return layer.train(self.training)

    def untrained(self, name: str) -> FusedAdaMSSLinear:
        """Return a layer as it is before training; `name` is what messages call it.

        The frozen weight and the config decide how it starts, so they are decomposed once for all adapters.
        """
        if self._untrained is None:
            own = decompose(*self.base_parameters(), self.config, name=name)
            if own.layout.ranks != self.layout.ranks:
                raise ValueError(
                    f"{name}: from this base a new adapter gets the ranks {own.layout.ranks}, but those in the bank, "
                    f"trained on another copy of it, have {self.layout.ranks}"
                )
            self._untrained = own.B, own.C
        B, C = (t.to(self.B, copy=True) for t in self._untrained)
        shared = Decomposition(self.basis, self.basis_bias, self.layout, B, C)
        return self.layer_of(shared, self.config)

    def layer_of(self, decomposition: Decomposition, config: AdaMSSConfig) -> FusedAdaMSSLinear:
        """Return a layer over the frozen layer, which has this decomposition."""
        return FusedAdaMSSLinear(self.weight, self.bias, decomposition, config)

    def base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W (N, D) and bias (N,) of the frozen layer."""
        return self.weight, self.bias

    def clear(self, slot: int) -> None:
        """Empty a slot."""
        del self._leaves[slot]
        for name in ("B", "C", "active", "trainable"):
            getattr(self, name)[slot].zero_()

    def leaves(self, slot: int) -> tuple[nn.Parameter, nn.Parameter]:
        """Return the parameters of a slot's adapter, B (RHO, R) and C (N, r_max), which share the stacks' memory."""
        return self._leaves[slot]

    @torch.no_grad()
    def follow(self, slot: int) -> None:
        """Take over the values of a slot's parameters where they have left the stacks: by `.data`, or after a copy."""
        for stack, leaf in zip((self.B, self.C), self._leaves[slot], strict=True):
            if leaf.data_ptr() != stack[slot].data_ptr():
                stack[slot].copy_(leaf)
                leaf.data = stack[slot]

    def _share(self, slot: int) -> None:
        for stack, leaf in zip((self.B, self.C), self._leaves[slot], strict=True):
            leaf.data = stack[slot]

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, ..., D) to y (batch, ..., N); rows without an adapter get what the frozen layer gives."""
        if torch.compiler.is_compiling():
            # It runs again for other batches, in which any adapter may have rows.
            slots = leaf_groups = tuple(self._leaves)
        else:
            batch = current_batch(self.bank)
            if batch is None or not batch.slots:
                if batch is not None:
                    batch.repeat(x.shape[0] if x.dim() > 1 else 1)
                return F.linear(x, self.weight, self.bias)
            slots, leaf_groups = batch.slots, tuple(range(len(batch.slots)))
        leaves = [leaf for slot in slots for leaf in self._leaves[slot]] if torch.is_grad_enabled() else []
        rows = (self.row_subspace, self.offsets, self.active, self.trainable)
        subspaces = Subspaces(self.basis, self.basis_bias, *rows)
        operands = (self.weight, self.bias, self.B, self.C, subspaces, leaves, leaf_groups, self.bank)
        return grouped_linear(x, *operands, self.config.save_for_backward, self.config.backend)

    def plain(self) -> nn.Module:
        """Return the frozen layer, with the same parameters."""
        return _linear_of(self)

    def _apply(self, fn: Any, recurse: bool = True) -> BankLinear:
        moved = super()._apply(fn, recurse)
        self.layout = self.layout.with_tensors(self.row_subspace, self.offsets)
        for slot in self._leaves:
            self._share(slot)
        return moved

    def extra_repr(self) -> str:
        """Summarise the layer for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"R={self.basis.shape[0]}, K={self.layout.num_subspaces}, adapters={len(self._leaves)}"
        )


class BankOverBase(BankLinear):
    """A `BankLinear` over a layer of another library, which computes its own product, as under `AdaMSSOverBase`.

    The update of each adapter is added to its own rows, one adapter after another.
    """

    def __init__(self, layer: AdaMSSOverBase, bank: int) -> None:
        """Take basis, row map and base from a layer; there are no adapters yet."""
        super().__init__(layer, bank)
        self.kind, base = layer.kind, layer.bare_base()
        self._base_names = (tuple(base._parameters), tuple(base._buffers))
        self._buffers.update(base._buffers)
        self._non_persistent_buffers_set |= base._non_persistent_buffers_set
        share(base, self._parameters, self._buffers, self._non_persistent_buffers_set)
        self.__dict__["_base"] = base

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, ..., D) to y (batch, ..., N); rows without an adapter get what the base gives."""
        return _uncompiled(self._mixed)(x)

    def _mixed(self, x: Tensor) -> Tensor:
        y = self.kind.forward(self.__dict__["_base"], x)
        batch, rows = current_batch(self.bank), x.shape[0] if x.dim() > 1 else 1
        if batch is None or not batch.slots:
            if batch is not None:
                batch.repeat(rows)
            return y
        flat, of_base = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
        groups = batch.groups(rows, flat.shape[0], x.device)
        of_slots = groups.tokens.split(batch.sizes(flat.shape[0]))[:-1]
        for slot, tokens in zip(batch.slots, of_slots, strict=True):
            masks = (self.active[slot], self.trainable[slot])
            subspaces = Subspaces(self.basis, self.basis_bias, self.row_subspace, self.offsets, *masks)
            # Copies, which take the update in place.
            options = (self.config.save_for_backward, self.config.backend)
            part = add_update(of_base[tokens], flat[tokens], *self._leaves[slot], subspaces, *options)
            of_base = of_base.index_copy(0, tokens, part)
        return of_base.reshape(y.shape)

    def plain(self) -> nn.Module:
        """Return the base, with the same parameters."""
        base = copy_of(self.__dict__["_base"])
        parameters, buffers = ({n: own[n] for n in names} for own, names in self._own())
        share(base, parameters, buffers, base._non_persistent_buffers_set & buffers.keys())
        return base.train(self.training)

    def _own(self) -> Any:
        return zip((self._parameters, self._buffers), self._base_names, strict=True)

    def layer_of(self, decomposition: Decomposition, config: AdaMSSConfig) -> FusedAdaMSSLinear:
        """Return a layer over the base, which has this decomposition."""
        return AdaMSSOverBase(self.plain(), self.kind, decomposition, config)

    def base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W (N, D), dequantised, and bias (N,) of the base."""
        return dense(self.plain(), self.kind)

    def train(self, mode: bool = True) -> BankOverBase:
        """Set whether this layer and its base train, as `nn.Module.train`."""
        self.__dict__["_base"].train(mode)
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.__dict__["_base"]._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["_base"]._load_from_state_dict(*args)


def bank_layer(layer: FusedAdaMSSLinear, bank: int) -> BankLinear:
    """Return the module that takes the place of what `layer` is over, in the bank of this number."""
    return BankOverBase(layer, bank) if isinstance(layer, AdaMSSOverBase) else BankLinear(layer, bank)


def _linear_of(module: BankLinear | BankHead) -> nn.Linear:
    """Return an `nn.Linear` of a module's own weight and bias, shared."""
    linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    own: dict[str, Any] = module._parameters
    linear.weight, linear.bias = own["weight"], own["bias"]
    return linear.train(module.training)


def _uncompiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Keep what depends on which rows there are for whom out of compiled code: it differs from batch to batch.

    Only where it would be compiled: as a decorator `torch.compiler.disable` imports the compiler with this module.
    """
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function


class BankHead(nn.Module):
    """A linear layer that adapters have trained in full, so that each row of a batch takes its own adapter's.

    Attributes:
        weight: (N, D), of rows without an adapter.
        bias: (N,) or None.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, bank: int) -> None:
        """Take the model's own layer, shared, not copied, and the bank's number."""
        super().__init__()
        self.bank = bank
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.weight = linear.weight
        self.register_parameter("bias", None)
        self.bias = linear.bias
        self._heads: dict[int, nn.Linear] = {}

    def put(self, slot: int, linear: nn.Linear) -> None:
        """Let rows with this slot take `linear`."""
        self._heads[slot] = linear

    def take(self, slot: int) -> nn.Linear:
        """Return the layer that rows with this slot take."""
        return self._heads[slot]

    def clear(self, slot: int) -> None:
        """Forget it."""
        del self._heads[slot]

    def plain(self) -> nn.Linear:
        """Return the model's own layer, with the same parameters."""
        return _linear_of(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, ..., D) to y (batch, ..., N)."""
        return _uncompiled(self._mixed)(x)

    def _mixed(self, x: Tensor) -> Tensor:
        batch = current_batch(self.bank)
        if batch is None or not batch.slots:
            return F.linear(x, self.weight, self.bias)
        rows = x.shape[0] if x.dim() > 1 else 1
        flat = x.reshape(-1, x.shape[-1])
        groups = batch.groups(rows, flat.shape[0], x.device)
        layers: list[nn.Linear | BankHead] = [*(self._heads[slot] for slot in batch.slots), self]
        parts = [
            F.linear(flat[tokens], layer.weight, layer.bias)
            for layer, tokens in zip(layers, groups.tokens.split(batch.sizes(flat.shape[0])), strict=True)
        ]
        in_groups = torch.cat(parts)
        y = torch.empty_like(in_groups).index_copy(0, groups.tokens, in_groups)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Any, recurse: bool = True) -> BankHead:
        moved = super()._apply(fn, recurse)
        for head in self._heads.values():
            head._apply(fn)
        return moved

    def extra_repr(self) -> str:
        """Summarise the layer for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, adapters={len(self._heads)}"

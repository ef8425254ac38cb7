"""`FusedAdaMSSLinear`: the drop-in replacement for a frozen `nn.Linear`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import AdaMSSConfig, require_config
from .decompose import Decomposition, decompose
from .frozen_linear import FrozenLinear, plain_linear
from .functional import apply
from .layout import SubspaceLayout, block_diagonal, column_mask


class FusedAdaMSSLinear(FrozenLinear):
    """A frozen linear layer with a trainable AdaMSS update: y = x W^T + bias + ((x A^T + a) B^T) C^T.

    Attributes:
        weight, bias: As in `FrozenLinear`.
        basis: A (R, D), frozen buffer.
        basis_bias: a (R,), frozen buffer, or None.
        B: (RHO, R), trainable.
        C: (N, r_max), trainable; entries beyond a row's rank are structural zeros.
        row_subspace: (N,) int32 buffer, the subspace that owns each row.
        ranks: (K,) int32 buffer, the rank of each subspace.
        active: (K,) bool buffer, subspaces that contribute.
        trainable: (K,) bool buffer, subspaces that get gradients.
        contributes: Whether any subspace is active, known on the host; without one, forward is the frozen layer's.
        learns: Whether any active subspace is trainable, known on the host; without one, nothing is kept for backward.
        config: The `AdaMSSConfig` it was made with.
    """

    basis: Tensor
    basis_bias: Tensor | None
    row_subspace: Tensor
    ranks: Tensor
    offsets: Tensor
    active: Tensor
    trainable: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None, decomposition: Decomposition, config: AdaMSSConfig) -> None:
        """Assemble a layer from parts; `from_linear` is the usual way.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
            decomposition: Basis, layout, B and C for this weight.
            config: Uses save_for_backward and backend.
        """
        super().__init__(weight, bias)
        basis, basis_bias, layout, B, C = decomposition
        self.config = config
        self.modules_to_save = tuple(config.modules_to_save or ())
        self.B = nn.Parameter(B)
        self.C = nn.Parameter(C)
        self.register_buffer("basis", basis)
        self.register_buffer("basis_bias", basis_bias)
        self.register_buffer("row_subspace", layout.row_subspace)
        self.register_buffer("ranks", torch.tensor(layout.ranks, dtype=torch.int32, device=weight.device))
        # Follows from the ranks; a buffer so that it moves with the module.
        self.register_buffer("offsets", layout.offsets, persistent=False)
        self.register_buffer("active", torch.ones(layout.num_subspaces, dtype=torch.bool, device=weight.device))
        self.register_buffer("trainable", torch.ones(layout.num_subspaces, dtype=torch.bool, device=weight.device))
        self.contributes = True
        self.learns = True
        self._layout = layout

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: AdaMSSConfig, *, name: str = "linear") -> FusedAdaMSSLinear:
        """Wrap `linear`, sharing and freezing its parameters; with C = 0 the output is at first the same.

        Args:
            linear: The layer to adapt, on any device; on `meta` only shapes are set up.
            config: Hyperparameters.
            name: What messages call this layer.

        Raises:
            TypeError: `linear` is not exactly an `nn.Linear` with a plain floating-point weight.
            ValueError: The weight is empty or not finite.
        """
        require_config(config)
        plain_linear(name, linear)
        decomposition = decompose(linear.weight, linear.bias, config, name=name)
        layer = cls(linear.weight, linear.bias, decomposition, config).train(linear.training)
        layer.freeze_base()
        return layer

    @property
    def layout(self) -> SubspaceLayout:
        """Row assignment and ranks, on this layer's device."""
        return self._layout

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to y (..., N); see `adamss_linear`."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        # The layer's own tensors fit one another; `nn.Module.__getattr__` would cost a small layer a percent.
        own: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        try:
            weight, bias, B, C = own["weight"], own["bias"], own["B"], own["C"]
        except KeyError:  # `DataParallel`, pruning and parametrisations make them plain attributes
            weight, bias, B, C = self.weight, self.bias, self.B, self.C
        return apply(
            x,
            weight,
            bias,
            buffers["basis"],
            buffers["basis_bias"],
            B,
            C,
            buffers["row_subspace"],
            buffers["offsets"],
            buffers["active"],
            buffers["trainable"],
            self.contributes,
            self.learns,
            self.config.save_for_backward,
            self.config.backend,
        )

    def __setattr__(self, name: str, value: Any) -> None:
        # Kernels read K bytes there, whatever it is.
        if name in ("active", "trainable"):
            K = self._layout.num_subspaces
            if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != (K,):
                got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name}: expected a bool tensor of shape ({K},), got {got}")
        super().__setattr__(name, value)

    def summarize_masks(self) -> None:
        """Set `contributes` and `learns` from the masks: call after editing `active` or `trainable` (synchronises)."""
        self.contributes, self.learns = torch.stack((self.active.any(), (self.active & self.trainable).any())).tolist()

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update of W by the active subspaces: (N, D), float32 (float64 for float64 parameters)."""
        return self._delta(self.basis)

    @torch.no_grad()
    def delta_bias(self) -> Tensor | None:
        """Return the update of the bias by the active subspaces: (N,), dtype as `delta_weight`; None without one."""
        return None if self.basis_bias is None else self._delta(self.basis_bias[:, None])[:, 0]

    def _delta(self, basis: Tensor) -> Tensor:
        acc = torch.promote_types(self.B.dtype, torch.float32)
        S = self.B.to(acc) @ basis.to(acc)
        S = S.masked_fill(~column_mask(self.active, self.offsets, S.shape[0])[:, None], 0)
        return block_diagonal(self.C.to(acc), self.row_subspace, self.offsets, S.shape[0]).T @ S

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedAdaMSSLinear:
        super()._apply(fn, recurse)
        if self.row_subspace is not self._layout.row_subspace and not self.row_subspace.is_meta:
            # Kernels index by them, and after `to_empty` they hold garbage until a state dict is loaded.
            self.row_subspace.clamp_(0, self._layout.num_subspaces - 1)
            starts = [0, *itertools.accumulate(self._layout.ranks)]
            self.offsets = torch.tensor(starts, dtype=torch.int32, device=self.row_subspace.device)
        # The buffers have been moved or replaced.
        self._layout = self._layout.with_tensors(self.row_subspace, self.offsets)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ranks = state_dict.get(prefix + "ranks")
        if ranks is not None and tuple(ranks.tolist()) != self._layout.ranks:
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix}ranks: expected the ranks of this layer, {self._layout.ranks}, got {tuple(ranks.tolist())}"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Rebuilt rather than kept: after `to_empty` the buffer holds garbage.
        self._layout = SubspaceLayout(self.row_subspace, self._layout.ranks)
        self.offsets = self._layout.offsets
        if not self.active.is_meta:
            self.summarize_masks()

    def extra_repr(self) -> str:
        """Summarise the layer for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"R={self.basis.shape[0]}, K={self._layout.num_subspaces}, RHO={self._layout.rho}, merged={self.merged}"
        )

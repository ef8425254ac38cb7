"""`FusedAdaMSSLinear`: the drop-in replacement for a frozen `nn.Linear`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .bases import plain_linear
from .config import AdaMSSConfig, require_config
from .decompose import Decomposition, decompose
from .frozen_linear import FrozenLinear
from .functional import fused_linear
from .layout import SubspaceLayout, block_diagonal, column_mask
from .subspaces import Subspaces


class _Idle(NamedTuple):
    """The masks when none of the active subspaces was trainable, and whether any was active."""

    active: Tensor
    trainable: Tensor
    versions: tuple[int, ...]
    contributes: bool


class FusedAdaMSSLinear(FrozenLinear):
    """A frozen linear layer with a trainable AdaMSS update: y = x W^T + bias + ((x A^T + a) B^T) C^T.

    Attributes:
        weight: W (N, D), frozen, the parameter of the layer it replaces.
        bias: (N,), frozen, or None.
        basis: A (R, D), frozen buffer.
        basis_bias: a (R,), frozen buffer, or None.
        B: (RHO, R), trainable.
        C: (N, r_max), trainable; entries beyond a row's rank are structural zeros.
        row_subspace: (N,) int32 buffer, the subspace that owns each row.
        ranks: (K,) int32 buffer, the rank of each subspace.
        active: (K,) bool buffer, subspaces that contribute; see `set_masks`.
        trainable: (K,) bool buffer, subspaces that get gradients; see `set_masks`.
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
        device = layout.row_subspace.device
        self.register_buffer("ranks", torch.tensor(layout.ranks, dtype=torch.int32, device=device))
        # Follows from the ranks; a buffer so that it moves with the module.
        self.register_buffer("offsets", layout.offsets, persistent=False)
        self.register_buffer("active", torch.ones(layout.num_subspaces, dtype=torch.bool, device=device))
        self.register_buffer("trainable", torch.ones(layout.num_subspaces, dtype=torch.bool, device=device))
        self._idle: _Idle | None = None
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
        try:
            weight, bias, B, C = own["weight"], own["bias"], own["B"], own["C"]
        except KeyError:  # `DataParallel`, pruning and parametrisations make them plain attributes
            weight, bias, B, C = self.weight, self.bias, self.B, self.C
        options = self.config.save_for_backward, self.config.backend
        return fused_linear(x, weight, bias, B, C, self._subspaces(), *options)

    def _subspaces(self) -> Subspaces:
        """Return what the next call takes beside W, B and C, with what is known of the masks."""
        buffers: dict[str, Any] = self._buffers
        contributes = learns = True
        # Compiled code runs again, when the masks may be others: there they are data and no more.
        if not torch.compiler.is_compiling() and self._idle is not None:
            contributes, learns = self._still_idle(self._idle)
        return Subspaces(
            buffers["basis"],
            buffers["basis_bias"],
            buffers["row_subspace"],
            buffers["offsets"],
            buffers["active"],
            buffers["trainable"],
            contributes,
            learns,
        )

    @torch.no_grad()
    def set_masks(self, active: Tensor | None = None, trainable: Tensor | None = None) -> None:
        """Set the masks, so that work which they make superfluous is left out from now on.

        A layer without an active subspace becomes the bare linear layer, one that has none to train keeps nothing for
        backward. Masks that are changed in any other way count from the next call on, too, but only as data: the layer
        does all its work until this method is called again. What is compiled, exported or captured in a CUDA graph
        always takes them as data.

        On a GPU, to read a mask is to wait for the device: give both masks from the CPU where that matters. There a
        change that PyTorch does not count (through `.data`, or DDP's copy of rank 0's buffers) is not seen while no
        subspace is left to train.

        Args:
            active: (K,) bool, subspaces that contribute, on any device; None for as they are.
            trainable: (K,) bool, subspaces that get gradients, likewise.

        Raises:
            ValueError: A mask is not a bool tensor of shape (K,); nothing is changed.
        """
        for name, mask in (("active", active), ("trainable", trainable)):
            if mask is not None:
                self._require_mask(name, mask)
        buffers = (self.active, self.trainable)
        for buffer, mask in zip(buffers, (active, trainable), strict=True):
            if mask is not None:
                buffer.copy_(mask)
        self._idle = None
        if any(type(t) is not Tensor or t.is_meta or t.is_inference() for t in buffers) or _is_recording(buffers[0]):
            return
        # What comes from the host need not be waited for.
        active = (self.active if active is None else active).cpu()
        trainable = (self.trainable if trainable is None else trainable).cpu()
        if not (active & trainable).any():
            self._idle = _Idle(*buffers, tuple(buffer._version for buffer in buffers), bool(active.any()))

    def _still_idle(self, idle: _Idle) -> tuple[bool, bool]:
        """Return whether any subspace contributes and any learns; True where only the device could tell."""
        active, trainable = self._buffers["active"], self._buffers["trainable"]
        assert active is not None and trainable is not None
        if _is_recording(active):
            return True, True
        if active.is_cpu:
            # Their values are at hand: so no change is missed, whichever way it was made.
            contributes = bool(active.any())
            return contributes, contributes and bool((active & trainable).any())
        is_unchanged = (
            active is idle.active
            and trainable is idle.trainable
            and (active._version, trainable._version) == idle.versions
        )
        return (idle.contributes, False) if is_unchanged else (True, True)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("active", "trainable"):
            self._require_mask(name, value)
        super().__setattr__(name, value)

    def _require_mask(self, name: str, value: object) -> None:
        # Kernels read K bytes there, whatever it is.
        K = self._layout.num_subspaces
        if not isinstance(value, Tensor) or value.dtype != torch.bool or tuple(value.shape) != (K,):
            got = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected a bool tensor of shape ({K},), got {got}")

    def update_matrix(self) -> Tensor:
        """Return the update of W by the active subspaces: (N, D), float32 or float64, as a function of B and C."""
        return self._delta(self.basis)

    @torch.no_grad()
    def delta_bias(self) -> Tensor | None:
        """Return the update of the bias by the active subspaces: (N,), dtype as `delta_weight`; None without one."""
        return None if self.basis_bias is None else self._delta(self.basis_bias[:, None])[:, 0]

    def _delta(self, basis: Tensor) -> Tensor:
        rows = Subspaces(None, None, self.row_subspace, self.offsets, self.active)
        return delta(self.B, self.C, rows, basis)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedAdaMSSLinear:
        super()._apply(fn, recurse)
        if self.row_subspace is not self._layout.row_subspace and not self.row_subspace.is_meta:
            # Kernels index by them, and after `to_empty` they hold garbage until a state dict is loaded.
            if self._layout.row_subspace.is_meta:
                # Any map that is valid, so that a state dict of the base weights alone can be loaded first.
                N, K = self.row_subspace.shape[0], self._layout.num_subspaces
                self.row_subspace.copy_(torch.arange(N, device="cpu") % K)
            self.row_subspace.clamp_(0, self._layout.num_subspaces - 1)
            starts = [0, *itertools.accumulate(self._layout.ranks)]
            self.offsets, self.ranks = (
                torch.tensor(values, dtype=torch.int32, device=self.row_subspace.device)
                for values in (starts, self._layout.ranks)
            )
        # The buffers have been moved or replaced.
        self._layout = self._layout.with_tensors(self.row_subspace, self.offsets)
        if self._idle is not None:
            self.set_masks()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies count their versions anew.
        self.set_masks()

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
        self.set_masks()

    def extra_repr(self) -> str:
        """Summarise the layer for `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"R={self.basis.shape[0]}, K={self._layout.num_subspaces}, RHO={self._layout.rho}, merged={self.merged}"
        )


def delta(B: Tensor, C: Tensor, subspaces: Subspaces, basis: Tensor) -> Tensor:
    """Return C^T-weighted sums of the rows of B A by the active subspaces: (N, columns of `basis`), float32 at least.

    Args:
        B: (RHO, R).
        C: (N, r_max).
        subspaces: Its row map (N,) and masks count.
        basis: A (R, D), or some columns of it.
    """
    _, _, row_subspace, offsets, active, *_ = subspaces
    assert active is not None
    acc = torch.promote_types(B.dtype, torch.float32)
    S = B.to(acc) @ basis.to(acc)
    S = S.masked_fill(~column_mask(active, offsets, S.shape[0])[:, None], 0)
    return block_diagonal(C.to(acc), row_subspace, offsets, S.shape[0]).T @ S


def _is_recording(tensor: Tensor) -> bool:
    """Whether what is computed now is recorded, transformed, or only pretended: then no value may decide."""
    return (
        torch.compiler.is_compiling()
        # Neither a transform of torch.func nor a dispatch mode (make_fx, fake tensors) can be asked for in public.
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )

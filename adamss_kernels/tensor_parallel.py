"""Tensor parallelism: styles by which torch's `parallelize_module` spreads adapted layers over the ranks of a mesh.

Column-wise, rank t has some rows of W, bias and C; A and B are whole everywhere. What follows from one rank's rows is a
part of the gradient of B, so the parts are summed. Row-wise, it has some columns of W and A. S is linear in x, so that
S C^T from a part of x is a part of the update, which rides on the sum that y needs anyway; the gradients of B and C are
sums of parts. The row map, N integers, is whole on every rank, and so are the masks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn import functional as F

from .distributed import with_sharding
from .functional import fused_linear
from .linear import FusedAdaMSSLinear, delta
from .subspaces import Subspaces


class _AdaMSSStyle(ParallelStyle):
    """What both styles share; the arguments are those of torch's `ColwiseParallel` and `RowwiseParallel`."""

    layer_class: type[_Spread]
    default_input: Placement
    default_output: Placement

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        """Choose the layouts of x and y.

        Args:
            input_layouts: How x is spread where it comes as a plain tensor; None for the usual layout of the style,
                `Shard(1)` for the sequence-parallel layout of x (batch, sequence, D).
            output_layouts: How y shall be spread, likewise.
            use_local_output: Return this rank's part of y, a plain tensor; False returns a DTensor.
        """
        super().__init__()
        self.input_layout = input_layouts or self.default_input
        self.output_layout = output_layouts or self.default_output
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind = type(self).__name__
        if type(module) is not FusedAdaMSSLinear:
            raise TypeError(
                f"{kind}: expected a FusedAdaMSSLinear, got a {type(module).__qualname__}; adapt the model first, "
                "parallelize it then, and call fully_shard last"
            )
        if device_mesh.ndim != 1:
            raise ValueError(f"{kind}: expected a mesh of one dimension, got {device_mesh.ndim} of them; cut one out")
        if module.merged:
            raise ValueError(f"{kind}: expected an unmerged layer; call unmerge() first")
        _require_same_on_all_ranks(kind, module, device_mesh)
        spread: Any = module
        spread.__class__ = self.layer_class
        spread.spread(self, device_mesh)
        return module


def _require_same_on_all_ranks(kind: str, layer: FusedAdaMSSLinear, mesh: DeviceMesh) -> None:
    ours = (layer.out_features, layer.in_features, layer.basis.shape[0], layer.layout.ranks)
    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, ours, group=mesh.get_group())
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            raise ValueError(
                f"{kind}: expected a layer of equal shapes on all ranks of the mesh, got (N, D, R, ranks) = {found[0]} "
                f"on its rank 0 and {theirs} on {rank}"
            )


class _Spread(FusedAdaMSSLinear):
    """An adapted layer that is spread over a mesh; `out_features`, `in_features` and `layout` are those of the whole.

    Parameters, and the basis where it is cut, are DTensors, so that ASA and checkpoints see the whole layer.
    """

    style: _AdaMSSStyle
    placements: dict[str, Placement]
    rows: slice
    is_first: bool

    def spread(self, style: _AdaMSSStyle, mesh: DeviceMesh) -> None:
        """Leave this rank its part; values are those of the mesh's rank `style.src_data_rank` (None: of each rank)."""
        self.style = style

        def placed(tensor: Tensor, placement: Placement) -> DTensor:
            return distribute_tensor(tensor.detach(), mesh, [placement], src_data_rank=style.src_data_rank)

        for name, parameter in list(self._parameters.items()):
            if parameter is not None:
                part = placed(parameter, self.placements.get(name, Replicate()))
                self.register_parameter(name, nn.Parameter(part, parameter.requires_grad))
        for name, buffer in list(self._buffers.items()):
            if buffer is None:
                continue
            if name in self.placements:
                self._buffers[name] = placed(buffer, self.placements[name])
            else:
                buffer.copy_(placed(buffer, Replicate()).to_local())
        N, coordinate = self.out_features, mesh.get_local_rank()
        chunk = -(-N // mesh.size())
        cut = self.placements.get("C") == Shard(0)
        self.rows = slice(min(coordinate * chunk, N), min((coordinate + 1) * chunk, N)) if cut else slice(0, N)
        self.is_first = coordinate == 0

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Subspaces]:
        """Return this rank's weight, bias, B, C and `Subspaces`."""
        own, buffers = self._parameters, self._buffers
        weight, bias, B, C = (None if t is None else _local(t) for t in (own[n] for n in ("weight", "bias", "B", "C")))
        basis, basis_bias = buffers["basis"], buffers["basis_bias"]
        assert weight is not None and B is not None and C is not None and basis is not None
        contributes = learns = True
        if not torch.compiler.is_compiling() and self._idle is not None:
            contributes, learns = self._still_idle(self._idle)
        subspaces = Subspaces(
            _local(basis),
            basis_bias,
            self.row_subspace[self.rows],
            self.offsets,
            self.active,
            self.trainable,
            contributes,
            learns,
        )
        return weight, bias, B, C, subspaces

    def _apply_part(self, x: Tensor, summed: tuple[str, ...], mesh: DeviceMesh) -> Tensor:
        """Return what this rank contributes to y; the gradients of `summed` are summed over the ranks."""
        weight, bias, B, C, subspaces = self._operands()
        if self.merged:
            return F.linear(x, weight, bias)
        if "C" in summed:
            B, C = _SumGradients.apply(mesh.get_group(), B, C)
        else:
            (B,) = _SumGradients.apply(mesh.get_group(), B)
        return fused_linear(x, weight, bias, B, C, subspaces, self.config.save_for_backward, self.config.backend)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update of W by the active subspaces, a DTensor spread as W is."""
        self._require_no_fsdp("delta_weight")
        _, _, B, C, subspaces = self._operands()
        assert subspaces.basis is not None
        return with_sharding(delta(B, C, subspaces, subspaces.basis), self.weight)

    @torch.no_grad()
    def delta_bias(self) -> Tensor | None:
        """Return the update of the bias, a DTensor spread as the bias is; None without one."""
        if self.bias is None or self.basis_bias is None:
            return None
        self._require_no_fsdp("delta_bias")
        _, _, B, C, subspaces = self._operands()
        return with_sharding(delta(B, C, subspaces, self.basis_bias[:, None])[:, 0], self.bias)

    def _require_no_fsdp(self, method: str) -> None:
        mesh: Any = getattr(self.C, "device_mesh", None)
        if mesh.ndim != 1:
            raise NotImplementedError(
                f"{method}: expected parameters that only tensor parallelism spreads, got ones that FSDP2 shards too; "
                "save_adapter and load them onto a model of one process"
            )


class _Colwise(_Spread):
    placements = {"weight": Shard(0), "bias": Shard(0), "C": Shard(0)}  # noqa: RUF012 (never changed)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, spread as the style says, to this rank's columns of y."""
        mesh: DeviceMesh = self.C.device_mesh  # type: ignore[attr-defined]
        part = self._apply_part(_enter(x, mesh, self.style.input_layout, Replicate(), Partial()), ("B",), mesh)
        if self.style.use_local_output and self.style.output_layout in (Shard(-1), Shard(part.dim() - 1)):
            return part
        shape = torch.Size((*part.shape[:-1], self.out_features))
        stride = torch.empty(shape, device="meta").stride()
        y = DTensor.from_local(part, mesh, [Shard(part.dim() - 1)], run_check=False, shape=shape, stride=stride)
        return _leave(y, self.style)


class _Rowwise(_Spread):
    placements = {"weight": Shard(1), "basis": Shard(1)}  # noqa: RUF012 (never changed)

    def forward(self, x: Tensor) -> Tensor:
        """Map x, spread as the style says, to y."""
        mesh: DeviceMesh = self.C.device_mesh  # type: ignore[attr-defined]
        part = self._apply_part(_enter(x, mesh, self.style.input_layout, Shard(-1), Shard(-1)), ("B", "C"), mesh)
        return _leave(DTensor.from_local(part, mesh, [Partial()], run_check=False), self.style)

    def _operands(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Subspaces]:
        weight, bias, B, C, subspaces = super()._operands()
        if bias is not None and bias.requires_grad:
            raise NotImplementedError("bias: expected it frozen in a row-wise layer, got one that requires grad")
        # Every term once in the sum.
        return (
            (weight, bias, B, C, subspaces)
            if self.is_first
            else (weight, None, B, C, subspaces._replace(basis_bias=None))
        )


class ColwiseAdaMSS(_AdaMSSStyle):
    """Spread a `FusedAdaMSSLinear` by output features, as torch's `ColwiseParallel` does `nn.Linear`.

    x is whole on every rank (or is gathered), y is spread over its last dimension. Compared with the bare layer,
    backward sums the gradient of B besides that of x: RHO R numbers.
    """

    default_input, default_output = Replicate(), Shard(-1)
    layer_class = _Colwise


class RowwiseAdaMSS(_AdaMSSStyle):
    """Spread a `FusedAdaMSSLinear` by input features, as torch's `RowwiseParallel` does `nn.Linear`.

    x is spread over its last dimension, y is whole on every rank (or is scattered). Compared with the bare layer,
    forward sums nothing more, and backward the gradients of B and C: RHO R + N r_max numbers, in one call.
    """

    default_input, default_output = Shard(-1), Replicate()
    layer_class = _Rowwise


class _SumGradients(torch.autograd.Function):
    """Hand tensors through, and sum their gradients over the ranks of a group in one call."""

    @staticmethod
    def forward(ctx: Any, group: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat, group=ctx.group)
        sizes = [gradient.numel() for gradient in gradients]
        return None, *(part.view_as(g) for part, g in zip(flat.split(sizes), gradients, strict=True))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _enter(x: Tensor, mesh: DeviceMesh, given: Placement, wanted: Placement, gradient: Placement) -> Tensor:
    """Return this rank's part of x with placement `wanted`; its gradient has placement `gradient`."""
    if not isinstance(x, DTensor):
        if given == wanted == gradient:
            return x
        x = DTensor.from_local(x, mesh, [given], run_check=False)
    # Placements of a DTensor count dimensions from the front.
    wanted, gradient = (Shard(x.dim() - 1) if p == Shard(-1) else p for p in (wanted, gradient))
    if x.placements != (wanted,):
        x = x.redistribute(placements=[wanted])
    return x.to_local(grad_placements=[gradient])


def _leave(y: DTensor, style: _AdaMSSStyle) -> Tensor:
    wanted = Shard(y.dim() - 1) if style.output_layout == Shard(-1) else style.output_layout
    if y.placements != (wanted,):
        y = y.redistribute(placements=[wanted])
    return y.to_local() if style.use_local_output else y

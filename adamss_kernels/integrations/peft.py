"""`apply_adamss_kernels`: run the AdaMSS layers of a PEFT model through the fused kernels, in place."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import peft
import torch
from peft.tuners.adamss.layer import AdamssLayer
from peft.tuners.adamss.layer import Linear as PeftLinear
from peft.tuners.adamss.model import AdamssModel
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import known_backend
from ..functional import fused_linear
from ..layout import SubspaceLayout, block_diagonal, pack_columns
from ..subspaces import Subspaces
from . import peft_rows
from .peft_asa import AdapterAllocation
from .peft_rows import Rows, forget_rows, rows_take

logger = logging.getLogger(__name__)

SUPPORTED_PEFT = ("0.19.0", "0.21.2")
"""First and last release of PEFT that this module is tested with; 0.19.0 is the first one that has AdaMSS."""


class PackedIndex(nn.Module):
    """What one adapter of one layer needs besides PEFT's own tensors to run as a packed AdaMSS layer.

    Everything follows from PEFT's row assignment and basis, so nothing is in the state dict.

    Attributes:
        basis: A (R, D), the contiguous first D columns of `adamss_newB` as it was when last cut.
        basis_bias: a (R,), its last column, or None for a layer without a bias.
        bias: Whether there is such a column.
        row_subspace, offsets: As in `SubspaceLayout`.
        ragged_index: See `SubspaceLayout.ragged_index`.
        trainable: (K,) bool, the subspaces that are not frozen; only valid for the flags it was made of.
        r_max: Columns of the packed C.
    """

    bias: bool
    basis: Tensor
    basis_bias: Tensor | None
    row_subspace: Tensor
    offsets: Tensor
    ragged_index: Tensor
    trainable: Tensor

    def __init__(self, new_B: Tensor, layout: SubspaceLayout, bias: bool) -> None:
        """Cut `new_B` (R, D + bias) into basis and bias column, beside the index tensors of `layout`."""
        super().__init__()
        self.r_max = layout.r_max
        self.flags = [True] * layout.num_subspaces
        self.bias = bias
        self.register_buffer("basis", None, persistent=False)
        self.register_buffer("basis_bias", None, persistent=False)
        self.cut(new_B)
        self.register_buffer("row_subspace", layout.row_subspace, persistent=False)
        self.register_buffer("offsets", layout.offsets, persistent=False)
        self.register_buffer("ragged_index", layout.ragged_index(), persistent=False)
        trainable = torch.tensor(self.flags, device=layout.offsets.device)
        self.register_buffer("trainable", trainable, persistent=False)

    def cut(self, new_B: Tensor) -> None:
        """Take basis and bias column from `new_B`."""
        self.basis = (new_B[:, :-1] if self.bias else new_B).detach().contiguous()
        self.basis_bias = new_B[:, -1].detach().contiguous() if self.bias else None
        self._cut_from = None if new_B.is_inference() else (new_B, new_B._version)

    def follow(self, new_B: Tensor) -> None:
        """Take them again where `new_B` is another tensor than last time, or was changed in place."""
        if torch.compiler.is_compiling():
            return
        cut_from = self._cut_from
        if cut_from is None or new_B is not cut_from[0] or new_B._version != cut_from[1]:
            self.cut(new_B)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedIndex:
        super()._apply(fn, recurse)
        self._cut_from = None
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Copies count their versions anew.
        self._cut_from = None

    def mask(self, flags: list[bool]) -> Tensor | None:
        """Return `flags` (one per subspace) as a device tensor, made again only when they change; None if all hold."""
        if False not in flags:
            return None
        if flags != self.flags:
            if torch.compiler.is_compiling():
                return None
            self.flags = flags
            self.trainable = torch.tensor(flags, device=self.offsets.device)
        return self._buffers["trainable"]


class FusedPeftLinear(PeftLinear):
    """PEFT's AdaMSS layer with another forward; parameters, names and every other method are PEFT's.

    Attributes:
        adamss_index: A `PackedIndex` for every adapter.
        backend: As in `adamss_linear`.
    """

    other_param_names = (*PeftLinear.other_param_names, "adamss_index")
    adamss_index: nn.ModuleDict
    backend: str

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x (..., D) to y (..., N), of the dtype of x, with the updates of all active adapters."""
        base: Any = self._modules["base_layer"]
        if self._disable_adapters or self.merged_adapters or args or kwargs or not _is_bare_linear(base):
            return super().forward(x, *args, **kwargs)
        indices: Any = self._modules["adamss_index"]._modules
        # Asked only where it can matter: what is compiled for other batches does not know of contexts.
        rows = peft_rows.current_rows() if peft_rows.is_mixing else None
        active = [name for name in self.active_adapters if name in indices] if rows is None else []
        parameters = base._parameters
        weight, bias = parameters["weight"], parameters["bias"]
        dtype = x.dtype
        if dtype != weight.dtype:
            x = x.to(weight.dtype)
        if not active:
            y = F.linear(x, weight, bias)
            if rows is not None:
                self._add_by_row(y, x, rows, indices)
            return y.to(dtype)
        index = indices[active[0]]
        B, C, trainable = self._packed(active[0], index)
        buffers: Any = index._buffers
        frozen = (buffers["basis"], buffers["basis_bias"], buffers["row_subspace"], buffers["offsets"])
        y = fused_linear(x, weight, bias, B, C, Subspaces(*frozen, trainable=trainable), backend=self.backend)
        if len(active) > 1:
            y = y + self._further_updates(x, [(name, indices[name]) for name in active[1:]])
        return y if y.dtype is dtype else y.to(dtype)

    def _add_by_row(self, y: Tensor, x: Tensor, rows: Rows, indices: Mapping[str, PackedIndex]) -> None:
        """Add to each row of y (batch, ..., N) the update of the adapter that it takes, if this layer has that one."""
        for name, taken in rows.groups(x).items():
            if name in indices:
                update = self._further_updates(x[taken], [(name, indices[name])])
                y.index_add_(0, taken, update.to(y.dtype))

    def _packed(self, adapter: str, index: PackedIndex) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return B (RHO, R), C (N, r_max) and the mask of the subspaces that are not frozen."""
        modules: Any = self._modules
        index.follow(modules["adamss_newB"]._buffers[adapter])
        As = list(modules["adamss_A"]._modules[adapter]._parameters.values())
        Bs = list(modules["adamss_B"]._modules[adapter]._parameters.values())
        flags = [A.requires_grad or B.requires_grad for A, B in zip(As, Bs)]  # noqa: B905 (keywords cost time here)
        C = pack_columns(Bs, index._buffers["ragged_index"], self.out_features, index.r_max)  # type: ignore[arg-type]
        return torch.cat(As), C, index.mask(flags) if torch.is_grad_enabled() else None

    def _further_updates(self, x: Tensor, adapters: list[tuple[str, PackedIndex]]) -> Tensor:
        """Return the sum of the updates of `adapters`, as one low-rank product of Q = B A and the dense C."""
        Qs, qs, dense = [], [], []
        for name, index in adapters:
            B, C, _ = self._packed(name, index)
            Qs.append(B @ index.basis.to(B.dtype))
            if index.basis_bias is not None:
                qs.append(B @ index.basis_bias.to(B.dtype))
            dense.append(block_diagonal(C, index.row_subspace, index.offsets, B.shape[0]))
        S = F.linear(x, torch.cat(Qs).to(x.dtype), torch.cat(qs).to(x.dtype) if qs else None)
        return F.linear(S, torch.cat(dense).T.to(S.dtype))

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, as PEFT does."""
        super().update_layer(adapter_name, *args, **kwargs)
        self.index_adapter(adapter_name)

    def index_adapter(self, adapter: str) -> None:
        """Make the `PackedIndex` of `adapter` from PEFT's row assignment and the parameters as they are now."""
        row_subspace = torch.empty(self.out_features, dtype=torch.int32, device="cpu")
        for k, owned in enumerate(_segments(self, adapter)):
            row_subspace[owned.cpu()] = k
        base = self.get_base_layer()
        layout = SubspaceLayout(row_subspace.to(base.weight.device), tuple(A.shape[0] for A in self.adamss_A[adapter]))
        self.adamss_index[adapter] = PackedIndex(self.adamss_newB[adapter], layout, base.bias is not None)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # PEFT would give the parameters whatever shape comes, and apply them to the rows of another assignment.
        for adapter in self.adamss_index:
            for k, rows in enumerate(_segments(self, adapter)):
                loaded = state_dict.get(f"{prefix}adamss_B.{adapter}.{k}")
                if loaded is not None and loaded.shape[0] != len(rows):
                    raise _wrong_rows(prefix.removesuffix("."), adapter, k, loaded.shape[0], len(rows))
        super()._load_from_state_dict(state_dict, prefix, *args)


def _index_again(layer: FusedPeftLinear, _: object) -> None:
    """After a state dict has been loaded, children included: take over the new ranks and basis."""
    for adapter in layer.adamss_index:
        layer.index_adapter(adapter)


class FusedPeftModel(AdamssModel):
    """PEFT's AdaMSS tuner, whose new layers are fused ones and whose ASA step covers all subspaces at once.

    Attributes:
        asa_compat: "peft" for PEFT's pruning decisions, None for exact budgets; see docs/asa.md.
        backend: For layers that are still to come.
        allocations: The ASA state of every adapter that is being pruned.
    """

    asa_compat: str | None
    backend: str
    allocations: dict[str, AdapterAllocation]

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        self.allocations.clear()
        super()._create_and_replace(*args, **kwargs)

    def _create_new_module(self, *args: Any, **kwargs: Any) -> nn.Module:
        module = super()._create_new_module(*args, **kwargs)
        if type(module) is PeftLinear:
            _fuse_layer(str(kwargs.get("current_key", "")), module, self.backend)
        return module

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Obey `adapter_names` in a call of the model or of `generate`, which PEFT passes on to here."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        known = {name for module in self.modules() if isinstance(module, AdamssLayer) for name in module.adamss_A}
        with rows_take(self, names, known):
            yield

    def update_and_allocate(self, global_step: int) -> None:
        """Score the step that the optimizer has just done and, where an event is due, freeze subspaces.

        Call it after `optimizer.step()` and before `zero_grad()`, as PEFT's method of that name.

        Args:
            global_step: Number of this optimizer step, counted as `init_warmup` and `final_warmup` are.

        Raises:
            ValueError: At an event, a score is not finite; the message names the layer.

        Warns:
            UserWarning: At an event, all scores are zero.
        """
        for adapter in self.active_adapters:
            config = self.peft_config[adapter]
            if not config.use_asa or not config.init_warmup <= global_step <= config.final_warmup:
                continue
            allocation = self.allocations.get(adapter)
            if allocation is None or not allocation.is_current():
                layers = {
                    name: module
                    for name, module in self.model.named_modules()
                    if isinstance(module, AdamssLayer) and adapter in module.exp_avg_ipt_A
                }
                allocation = self.allocations[adapter] = AdapterAllocation(layers, adapter, config)
            budget = self._schedule_threshold(global_step, config) if self.asa_compat == "peft" else None
            allocation.update(global_step, budget)

    def __getstate__(self) -> dict[str, Any]:
        # PEFT's lists on the layers are the state; allocations are rebuilt from them.
        return self.__dict__ | {"allocations": {}}


def apply_adamss_kernels(model: nn.Module, *, asa_compat: str | None = "peft", backend: str = "auto") -> nn.Module:
    """Let the AdaMSS layers of a PEFT model run through the fused kernels, and its ASA step cover all layers at once.

    The layers change their class and nothing else: parameters, names, state dict, checkpoints and every PEFT method
    (`disable_adapter`, `merge_adapter`, `set_adapter`, `add_adapter`, ...) stay as they are, optimizers stay valid, and
    stock PEFT loads what is saved. What PEFT adds to the model later is fused too. A layer whose base is not exactly
    an `nn.Linear`, has hooks, or has a weight that is quantised, sharded or computed from others (by pruning or a
    parametrisation), keeps computing what stock PEFT computes.

    Args:
        model: A `PeftModel`, or a model into which PEFT has injected AdaMSS layers; changed in place.
        asa_compat: Whose pruning decisions `update_and_allocate` takes: "peft" for those of PEFT, its one subspace too
            few included; None for exact budgets (docs/asa.md).
        backend: "auto" or the name of a backend; see `available_backends`.

    Returns:
        `model` itself.

    Raises:
        ImportError: The installed PEFT is outside `SUPPORTED_PEFT` and its AdaMSS differs.
        ValueError: The model has no AdaMSS layer of PEFT, an argument is not one of its choices, or the adapter of a
            layer was trained on another row assignment than PEFT has rebuilt from the base weight (PEFT itself is
            silent about that, and wrong). The message names the layer; nothing is changed.
        TypeError: A layer is a subclass of PEFT's AdaMSS layer that is not known here.
    """
    if asa_compat not in ("peft", None):
        raise ValueError(f"asa_compat: expected 'peft' or None, got {asa_compat!r}")
    backend = known_backend(backend)
    _require_known_peft()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdamssLayer)}
    if not layers:
        raise ValueError("model: has no AdaMSS layer of PEFT; adapt it with peft.get_peft_model and AdamssConfig first")
    for name, layer in layers.items():
        if type(layer) not in (PeftLinear, FusedPeftLinear):
            raise TypeError(f"{name}: expected an AdaMSS layer of PEFT itself, got its subclass {type(layer).__name__}")
        _check_rows(name, layer)
    for name, layer in layers.items():
        _fuse_layer(name, layer, backend)
    tuners: list[Any] = [m for m in model.modules() if type(m) in (AdamssModel, FusedPeftModel)]
    for tuner in tuners:
        tuner.__class__ = FusedPeftModel
        tuner.asa_compat, tuner.backend, tuner.allocations = asa_compat, backend, {}
    return model


def revert_adamss_kernels(model: nn.Module) -> nn.Module:
    """Undo `apply_adamss_kernels`: the layers are PEFT's own again, with the values that they have now.

    Returns:
        `model` itself.
    """
    for module in model.modules():
        if type(module) is FusedPeftModel:
            for allocation in module.allocations.values():
                allocation.release()
            del module.asa_compat, module.backend, module.allocations
            module.__class__ = AdamssModel
        elif type(module) is FusedPeftLinear:
            hooks = module._load_state_dict_post_hooks
            for key in [key for key, hook in hooks.items() if hook is _index_again]:
                del hooks[key]
            del module.adamss_index, module.backend
            module.__class__ = PeftLinear
    forget_rows(model)
    return model


def _fuse_layer(name: str, layer: Any, backend: str) -> None:
    """Make PEFT's `layer` a fused one; of a layer that is one already, only the backend changes."""
    if type(layer) is PeftLinear:
        layer.adamss_index = nn.ModuleDict()
        layer.__class__ = FusedPeftLinear
        layer.register_load_state_dict_post_hook(_index_again)
        for adapter in layer.adamss_A:
            layer.index_adapter(adapter)
    layer.backend = backend


def _is_bare_linear(base: Any) -> bool:
    """Whether calling `base` computes x W^T + bias with a plain W, and nothing else."""
    return type(base) is nn.Linear and not (
        type(base._parameters.get("weight")) is not nn.Parameter  # none where it is computed, as by pruning
        or base._forward_hooks
        or base._forward_pre_hooks
        or base._backward_hooks
        or base._backward_pre_hooks
        or "forward" in base.__dict__
    )


def _segments(layer: Any, adapter: str) -> list[Tensor]:
    """Return the rows of every subspace of `adapter`, as PEFT has assigned them."""
    order = layer.train_subspace_index[adapter]
    return [layer.seg_result[adapter][order[k]] for k in range(layer.num_subspaces[adapter])]


def _check_rows(name: str, layer: Any) -> None:
    """Raise where a loaded matrix does not have the rows that PEFT's row assignment gives it."""
    for adapter, Bs in layer.adamss_B.items():
        for k, (B, rows) in enumerate(zip(Bs, _segments(layer, adapter), strict=True)):
            if B.shape[0] != len(rows):
                raise _wrong_rows(name, adapter, k, B.shape[0], len(rows))


def _wrong_rows(name: str, adapter: str, k: int, trained: int, rebuilt: int) -> ValueError:
    return ValueError(
        f"{name}: subspace {k} of adapter {adapter!r} was trained on {trained} rows, but PEFT rebuilds the row "
        f"assignment from the base weight, and this base gives it {rebuilt}: it is not the base that the adapter was "
        "trained on (a rounded copy is enough to differ; before PEFT 0.20, so is another state of the global random "
        "generator), and the update would land on the wrong rows"
    )


def _require_known_peft() -> None:
    """Raise where the installed PEFT is untested and its AdaMSS lacks what this module relies on."""
    first, last = (tuple(map(int, version.split("."))) for version in SUPPORTED_PEFT)
    found = tuple(int(part) for part in peft.__version__.split(".")[:3] if part.isdigit())
    if first <= found <= last:
        return
    needed = {"seg_result", "train_subspace_index", "num_subspaces", "exp_avg_ipt_A", "exp_avg_unc_A"}
    missing = sorted(needed - set(PeftLinear.other_param_names))
    missing += [name for name in ("update_and_allocate", "_schedule_threshold") if not hasattr(AdamssModel, name)]
    if PeftLinear.adapter_layer_names != ("adamss_A", "adamss_B") or missing:
        raise ImportError(
            f"peft {peft.__version__}: its AdaMSS layer differs ({', '.join(missing) or 'other parameters'}); "
            f"expected peft {SUPPORTED_PEFT[0]} to {SUPPORTED_PEFT[1]}"
        )
    message = "peft %s is outside of the tested releases, %s to %s; its AdaMSS looks the same"
    logger.warning(message, peft.__version__, *SUPPORTED_PEFT)

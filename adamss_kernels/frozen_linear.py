"""`FrozenLinear`: what adapted layers share, a frozen weight into which an update is merged and out again."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from .offload import is_offloaded, weights_present

BASE_KEYS = ("weight", "bias", "original_weight", "original_bias")
"""Names in the state dict of a layer that are not the update's; the last two are there while the layer is merged."""


LAYERS_BY_METHOD: dict[str, type[Any]] = {}
"""Layers beside AdaMSS's that checkpoints hold, by the name of their method: classes with attributes `method` and
`options`, and `from_linear(linear, **options)`. Whoever makes them registers them here."""
LAYERS_OVER_BASE: dict[str, type[Any]] = {}
"""Likewise those over a base of another library: each the class above with `over_base.OverBase` before it, made by
`(base, kind, weight, **options)`."""


class FrozenLinear(nn.Module):
    """A linear layer with a frozen weight and a trainable update of it; a method adds `forward` and `update_matrix`.

    With `with_update` beside them it goes over bases of other libraries, too (`over_base.py`).

    Whatever is a parameter beside `weight` and `bias` is the method's and trains; what the method keeps fixed is a
    buffer.

    The state dict of a merged layer has the merged `weight` and `bias`, right for a plain `nn.Linear` of a model that
    is saved merged, and beside them `original_weight` and `original_bias`, which an adapted layer takes instead.

    Attributes:
        weight: W (N, D), frozen, the parameter of the layer it replaces.
        bias: (N,), frozen, or None.
        modules_to_save: Names of the modules of the whole model that train with this layer and are saved with it.
    """

    weight: Tensor
    bias: Tensor | None
    modules_to_save: tuple[str, ...] = ()

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Hold W and bias.

        Args:
            weight: Parameter W (N, D), shared, not copied.
            bias: Parameter (N,) or None; likewise.
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)
        self.bias = bias
        self._original: tuple[nn.Parameter, nn.Parameter | None] | None = None

    @property
    def merged(self) -> bool:
        """Whether the update is folded into `weight` and `bias`."""
        return self._original is not None

    @property
    def original_weight(self) -> nn.Parameter | None:
        """The parameter that `unmerge` gives back as `weight`; None when not merged. A key of the state dict."""
        return None if self._original is None else self._original[0]

    @property
    def original_bias(self) -> nn.Parameter | None:
        """The parameter that `unmerge` gives back as `bias`, likewise."""
        return None if self._original is None else self._original[1]

    def update_matrix(self) -> Tensor:
        """Return what `delta_weight` does, differentiable in the update's parameters."""
        raise NotImplementedError

    def with_update(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y (..., N), which a base of another library has computed of x (..., D), plus the update.

        y is nobody else's, so that its memory may be taken.
        """
        raise NotImplementedError

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the update of W: (N, D), float32 (float64 for float64 parameters)."""
        return self.update_matrix()

    def delta_bias(self) -> Tensor | None:
        """Return the update of the bias: (N,), dtype as `delta_weight`; None where the bias is left alone."""
        return None

    def freeze_base(self) -> None:
        """Stop W and bias from training."""
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def train_update(self) -> None:
        """Let the parameters of the update train, and only them."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in ("weight", "bias"))

    def _merged_parameters(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
        """Return W and bias plus their updates, summed in the update's dtype and rounded once, to W's or to `dtype`."""
        W, bias = self.base_parameters()
        weight, delta_bias = (W + self.delta_weight()).to(dtype or W.dtype), self.delta_bias()
        if bias is not None:
            bias = (bias if delta_bias is None else bias + delta_bias).to(dtype or bias.dtype)
        if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError("merge: the merged weight or bias is not finite; the adapter has diverged")
        return weight, bias

    # Outside of inference mode, whose tensors could never take part in training again.
    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, *, keep_original_on: str | torch.device = "cpu") -> None:
        """Fold the update into new `weight` and `bias` parameters; a no-op when already merged.

        Parameters that other modules share (tied weights) keep their values. Until `unmerge`, changes of the update
        or its masks do not count.

        Args:
            keep_original_on: Device that holds the values of the original parameters until `unmerge`. Of a parameter
                that is held elsewhere too, by a tied module or an optimizer, they stay where they are.

        Raises:
            ValueError: The merged weight would not be finite; nothing is changed.
            TypeError: The weight or bias is no parameter but computed from others, by pruning or a parametrisation; or
                accelerate offloads it.
        """
        if self.merged:
            return
        if is_offloaded(self):
            raise TypeError(
                "merge: accelerate keeps the weight off its device, and would bring the original again; save the "
                "adapter and load it onto a model that is not offloaded"
            )
        own: dict[str, Any] = self._parameters
        for name in ("weight", "bias"):
            if name not in own:
                raise TypeError(f"merge: expected {name} to be a parameter, but it is computed from others (pruned?)")
        weight, bias = self._merged_parameters()
        for name, parameter in (("weight", weight), ("bias", bias)):
            # With no other reference than those of `own` and this call's argument, nobody sees the values leave.
            if parameter is not None and sys.getrefcount(own[name]) == 2:
                _move(own[name], keep_original_on)
        self._original = (own["weight"], own["bias"])
        self.weight = nn.Parameter(self._stored(weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original `weight` and `bias`, the same parameters, bit for bit; a no-op when not merged.

        Where the merged layer was moved or cast, they follow.
        """
        if self._original is None:
            return
        merged = self.weight
        for name, parameter in zip(("weight", "bias"), self._original, strict=True):
            if parameter is not None and (parameter.device, parameter.dtype) != (merged.device, merged.dtype):
                if torch._has_compatible_shallow_copy_type(parameter, merged):
                    parameter.data = parameter.data.to(merged)
                else:  # as `nn.Module.to` does
                    parameter = nn.Parameter(parameter.to(merged), parameter.requires_grad)
            setattr(self, name, parameter)
        self._original = None

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a plain `nn.Linear` with the update folded in, independent of this layer.

        Args:
            dtype: Of its parameters; None for that of the frozen weight, dequantised where it is quantised.

        Raises:
            ValueError: The weight or bias would not be finite.
        """
        weight, bias = self._dense() if self.merged else self._merged_parameters(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(_contiguous_copy(weight, dtype))
        if bias is not None:
            linear.bias = nn.Parameter(_contiguous_copy(bias, dtype))
        return linear.train(self.training)

    def unloaded(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return what `merge_and_unload` puts in this layer's place: `to_linear`."""
        return self.to_linear(dtype)

    def _dense(self) -> tuple[Tensor, Tensor | None]:
        """Return W (N, D) and bias as they stand, merged or not."""
        return self.weight, self.bias

    def _stored(self, weight: Tensor) -> Tensor:
        """Return a weight (N, D) as `self.weight` holds it."""
        return weight

    def update_state(self) -> dict[str, Tensor]:
        """Return what of the state dict is the update's."""
        return {key: t for key, t in self.state_dict().items() if key not in BASE_KEYS}

    def base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W and bias without the update, merged or not (then where `merge` keeps them)."""
        with weights_present(self):
            weight, bias = self._original or (self.weight, self.bias)
            return weight.detach(), None if bias is None else bias.detach()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._save_base(destination, prefix, keep_vars)
        for name, original in (("original_weight", self.original_weight), ("original_bias", self.original_bias)):
            if original is not None:
                destination[prefix + name] = original if keep_vars else original.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.unmerge()
        # Beside the update's parameters the merged weight would apply the update twice.
        for name in ("weight", "bias"):
            if prefix + "original_" + name in state_dict:
                state_dict[prefix + name] = state_dict.pop(prefix + "original_" + name)
        self._load_base(state_dict, prefix, *args)

    def _save_base(self, *args: Any) -> None:
        nn.Module._save_to_state_dict(self, *args)

    def _load_base(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)


def _contiguous_copy(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).clone(memory_format=torch.contiguous_format)


def _move(parameter: nn.Parameter, device: str | torch.device) -> None:
    """Move the values of a frozen parameter to `device`, unless a graph needs them where they are."""
    if parameter.requires_grad or parameter.is_inference() or parameter._use_count() > 1:  # type: ignore[attr-defined]
        return
    moved = parameter.data.to(device)
    if torch._has_compatible_shallow_copy_type(parameter, moved):
        parameter.data = moved

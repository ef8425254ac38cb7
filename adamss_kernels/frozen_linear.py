"""`FrozenLinear`: what adapted layers share, a frozen weight into which an update is merged and out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FrozenLinear(nn.Module):
    """A linear layer with a frozen weight and a trainable update of it; a method adds `forward` and `delta_weight`.

    Whatever is a parameter beside `weight` and `bias` is the method's and trains; what the method keeps fixed is a
    buffer.

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
        self._original: tuple[Tensor, Tensor | None] | None = None

    @property
    def merged(self) -> bool:
        """Whether the update is folded into `weight` and `bias`."""
        return self._original is not None

    def delta_weight(self) -> Tensor:
        """Return the update of W: (N, D), float32 (float64 for float64 parameters)."""
        raise NotImplementedError

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

    def _merged_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W and bias plus their updates, summed in the update's dtype and rounded once."""
        weight = (self.weight + self.delta_weight()).to(self.weight.dtype)
        bias, delta_bias = self.bias, self.delta_bias()
        if bias is not None and delta_bias is not None:
            bias = (bias + delta_bias).to(bias.dtype)
        if not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            raise ValueError("merge: the merged weight or bias is not finite; the adapter has diverged")
        return weight, bias

    # Outside of inference mode, whose tensors could never take part in training again.
    @torch.inference_mode(False)
    @torch.no_grad()
    def merge(self, *, keep_original_on: str | torch.device = "cpu") -> None:
        """Fold the update into new `weight` and `bias` parameters; a no-op when already merged.

        Parameters that other modules share (tied weights) keep their values. The state dict stays that of the
        unmerged layer.

        Args:
            keep_original_on: Device that holds the original weight until `unmerge`.

        Raises:
            ValueError: The merged weight would not be finite; nothing is changed.
        """
        if self.merged:
            return
        weight, bias = self._merged_parameters()
        self._original = (
            self.weight.detach().to(keep_original_on, copy=True),
            None if self.bias is None else self.bias.detach().to(keep_original_on, copy=True),
        )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the original `weight` and `bias` bit for bit; a no-op when not merged."""
        if self._original is None:
            return
        weight, bias = self._original
        self.weight = nn.Parameter(weight.to(self.weight), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(self.weight), requires_grad=False)
        self._original = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the update folded in, independent of this layer."""
        weight, bias = (self.weight, self.bias) if self.merged else self._merged_parameters()
        linear = nn.Linear(self.in_features, self.out_features, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear.train(self.training)

    def base_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return W and bias without the update, merged or not (then on the device that `merge` was told)."""
        return self._original or (self.weight.detach(), None if self.bias is None else self.bias.detach())

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._original is not None:
            # Loading a merged weight beside the update's parameters would apply the update twice.
            destination[prefix + "weight"], original_bias = self._original
            if original_bias is not None:
                destination[prefix + "bias"] = original_bias

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(state_dict, prefix, *args)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def plain_linear(name: str, module: nn.Module) -> nn.Linear:
    """Return `module` if it is a linear layer that can be adapted.

    Raises:
        TypeError: It is not exactly an `nn.Linear`, or its weight is not a plain floating-point parameter (but
            quantised, sharded, or computed from others).
    """
    if type(module) is not nn.Linear:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        raise TypeError(f"{name!r} is a {kind}; only torch.nn.Linear itself can be adapted")
    weight: object = module.weight
    if type(weight) is not nn.Parameter:
        raise TypeError(
            f"the weight of {name!r} is a {type(weight).__module__}.{type(weight).__qualname__}; only a plain "
            "torch.nn.Parameter can be adapted, so adapt the model before it is quantised or sharded"
        )
    if weight.dtype not in _DTYPES:
        raise TypeError(
            f"the weight of {name!r} is of dtype {weight.dtype}; expected one of {_DTYPES}, so adapt the model before "
            "it is quantised"
        )
    return module

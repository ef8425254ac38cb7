"""The related methods over linear layers of other libraries, each of which goes on computing its own product."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..bases import Kind
from ..over_base import OverBase
from .kradapter import KRAdapterLinear
from .kronecker import KroneckerLinear
from .layer import AdapterLinear
from .lora import LoRALinear
from .randlora import RandLoRALinear
from .sinlora import SinLoRALinear
from .spectral_additive import SpectralAdditiveLinear
from .spectral_rotational import SpectralRotationalLinear


class AdapterOverBase(OverBase, AdapterLinear):
    """A frozen linear layer of another library with the trainable update of one method: y = base(x) + x dW^T."""

    def __init__(self, base: nn.Module, kind: Kind, weight: Tensor, **options: Any) -> None:
        """Assemble a layer; `inject_adapter` is the usual way.

        Args:
            base: Left as it is; its parameters are shared.
            kind: How it is read.
            weight: Its W (N, D), dequantised; what the method needs of it is taken, and it is let go.
            **options: The method's settings.

        Raises:
            ValueError: As the method's own constructor.
        """
        super().__init__(nn.Parameter(weight, requires_grad=False), None, **options)
        self.bind_base(base, kind)


# By name, so that layers can be pickled.


class LoRAOverBase(AdapterOverBase, LoRALinear):
    """`LoRALinear` over a base of another library."""


class SinLoRAOverBase(AdapterOverBase, SinLoRALinear):
    """`SinLoRALinear` over a base of another library."""


class RandLoRAOverBase(AdapterOverBase, RandLoRALinear):
    """`RandLoRALinear` over a base of another library."""


class KroneckerOverBase(AdapterOverBase, KroneckerLinear):
    """`KroneckerLinear` over a base of another library."""


class KRAdapterOverBase(AdapterOverBase, KRAdapterLinear):
    """`KRAdapterLinear` over a base of another library."""


class SpectralAdditiveOverBase(AdapterOverBase, SpectralAdditiveLinear):
    """`SpectralAdditiveLinear` over a base of another library, whose dequantised W it decomposes."""


class SpectralRotationalOverBase(AdapterOverBase, SpectralRotationalLinear):
    """`SpectralRotationalLinear` over a base of another library, whose dequantised W it decomposes."""


METHODS_OVER_BASE: dict[str, type[AdapterOverBase]] = {
    layer.method: layer for layer in AdapterOverBase.__subclasses__()
}
"""Name of each method and the layer that has it over a base of another library: the classes above."""

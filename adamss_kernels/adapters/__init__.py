"""The methods that AdaMSS is compared with, as layers with the interface of `FusedAdaMSSLinear`."""

from .inject import METHODS, inject_adapter
from .kradapter import KRAdapterLinear
from .kronecker import KroneckerLinear
from .layer import AdapterLinear
from .lora import LoRALinear
from .randlora import RandLoRALinear
from .sinlora import SinLoRALinear
from .spectral_additive import SpectralAdditiveLinear
from .spectral_rotational import SpectralRotationalLinear

__all__ = [
    "METHODS",
    "AdapterLinear",
    "KRAdapterLinear",
    "KroneckerLinear",
    "LoRALinear",
    "RandLoRALinear",
    "SinLoRALinear",
    "SpectralAdditiveLinear",
    "SpectralRotationalLinear",
    "inject_adapter",
]

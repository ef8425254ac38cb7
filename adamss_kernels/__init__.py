"""Fused kernels for AdaMSS fine-tuning; see the README for the formula and the two ways to use it."""

from .asa import SubspaceAllocator
from .checkpoint import BaseWeightWarning, load_adapter, save_adapter
from .config import AdaMSSConfig
from .formats import export_lora, export_peft
from .functional import adamss_linear
from .layout import SubspaceLayout
from .linear import FusedAdaMSSLinear
from .model import inject_adamss
from .ops import available_backends

__all__ = [
    "AdaMSSConfig",
    "BaseWeightWarning",
    "FusedAdaMSSLinear",
    "SubspaceAllocator",
    "SubspaceLayout",
    "adamss_linear",
    "available_backends",
    "export_lora",
    "export_peft",
    "inject_adamss",
    "load_adapter",
    "save_adapter",
]
__version__ = "0.1.0"

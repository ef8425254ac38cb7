"""Fused kernels for AdaMSS fine-tuning; see the README for the formula and the two ways to use it."""

import importlib
from typing import TYPE_CHECKING, Any

from . import adapters  # noqa: F401 (registers what checkpoints may hold)
from .asa import SubspaceAllocator
from .bank import AdapterBank
from .checkpoint import BaseWeightWarning, load_adapter, save_adapter
from .config import AdaMSSConfig
from .formats import export_lora, export_peft
from .functional import adamss_linear
from .layout import SubspaceLayout
from .linear import FusedAdaMSSLinear
from .merge import merge_and_unload
from .model import inject_adamss, print_trainable_parameters
from .ops import available_backends

if TYPE_CHECKING:
    from .integrations.peft import apply_adamss_kernels, revert_adamss_kernels
    from .integrations.transformers import ASACallback

__all__ = [
    "ASACallback",
    "AdaMSSConfig",
    "AdapterBank",
    "BaseWeightWarning",
    "FusedAdaMSSLinear",
    "SubspaceAllocator",
    "SubspaceLayout",
    "adamss_linear",
    "apply_adamss_kernels",
    "available_backends",
    "export_lora",
    "export_peft",
    "inject_adamss",
    "load_adapter",
    "merge_and_unload",
    "print_trainable_parameters",
    "revert_adamss_kernels",
    "save_adapter",
]
__version__ = "0.1.0"

# Names that need an optional library are imported when they are first asked for.
_LAZY = {
    "ASACallback": "transformers",
    "apply_adamss_kernels": "peft",
    "revert_adamss_kernels": "peft",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f".integrations.{_LAZY[name]}", __name__)
    except ImportError as error:
        extra = "pip install 'adamss-kernels[hf]'"
        raise ImportError(f"{name} needs {_LAZY[name]}, which cannot be imported ({error}); {extra}") from error
    return globals().setdefault(name, getattr(module, name))

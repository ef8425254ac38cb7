"""Loads the model that an adapter belongs to, by transformers."""

from __future__ import annotations

from typing import Any

from torch import nn


def load_base(base: str, model_class: str | None = None, num_labels: int | None = None) -> nn.Module:
    """Return the model `base` (a name or a folder), of the architecture in its config or of `model_class`.

    Raises:
        ImportError: transformers is missing.
        ValueError: Its config names no architecture, or transformers has no such class.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("loading the base needs transformers: pip install 'adamss-kernels[hf]'") from error
    names = (model_class,) if model_class else transformers.AutoConfig.from_pretrained(base).architectures
    if not names:
        raise ValueError(f"--base {base}: its config names no architecture; name one with --model-class")
    found = getattr(transformers, names[0], None)
    if not hasattr(found, "from_pretrained"):
        raise ValueError(f"--model-class: transformers has no model class {names[0]!r}")
    options: dict[str, Any] = {"dtype": "auto"}
    if num_labels is not None:
        options |= {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    model: nn.Module = found.from_pretrained(base, **options)  # type: ignore[union-attr]
    return model.eval()

"""What PEFT's checkpoints of every kind have in common: two files, their header, and which modules they mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adapter_file import TENSORS_FILE
from ..atomic import replace_file
from ..distributed import full_tensor, is_writer, reshard, together, unwrap
from ..linear import FusedAdaMSSLinear
from ..model import adamss_layers, adapted_layers, saved_modules, saved_names

PEFT_CONFIG_FILE = "adapter_config.json"


PEFT_TENSORS_FILE = "adapter_model.safetensors"


PREFIX = "base_model.model."


def read_peft_config(directory: Path) -> dict[str, Any]:
    """Return the contents of `adapter_config.json`.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not a JSON object.
    """
    path = directory / PEFT_CONFIG_FILE
    if not path.is_file():
        ours = (directory / TENSORS_FILE).is_file()
        advice = "; load_adapter loads what is there, which save_adapter wrote" if ours else ""
        raise FileNotFoundError(f"{path}: no such file; expected a checkpoint written by PEFT{advice}")
    try:
        header = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(header).__name__}")
    return header


def exportable_layers(model: nn.Module) -> dict[str, FusedAdaMSSLinear]:
    """Return the AdaMSS layers of `model` by name.

    Raises:
        ValueError: There is none, one of another method besides, or one is registered under two names.
    """
    root = unwrap(model)
    reshard(root)
    layers = adamss_layers(root)
    if not layers:
        raise ValueError("model: has no FusedAdaMSSLinear; adapt it with inject_adamss first")
    for name, layer in adapted_layers(root).items():
        if name not in layers:
            raise ValueError(
                f"{name}: is a {type(layer).__name__}, whose update would be left out; only AdaMSS has an export"
            )
    for name, module in root.named_modules(remove_duplicate=False):
        if isinstance(module, FusedAdaMSSLinear) and name not in layers:
            first = next(n for n, layer in layers.items() if layer is module)
            raise ValueError(f"{name}: is the same module as {first!r}; PEFT would adapt it under one name only")
    return layers


def saved_tensors(root: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of `modules_to_save`, by their names in a file."""
    return {
        f"{PREFIX}{name}.{key}": full_tensor(tensor)
        for name, module in saved_modules(root).items()
        for key, tensor in module.state_dict().items()
    }


def common_header(kind: str, root: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return the fields of `adapter_config.json` that every kind of adapter has."""
    saved = list(saved_modules(root))
    base = getattr(getattr(root, "config", None), "_name_or_path", None)
    return {
        "peft_type": kind,
        "base_model_name_or_path": base or None,
        "task_type": None,
        "inference_mode": True,
        "target_modules": _target_modules(root, set(names), saved),
        "modules_to_save": _peft_modules_to_save(root, saved),
    }


def _target_modules(root: nn.Module, wanted: set[str], saved: list[str]) -> list[str] | str:
    """Return the shortest selection by PEFT's rules that means exactly the modules `wanted`."""
    everything = [name for name, _ in root.named_modules()]
    free = [n for n in everything if not any(n == s or n.startswith(s + ".") for s in saved)]
    for suffixes in ({name.rsplit(".", 1)[-1] for name in wanted}, wanted):
        if {n for n in free if n in suffixes or any(n.endswith("." + suffix) for suffix in suffixes)} == wanted:
            return sorted(suffixes)
    return "|".join(re.escape(name) for name in sorted(wanted))


def _peft_modules_to_save(root: nn.Module, saved: list[str]) -> list[str] | None:
    """Return names that PEFT, which compares the ends of names letter by letter, takes for exactly `saved`."""
    if not saved:
        return None
    for inner in saved:
        for outer in saved:
            if inner.startswith(outer + "."):
                raise ValueError(
                    f"modules_to_save: PEFT cannot load {inner!r}, which {outer!r} holds; name one of them"
                )
    everything = [name for name, _ in root.named_modules(remove_duplicate=False)]
    for names in (saved_names(root), saved):
        if {n for n in everything if any(n.endswith(name) for name in names)} == set(saved):
            return names
    extra = min(n for n in everything if any(n.endswith(name) for name in saved) and n not in saved)
    raise ValueError(f"modules_to_save: PEFT would also save {extra!r}, whose name ends like one of {saved}")


def write_checkpoint(
    model: nn.Module, directory: str | os.PathLike[str], header: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Write both files; wherever there is a config, the tensors beside it are those that it describes."""
    from safetensors.torch import save_file

    # Copies: safetensors refuses tensors that share memory.
    tensors = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    directory = Path(directory)
    with together(unwrap(model)):
        if is_writer(model):
            directory.mkdir(parents=True, exist_ok=True)
            (directory / PEFT_CONFIG_FILE).unlink(missing_ok=True)
            tensors_file = directory / PEFT_TENSORS_FILE
            replace_file(tensors_file, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
            text = json.dumps(header, indent=2, sort_keys=True)
            replace_file(directory / PEFT_CONFIG_FILE, lambda path: path.write_text(text + "\n"))
    return directory / PEFT_TENSORS_FILE

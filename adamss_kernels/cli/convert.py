"""Convert an adapter between formats: adamss (ours), peft, lora, and merged (a plain model).

The format that comes is recognised; `--to` says which one goes out. A LoRA can only be merged, because an arbitrary
low-rank update has no AdaMSS form, and a merged model cannot be taken apart again. The output folder appears complete
or not at all. `--dry-run` converts into a temporary folder, lists what is there, and deletes it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ..adapter_file import HEADER_FILE, TENSORS_FILE
from ..atomic import replace_folder
from ..checkpoint import load_adapter, save_adapter
from ..formats import PEFT_CONFIG_FILE, PEFT_TENSORS_FILE, export_lora, export_peft, import_peft, read_peft_config
from ..merge import merge_and_unload
from ..model import adapted_layers
from .base_model import load_base

FORMATS = ("adamss", "peft", "lora", "merged")
_POSSIBLE = {"adamss": FORMATS, "peft": FORMATS, "lora": ("merged",)}
# What a served model needs beside its weights.
_COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template*",
)
_OUTPUTS = (TENSORS_FILE, HEADER_FILE, PEFT_CONFIG_FILE, PEFT_TENSORS_FILE, "config.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `convert`."""
    parser.add_argument("--base", required=True, metavar="MODEL_OR_FOLDER", help="the model that was adapted")
    parser.add_argument("--adapter", required=True, type=Path, metavar="DIR", help="the adapter to convert")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument("--model-class", help="class in transformers (default: the base config's first architecture)")
    parser.add_argument("--num-labels", type=int, help="labels of a classification head that the base lacks")
    parser.add_argument("--no-bias", action="store_true", help="lora only: leave the update of biases out")
    parser.add_argument("--compact", action="store_true", help="adamss only: leave the basis out (see save_adapter)")
    parser.add_argument("--force", action="store_true", help="replace an output folder that holds an earlier output")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Convert; the status is 1 when that was refused, with the reason on stderr."""
    try:
        _convert(args)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def adapter_format(directory: Path) -> str:
    """Return which format the adapter in `directory` has: "adamss", "peft" or "lora".

    Raises:
        ValueError: None of them.
    """
    if (directory / TENSORS_FILE).is_file():
        return "adamss"
    if (directory / PEFT_CONFIG_FILE).is_file():
        kind = read_peft_config(directory).get("peft_type")
        if kind in ("ADAMSS", "LORA"):
            return "peft" if kind == "ADAMSS" else "lora"
        raise ValueError(f"--adapter {directory}: holds a PEFT adapter of type {kind!r}, expected 'ADAMSS' or 'LORA'")
    if not directory.is_dir():
        raise ValueError(
            f"--adapter {directory}: {'a file, expected a' if directory.is_file() else 'no such'} directory"
        )
    raise ValueError(f"--adapter {directory}: has neither {TENSORS_FILE} nor {PEFT_CONFIG_FILE}")


def _convert(args: argparse.Namespace) -> None:
    source = adapter_format(args.adapter)
    if args.to not in _POSSIBLE[source]:
        raise ValueError(f"--to {args.to}: a {source} adapter can only become {', '.join(_POSSIBLE[source])}")
    for option, only in (("no_bias", "lora"), ("compact", "adamss")):
        if getattr(args, option) and args.to != only:
            raise ValueError(f"--{option.replace('_', '-')}: has a meaning for --to {only} only, got --to {args.to}")
    _check_output(args)

    with tqdm(total=3, desc=f"{source} to {args.to}", unit="stage") as bar, warnings.catch_warnings():
        # Once per layer, however many layers there are, and not in the middle of the bar.
        warnings.showwarning = lambda message, *_: bar.write(f"warning: {message}", file=sys.stderr)
        bar.set_postfix_str("load base")
        model = load_base(args.base, args.model_class, args.num_labels)
        bar.update()
        bar.set_postfix_str("read adapter")
        model = _read(model, args.adapter, source)
        bar.update()
        bar.set_postfix_str("write")
        with _destination(args) as folder:
            _write(model, folder, args)
            bar.update()
            bar.set_postfix_str("")
            listing = [line for path in sorted(folder.rglob("*")) for line in _describe(path, folder, args.dry_run)]
    total = "nothing was written" if args.dry_run else f"written to {args.out}"
    print("\n".join([*listing, total]))


def _check_output(args: argparse.Namespace) -> None:
    """Raise unless `--out` is free, or may be replaced."""
    out = args.out.resolve()
    inputs = {args.adapter.resolve(), Path(args.base).resolve()}
    if any(out == path or out in path.parents for path in inputs):
        raise ValueError(f"--out {args.out}: holds what is to be converted; choose another folder")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not args.force:
        raise FileExistsError(f"--out {args.out}: exists already; --force replaces it")
    if not out.is_dir() or not any((out / name).is_file() for name in _OUTPUTS):
        raise FileExistsError(f"--out {args.out}: is not an earlier output, so --force does not replace it")


def _read(model: nn.Module, adapter: Path, source: str) -> nn.Module:
    if source == "adamss":
        return load_adapter(model, adapter)
    if source == "peft":
        return import_peft(model, adapter)
    try:
        import peft
    except ImportError as error:
        raise ImportError("converting a LoRA needs peft: pip install 'adamss-kernels[hf]'") from error
    merged: nn.Module = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged


def _write(model: nn.Module, folder: Path, args: argparse.Namespace) -> None:
    writers: dict[str, Callable[[], object]] = {
        "adamss": lambda: save_adapter(model, folder, compact=args.compact),
        "peft": lambda: export_peft(model, folder),
        "lora": lambda: export_lora(model, folder, bias=not args.no_bias),
        "merged": lambda: _write_merged(model, folder, Path(args.base)),
    }
    writers[args.to]()


def _write_merged(model: Any, folder: Path, base: Path) -> None:
    if adapted_layers(model):
        merge_and_unload(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and embedding is not None and head.weight is not embedding.weight:
        # An adapted head is no longer the embedding that it was tied to; loading must not tie them again.
        model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    for pattern in _COMPANIONS:
        for path in base.glob(pattern) if base.is_dir() else ():
            shutil.copyfile(path, folder / path.name)


@contextmanager
def _destination(args: argparse.Namespace) -> Iterator[Path]:
    """Give a folder to write into, which becomes `--out` at the end, or vanishes in a dry run."""
    if args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        with replace_folder(args.out.resolve()) as path:
            yield path


def _describe(path: Path, folder: Path, tensors: bool) -> Iterator[str]:
    """Yield a line for a file and, on request, one for each tensor in it."""
    from safetensors import safe_open

    if path.is_dir():
        return
    yield f"{path.relative_to(folder)}  {os.path.getsize(path):,} bytes"
    if tensors and path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor = file.get_tensor(name)
                dtype = str(tensor.dtype).removeprefix("torch.")
                yield f"  {name}  {dtype} {tuple(tensor.shape)}  {tensor.nbytes:,} bytes"

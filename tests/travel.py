"""Whether adapters travel: written under some number of threads, read under another, in every format.

    python tests/travel.py              # a table, both ways between 1 and 2 threads

The basis that a reader rebuilds has other bits then, and at 1024 x 896 one singular vector the other sign.
`tests/test_travel.py` runs this.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from adamss_kernels import AdaMSSConfig, export_peft, inject_adamss, load_adapter, save_adapter
from adamss_kernels.formats import import_peft
from adamss_kernels.model import adamss_layers

SHAPES = {"square": (768, 768), "flipped": (1024, 896), "tall": (2048, 512)}
"""Names of the layers, (out_features, in_features); weights as `nn.Linear` draws them, R = 100."""
READERS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "full": load_adapter,
    "compact": load_adapter,
    "peft": lambda model, directory: import_peft(model, directory, progress=False),
}


def base() -> nn.Module:
    """The base model: the generator's bits do not depend on threads."""
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(D, N) for name, (N, D) in SHAPES.items()})


def updates(model: nn.Module) -> dict[str, Tensor]:
    """The update of each layer, [delta W | delta bias] in float64."""
    layers = {name: copy.deepcopy(layer).double() for name, layer in adamss_layers(model).items()}
    return {n: torch.cat((layer.delta_weight(), layer.delta_bias()[:, None]), dim=1) for n, layer in layers.items()}


def trained(model: nn.Module) -> dict[str, list[Tensor]]:
    """What a file that leaves nothing out gives back bit for bit."""
    return {name: [layer.basis, layer.basis_bias, layer.B, layer.C] for name, layer in adamss_layers(model).items()}


def write(directory: Path) -> None:
    """Write an adapter in every format, and its updates."""
    model = inject_adamss(base(), AdaMSSConfig(num_subspaces=10, subspace_rank=3), progress=False)
    for layer in adamss_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
        torch.nn.init.normal_(layer.C, std=0.1)
    save_adapter(model, directory / "full")
    save_adapter(model, directory / "compact", compact=True)
    export_peft(model, directory / "peft", progress=False)
    torch.save([updates(model), trained(model)], directory / "expected.pt")


def read(directory: Path) -> list[dict[str, object]]:
    """Read every format: per layer the error of its update, whether it has the same bits, and what the loader said."""
    expected, bits = torch.load(directory / "expected.pt")
    rows: list[dict[str, object]] = []
    for format_, reader in READERS.items():
        said: dict[str, str] = {}
        handler = logging.Handler(logging.INFO)
        handler.emit = lambda record, said=said: said.update([record.getMessage().split(": ", 1)])  # type: ignore[method-assign]
        logger = logging.getLogger("adamss_kernels.checkpoint")
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = reader(base(), directory / format_)
        logger.removeHandler(handler)
        # The rows that PEFT would assign here are the trained ones.
        export_peft(model, directory / "again", progress=False)
        same = {name: all(map(torch.equal, ours, bits[name])) for name, ours in trained(model).items()}
        for name, update in updates(model).items():
            reported = re.search(r"error of (\S+)", said.get(name, ""))
            error = float((update - expected[name]).norm() / expected[name].norm())
            row = {"format": format_, "layer": name, "error": error, "same_bits": same[name]}
            rows.append(row | {"reported": reported and float(reported[1])})
    return rows


def run(action: str, directory: Path, threads: int, **environment: str) -> list[dict[str, object]]:
    """Run `action` in a process of so many threads, and return what it prints."""
    command = [sys.executable, __file__, action, str(directory), "--threads", str(threads)]
    settings = os.environ | {"OMP_NUM_THREADS": str(threads)} | environment
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f"{action} under {threads} threads failed:\n{done.stderr}")
    return json.loads(done.stdout) if done.stdout else []


def main() -> None:
    """Do one part, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", choices=["write", "read"])
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.action == "write":
        write(arguments.directory)
    elif arguments.action == "read":
        print(json.dumps(read(arguments.directory)))
    else:
        print(f"{'threads':8} {'format':8} {'layer':8} {'error':>8} {'reported':>8}  same bits")
        for writer, reader in ((2, 1), (1, 2)):
            with tempfile.TemporaryDirectory() as folder:
                run("write", Path(folder), writer)
                for row in run("read", Path(folder), reader):
                    reported = "" if row["reported"] is None else f"{row['reported']:.1e}"
                    print(
                        f"{writer} -> {reader:3} {row['format']:8} {row['layer']:8} {row['error']:8.1e} {reported:>8} "
                        f" {row['same_bits']}"
                    )


if __name__ == "__main__":
    main()

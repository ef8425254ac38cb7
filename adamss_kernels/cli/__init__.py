"""The command line: `adamss-kernels COMMAND`, also `python -m adamss_kernels COMMAND`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

# Each command is a module with `add_arguments(parser)` and `run(args) -> int`; its docstring is its help.
COMMANDS = ("info", "demo", "bench", "convert", "inspect", "compare", "tune", "build-cuda")

# The optional extra that brings a library.
EXTRAS = {"peft": "hf", "transformers": "hf", "matplotlib": "demo"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = argparse.ArgumentParser(prog="adamss-kernels", description="Fused kernels for AdaMSS fine-tuning.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name.replace('-', '_')}")
        text = (module.__doc__ or "").strip()  # empty under `python -OO`
        command = commands.add_parser(name, help=text.partition("\n")[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.INFO)
    try:
        status: int = args.run(args)
    except KeyboardInterrupt:
        print(f"adamss-kernels {args.command}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        needed = f"needs {library}, which is not installed: pip install 'adamss-kernels[{EXTRAS[library]}]'"
        print(f"adamss-kernels {args.command}: {needed}", file=sys.stderr)
        return 1
    return status

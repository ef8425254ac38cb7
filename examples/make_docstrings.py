"""Write a small text classification task: docstrings of Python's standard library, labelled by their package.

Needs no download. The texts are those of the running Python; every third one is for validation.
"""

from __future__ import annotations

import argparse
import ast
import csv
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "urllib", "xml")


def main() -> None:
    """Write train.csv and validation.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("docstrings"), help="folder (default: docstrings)")
    write(parser.parse_args().output)


def write(folder: Path) -> None:
    """Write both files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(text, package) for package in PACKAGES for text in set(docstrings(package))]
    # In an order that mixes the packages and stays the same: the first so many rows are a small task of the same kind.
    rows.sort(key=lambda row: hashlib.sha256("\n".join(row).encode()).digest())
    for name, part in (
        ("train", [row for i, row in enumerate(rows) if i % 3]),
        ("validation", rows[::3]),
    ):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(part)
        print(f"{folder / name}.csv: {len(part)} texts")


def docstrings(package: str) -> Iterator[str]:
    """Yield the docstrings of a package's modules, classes and functions, without importing them."""
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= 30:
                    yield text


if __name__ == "__main__":
    main()

"""Write the table of bytes communicated into docs/distributed.md; `--check` says whether it is there as it should be.

On paper: what each rank sends, per layer and step, when collectives go round a ring of p ranks. A sum over n bytes
takes 2 (p - 1) / p of them, a gather or a scattered sum (p - 1) / p.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "distributed.md"
P, M, N, D, R, K = 8, 8192, 4096, 4096, 100, 10
ALL_REDUCE, GATHER = 2 * (P - 1) / P, (P - 1) / P


def updates() -> dict[str, dict[str, int]]:
    """Return, for each method, the bytes of float32 that train, and those whose gradients tensor parallelism sums."""
    found = {}
    for r in (1, 3):
        B, C = 4 * K * r * R, 4 * N * r
        found[f"AdaMSS, r = {r}"] = {"trains": B + C, "column-wise": B, "row-wise": B + C}
    for r in (8, 16):
        at_x, at_y = 4 * r * D, 4 * N * r
        found[f"LoRA, r = {r}"] = {"trains": at_x + at_y, "column-wise": at_x, "row-wise": at_y}
    return found


def table() -> str:
    """Return the table, in Markdown; W and activations have 2 bytes a number."""
    weight, tokens = 2 * N * D, 2 * M * D
    rows = {
        "DDP: gradients": (0.0, "trains", ALL_REDUCE),
        "FSDP2: parameters twice, gradients once": (2 * GATHER * weight, "trains", 3 * GATHER),
        "column-wise: dx, or x and dx scattered": (ALL_REDUCE * tokens, "column-wise", ALL_REDUCE),
        "row-wise: y, or y and dy scattered": (ALL_REDUCE * tokens, "row-wise", ALL_REDUCE),
    }
    methods = updates()
    lines = ["| | " + " | ".join(["frozen layer", *methods]) + " |", "|---|" + "---:|" * (1 + len(methods))]
    for name, (base, what, share) in rows.items():
        cells = [f"{base:,.0f}", *(f"+ {share * method[what]:,.0f}" for method in methods.values())]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the table, or compare it with the one that is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; the exit status is 1 where it differs")
    args = parser.parse_args()
    text = PAGE.read_text()
    begin, end = "<!-- bytes: written by tools/communication.py -->\n", "\n<!-- end -->"
    new = re.sub(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", lambda _: table(), text, flags=re.S)
    if args.check:
        sys.exit(f"{PAGE}: run tools/communication.py" if new != text else 0)
    PAGE.write_text(new)


if __name__ == "__main__":
    main()

"""Write the README's tables from the committed results; `--check` only compares."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
NAMES = {
    "native": "`adamss_kernels`",
    "native-half-pruned": "`adamss_kernels`, half pruned",
    "adamss_kernels": "`adamss_kernels`",
    "peft-adamss": "PEFT AdaMSS",
    "peft-adamss-compiled": "PEFT AdaMSS, compiled",
    "peft-lora": "PEFT LoRA r = 8",
    "frozen": "frozen model",
}


def layer_table() -> str:
    """Ratios of one layer to the bare linear layer, forward and forward + backward."""
    result = json.loads((RESULTS / "cpu-layer-float32.json").read_text())
    providers = [name for name in result["rows"][0]["forward"] if name != "linear"]
    lines = ["| shape | " + " | ".join(NAMES[name] for name in providers) + " |", "|---" * (len(providers) + 1) + "|"]
    for row in result["rows"]:
        shape = f"D={row['D']}, N={row['N']}, M={row['M']}, K={row['K']}, r={row['r']}"
        cells = [f"{row['forward'][p]['ratio']:.2f} / {row['forward_backward'][p]['ratio']:.2f}" for p in providers]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _source(result, "bench/results/cpu-layer-float32.json")])


def model_table() -> str:
    """Training step of the BERT-shaped encoder."""
    result = json.loads((RESULTS / "cpu-model.json").read_text())
    step = result["rows"][0]["step"]
    lines = ["| model | training step | ratio to frozen |", "|---|---|---|"]
    lines += [f"| {NAMES[n]} | {c['median_s'] * 1e3:.0f} ms | {c['ratio']:.2f} |" for n, c in step.items()]
    return "\n".join([*lines, "", _source(result, "bench/results/cpu-model.json")])


def _source(result: dict, path: str) -> str:
    e = result["environment"]
    return (
        f"{e['cpu']}, {e['threads']} threads, torch {e['versions']['torch']}, peft {e['versions']['peft']}, "
        f"{e['native']['ISA'].split()[0]}; `{e['command']}`, {e['date']} ([{path}]({path}))."
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the README differs instead of writing it")
    args = parser.parse_args()
    path = ROOT / "README.md"
    text = new = path.read_text()
    for name, table in (("layer", layer_table()), ("model", model_table())):
        pattern = rf"(<!-- {name}: written by bench/readme.py -->\n).*?(\n<!-- end -->)"
        new, found = re.subn(pattern, lambda m, t=table: m[1] + t + m[2], new, flags=re.S)
        if found != 1:
            print(f"README.md: expected one place for the table {name!r}, found {found}")
            return 1
    if args.check and new != text:
        print("README.md differs from bench/results; run python bench/readme.py")
        return 1
    if not args.check:
        path.write_text(new)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

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


def layer_table(dtype: str) -> str:
    """Ratios of one layer to the bare linear layer, forward and forward + backward."""
    file = f"cpu-layer-{dtype}.json"
    result = json.loads((RESULTS / file).read_text())
    providers = [name for name in result["rows"][0]["forward"] if name != "linear"]
    lines = ["| shape | " + " | ".join(NAMES[name] for name in providers) + " |", "|---" * (len(providers) + 1) + "|"]
    for row in result["rows"]:
        shape = f"D={row['D']}, N={row['N']}, M={row['M']}, K={row['K']}, r={row['r']}"
        cells = [f"{row['forward'][p]['ratio']:.2f} / {row['forward_backward'][p]['ratio']:.2f}" for p in providers]
        lines.append(f"| {shape} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _source(result, file)])


def model_table() -> str:
    """Training step of the BERT-shaped encoder."""
    result = json.loads((RESULTS / "cpu-model.json").read_text())
    step = result["rows"][0]["step"]
    lines = ["| model | training step | ratio to frozen |", "|---|---|---|"]
    lines += [f"| {NAMES[n]} | {c['median_s'] * 1e3:.0f} ms | {c['ratio']:.2f} |" for n, c in step.items()]
    return "\n".join([*lines, "", _source(result, "cpu-model.json")])


def asa_table() -> str:
    """One ASA update, with and without a pruning event."""
    result = json.loads((RESULTS / "cpu-asa.json").read_text())
    row = result["rows"][0]
    ms = row["milliseconds"]
    layers, K = row["options"]["layers"], row["options"]["subspaces"]
    lines = [f"| {layers} layers x {K} subspaces | `adamss_kernels` | PEFT AdaMSS |", "|---|---|---|"]
    for name in ("update", "update with event"):
        lines.append(f"| {name} | {ms[name]['ours']:.2f} ms | {ms[name]['PEFT']:.1f} ms |")
    return "\n".join([*lines, "", _source(result, "cpu-asa.json")])


def memory_table() -> str:
    """Peak resident memory of one training forward."""
    result = json.loads((RESULTS / "cpu-memory.json").read_text())
    row = result["rows"][0]
    shape = f"D={row['D']}, N={row['N']}, M={row['M']}, K={row['K']}, r={row['r']}"
    names = {"linear": "`nn.Linear`"} | NAMES
    lines = [f"| {shape} | peak of one training forward |", "|---|---|"]
    lines += [f"| {names[n]} | {b / 2**20:.1f} MiB |" for n, b in row["peak_bytes"].items()]
    return "\n".join([*lines, "", _source(result, "cpu-memory.json")])


def _source(result: dict, file: str) -> str:
    e, path = result["environment"], f"bench/results/{file}"
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
    tables = {
        "layer": layer_table("float32"),
        "layer-bfloat16": layer_table("bfloat16"),
        "model": model_table(),
        "asa": asa_table(),
        "memory": memory_table(),
    }
    for name, table in tables.items():
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

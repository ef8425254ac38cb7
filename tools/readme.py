"""Write tables into README.md and docs/benchmarks.md, and pictures into docs/plots, from bench/results.

Usage: python tools/readme.py [--check]

With --check nothing is written: the exit status is 1 where something differs from the committed results.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adamss_kernels.cli.bench import plots, results, scaling
from adamss_kernels.cli.bench.layer import FORWARD, FORWARD_BACKWARD

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
PLOTS = ROOT / "docs" / "plots"
PICTURED = "AMD-EPYC-avx512bf16"  # the processor with all suites measured
README_PROVIDERS = ("cpu", "half-pruned", "peft-adamss", "peft-adamss-compiled", "peft-lora")
Rows = list[dict[str, Any]]


def layer_table(rows: Rows, word: Callable[[dict[str, Any]], str]) -> list[str]:
    """Ratios of one layer, which `word` names, to the bare linear layer, forward / forward + backward."""
    cells = {(word(r), r["provider"], r["case"]["pass"]): r["ratio"]["median"] for r in rows}
    names = [p for p in README_PROVIDERS if any(p == name for _, name, _ in cells)]
    lines = [_cells("shape", *(_title(name) for name in names)), "|---" * (len(names) + 1) + "|"]
    for layer in dict.fromkeys(layer for layer, _, _ in cells):
        pairs = [[cells[layer, name, which] for which in (FORWARD, FORWARD_BACKWARD)] for name in names]
        lines.append(_cells(layer, *(" / ".join(f"{ratio:.2f}" for ratio in pair) for pair in pairs)))
    return lines


def model_table(rows: Rows) -> list[str]:
    """Training step of the BERT-shaped encoder."""
    lines = ["| model | training step | ratio to frozen |", "|---|---|---|"]
    for r in (r for r in rows if _dtype(r) == "float32"):
        word = "frozen model" if r["provider"] == "frozen" else _title(r["provider"])
        lines.append(_cells(word, f"{r['seconds']['median'] * 1e3:.0f} ms", f"{r['ratio']['median']:.2f}"))
    return lines


def minilm_table(rows: Rows) -> list[str]:
    """Fine-tuning real weights: accuracy and throughput."""
    case = rows[0]["case"]
    lines = [f"| MiniLM, {case['rounds']} steps of {case['batch']} texts | accuracy | training step | throughput |"]
    lines.append("|---|---|---|---|")
    for r in rows:
        step, accuracy = f"{r['seconds']['median'] * 1e3:.0f} ms", f"{r['accuracy']:.1%}"
        lines.append(_cells(f"`{r['provider']}`", accuracy, step, f"{r['throughput_ratio']:.2f} x"))
    return lines


def asa_table(rows: Rows) -> list[str]:
    """One ASA update, with and without a pruning event."""
    case = rows[0]["case"]
    first = [r for r in rows if r["case"]["layers"] == case["layers"]]
    names = list(dict.fromkeys(r["provider"] for r in first))
    lines = [_cells(f"{case['layers']} layers x {case['K']} subspaces", *map(_title, names))]
    lines.append("|---" * (len(names) + 1) + "|")
    for which in dict.fromkeys(r["case"]["pass"] for r in first):
        times = [r["seconds"]["median"] * 1e3 for r in first if r["case"]["pass"] == which]
        lines.append(_cells(which, *(f"{ms:.3g} ms" for ms in times)))
    return lines


def mixed_table(rows: Rows) -> list[str]:
    """Ratios of mixed batches to the bare linear layer: forward, and forward + backward."""
    found = {(_mixed_case(r), r["provider"], r["case"]["pass"]): r for r in rows}
    lines = ["| rows x tokens, adapters | an adapter | forward | PEFT LoRA r = 8 | forward + backward | one adapter |"]
    lines.append("|---|---|---|---|---|---|")
    for case in dict.fromkeys(_mixed_case(r) for r in rows):
        ours = found[case, "ours", FORWARD]
        pairs = (
            ("ours", FORWARD),
            ("peft-lora", FORWARD),
            ("ours", FORWARD_BACKWARD),
            ("one adapter", FORWARD_BACKWARD),
        )
        ratios = [f"{found[case, name, which]['ratio']['median']:.2f}" for name, which in pairs]
        lines.append(_cells(case, f"{ours['adapter_bytes'] / 1024:.1f} KiB", *ratios))
    return lines


def _mixed_case(row: dict[str, Any]) -> str:
    case = row["case"]
    word = f"D=N={case['D']}, {case['rows']} x {case['tokens']}, {case['adapters']} of r={case['r']}"
    return word if _dtype(row) == "float32" else f"{word}, {_dtype(row)}"


def bases_table(rows: Rows) -> list[str]:
    """Ratios of an adapted quantised layer to itself without an adapter, beside PEFT's LoRA, for both batch sizes."""
    found = {(r["case"]["M"], _base(r), r["provider"], r["case"]["pass"]): r["ratio"]["median"] for r in rows}
    batches = sorted({M for M, *_ in found})
    columns = [(M, name) for M in batches for name in ("ours", "peft-lora")]
    words = {"ours": "`adamss_kernels`", "peft-lora": "PEFT LoRA r = 8"}
    lines = [_cells("base layer", *(f"M={M}, {words[name]}" for M, name in columns)), "|---" * (len(columns) + 1) + "|"]
    for base in dict.fromkeys(base for _, base, *_ in found):
        pairs = [[found[M, base, name, which] for which in (FORWARD, FORWARD_BACKWARD)] for M, name in columns]
        lines.append(_cells(base, *(" / ".join(f"{ratio:.2f}" for ratio in pair) for pair in pairs)))
    return lines


def _base(row: dict[str, Any]) -> str:
    case = row["case"]
    return f"{case['base']}, D=N={case['D']}, {case['dtype']}"


def memory_table(rows: Rows) -> list[str]:
    """Peak resident memory of a training forward, and of forward and backward."""
    shape = _shape(rows[0])
    first = [r for r in rows if _shape(r) == shape]
    passes = list(dict.fromkeys(r["case"]["pass"] for r in first))
    lines = [_cells(shape, *passes), "|---" * (len(passes) + 1) + "|"]
    for name in dict.fromkeys(r["provider"] for r in first):
        peaks = [r["peak_bytes"] / 2**20 for r in first if r["provider"] == name]
        lines.append(_cells(_title(name), *(f"{peak:.1f} MiB" for peak in peaks)))
    return lines


def full_table(rows: Rows) -> list[str]:
    """Every figure of the layer suite."""
    bounds = {r["case"]["dtype"]: r["tflop_per_s"] for r in rows if r["provider"] == "gemm"}
    copies = {r["case"]["bytes"]: r["gb_per_s"] for r in rows if r["provider"] == "copy"}
    lines = [
        "The bound of this machine: "
        + ", ".join(f"{dtype} GEMM {peak:.2f} TFLOP/s" for dtype, peak in bounds.items())
        + "; copies, by the bytes that they touch: "
        + ", ".join(f"{size / 2**20:g} MiB {speed:.0f} GB/s" for size, speed in copies.items())
        + "."
    ]
    case = ""
    for r in (r for r in rows if r["suite"] == "layer"):
        new = f"{_shape(r)}, {_dtype(r)}, {r['case']['pass']}"
        if new != case:
            case = new
            linear = r["linear_bound_share"]
            lines += ["", f"**{case}**: the bare layer reaches {linear:.0%} of the machine's bound", ""]
            lines += ["| provider | ratio | quartiles | least ratio | ms | GB/s | TFLOP/s | of the bound "
                      "| of the bare layer's speed | peak MiB | saved MiB | aten calls | trained |"]  # fmt: skip
            lines += ["|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
        ratio = r["ratio"]
        figures = (
            f"{ratio['median']:.3f}", f"{ratio['low']:.3f} to {ratio['high']:.3f}",
            f"{r['least_ratio']:.3f}" if r["least_ratio"] else "",
            f"{r['seconds']['median'] * 1e3:.3g}", f"{r['gb_per_s']:.3g}", f"{r['tflop_per_s']:.3g}",
            f"{r['bound_share']:.0%}", f"{1 / ratio['median']:.0%}", f"{r['peak_bytes'] / 2**20:.3g}",
            f"{r['saved_bytes'] / 2**20:.3g}", str(r["aten_calls"]), str(r["parameters"]),
        )  # fmt: skip
        lines.append(_cells(_title(r["provider"]), *figures))
    return lines


def profile_table(rows: Rows) -> list[str]:
    """Where the time goes, the bare layer beside ours."""
    lines = []
    for shape in dict.fromkeys((_shape(r), _dtype(r)) for r in rows):
        found = {r["provider"]: r["shares"] for r in rows if (_shape(r), _dtype(r)) == shape}
        words = list(dict.fromkeys(word for share in found.values() for word in share))
        words.sort(key=lambda word: -max(share.get(word, 0) for share in found.values()))
        lines += ["", f"**{', '.join(shape)}**, {rows[0]['case']['pass']}", ""]
        lines += [_cells("of the samples", *map(_title, found)), "|---" + "|---:" * len(found) + "|"]
        lines += [_cells(word, *(f"{s[word]:.1%}" if word in s else "" for s in found.values())) for word in words]
    return lines[1:]


def methods_table(rows: Rows) -> list[str]:
    """The related methods: parameters, speed and memory, so that one can choose."""
    rows = _of(rows, "methods")
    lines = []
    for shape in dict.fromkeys(_shape(r) for r in rows):
        lines += ["", f"**{shape}**, {_dtype(rows[0])}", ""]
        lines.append("| method | trained | forward | forward + backward | peak MiB | saved MiB |")
        lines.append("|---|---:|---:|---:|---:|---:|")
        found = {(r["provider"], r["case"]["pass"]): r for r in rows if _shape(r) == shape}
        for name in dict.fromkeys(name for name, _ in found):
            one, both = found[name, FORWARD], found[name, FORWARD_BACKWARD]
            memory = (f"{both[field] / 2**20:.3g}" for field in ("peak_bytes", "saved_bytes"))
            ratios = (f"{r['ratio']['median']:.2f}" for r in (one, both))
            lines.append(_cells(_title(name), f"{one['parameters']:,}", *ratios, *memory))
    return lines[1:]


def init_table(rows: Rows) -> list[str]:
    """Initialisation of a stack of layers."""
    lines = ["| layers | provider | seconds | ratio to the SVD alone |", "|---|---|---:|---:|"]
    for r in rows:
        case = f"{r['case']['layers']} x {r['case']['N']} x {r['case']['D']}"
        lines.append(
            _cells(case, _title(r["provider"]), f"{r['seconds']['median']:.3f}", f"{r['ratio']['median']:.2f}")
        )
    return lines


def exponent_table(rows: Rows) -> list[str]:
    """Fitted exponents of cost, one line for each curve of ours beside PEFT's and the floor's."""
    fits = scaling.exponents(rows)
    curves: dict[tuple[str, str, str], dict[str, float]] = {}
    for fit in fits:
        case, (low, high) = fit["case"], fit["range"]
        fixed = {n: v for n, v in case.items() if n in ("D", "N", "M", "K", "r", "layers") and n != case["sweep"]}
        if fixed.get("N") == fixed.get("D"):
            fixed.pop("N", None)
        word = f"{case['of']}, {case['pass']}" if "pass" in case else case["of"]
        text = ", ".join(f"{n} = {v}" for n, v in fixed.items())
        curves.setdefault((word, f"{case['sweep']}, {low} to {high}", text), {})[fit["provider"]] = fit["exponent"]
    lines = ["| cost of | grows with | at | floor | `adamss_kernels` | PEFT AdaMSS |", "|---|---|---|---:|---:|---:|"]
    for (word, span, text), found in curves.items():
        floor, ours, *theirs = found.values()
        lines.append(_cells(word, span, text, f"{floor:.2f}", f"{ours:.2f}", *(f"{t:.2f}" for t in theirs)))
    return lines


GPU_SHAPES = [(4096, 4096, 8192), (4096, 14336, 8192), (1024, 1024, 16384), (768, 768, 16384), (4096, 4096, 16)]
GPU_LAYERS = ("adamss cuda", "adamss triton", "peft adamss", "peft lora r=8", "peft lora r=32")


def gpu_table(rows: Rows) -> list[str]:
    """Ratios of one bfloat16 layer to the bare linear layer on a GPU, forward / forward + backward."""
    titles = ("`cuda`", "`triton`", "PEFT AdaMSS", "PEFT LoRA r = 8", "PEFT LoRA r = 32")
    lines = [_cells("shape", "launched", *titles), "|---" * (len(titles) + 2) + "|"]
    cells = {(r["D"], r["N"], r["M"], r["mode"], r["layer"], r["pass"]): r["ratio"] for r in rows if "ratio" in r}
    for D, N, M in GPU_SHAPES:
        for mode, word in (("graph", "in a CUDA graph"), ("eager", "from Python")):
            pairs = [[cells.get((D, N, M, mode, name, p)) for p in ("fwd", "fwd+bwd")] for name in GPU_LAYERS]
            text = (" / ".join(f"{ratio:.2f}" for ratio in pair) if None not in pair else "-" for pair in pairs)
            lines.append(_cells(f"D={D}, N={N}, M={M}", word, *text))
    return lines


def gpu_step_table(rows: Rows) -> list[str]:
    """A training step of a 3B-Llama-shaped model on a GPU."""
    rows = [r for r in rows if r["stage"] == "step" and "ms" in r]
    frozen = next(r["ms"] for r in rows if r["method"] == "frozen")
    names = {"frozen": "frozen model", "adamss_kernels": "`adamss_kernels`", "peft adamss": "PEFT AdaMSS"}
    batch, length = rows[0]["tokens"]
    lines = [
        f"| {rows[0]['layers']} layers, {batch} x {length} tokens | training step | ratio to frozen | peak | trained |"
    ]
    lines.append("|---|---:|---:|---:|---:|")
    for r in rows:
        title = names.get(r["method"], r["method"].replace("peft lora r=", "PEFT LoRA r = "))
        cells = (f"{r['ms']:.0f} ms", f"{r['ms'] / frozen:.2f}", f"{r['peak GiB']:.1f} GiB", f"{r['trainable']:,}")
        lines.append(_cells(title, *cells))
    return lines


def _title(provider: str) -> str:
    word = plots.title(provider)
    return re.sub(r"adamss_kernels|nn\.Linear", lambda m: f"`{m[0]}`", word)


def _shape(row: dict[str, Any]) -> str:
    return ", ".join(f"{name}={row['case'][name]}" for name in ("D", "N", "M", "K", "r"))


def _dtype(row: dict[str, Any]) -> str:
    dtype: str = row["case"]["dtype"]
    return dtype


def _shape_and_dtype(row: dict[str, Any]) -> str:
    return f"{_shape(row)}, {_dtype(row)}"


def _cells(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _source(environment: dict[str, Any], path: Path) -> str:
    e, file = environment, path.relative_to(ROOT)
    if "gpu" in e:
        versions = ", ".join(f"{name} {e['versions'][name]}" for name in ("torch", "triton", "peft"))
        return f"{e['gpu']}, driver {e['driver']}, {versions}; `{e['command']}`, {e['date']} ([{file}]({{up}}{file}))."
    threads = f"{e['threads']} thread{'s'[: e['threads'] > 1]}"
    isa = e["cpu_library"].get("ISA", "reference").split()[0]
    return (
        f"{e['cpu']}, {threads}, torch {e['versions']['torch']}, peft {e['versions']['peft']}, {isa}; "
        f"`{e['command']}`, {e['date']} ([{file}]({{up}}{file}))."
    )


# Table to document, suite (or file of a GPU), and what makes it.
TABLES: dict[str, tuple[str, str, Callable[[Rows], list[str]]]] = {
    "layer": ("README.md", "layer", lambda rows: layer_table(_of(rows, "layer", "float32"), _shape)),
    "layer-bfloat16": ("README.md", "layer", lambda rows: layer_table(_of(rows, "layer", "bfloat16"), _shape)),
    "decode": ("README.md", "decode", lambda rows: layer_table(_of(rows, "decode"), _shape_and_dtype)),
    "model": ("README.md", "model", model_table),
    "minilm": ("README.md", "minilm", minilm_table),
    "asa": ("README.md", "asa", asa_table),
    "memory": ("README.md", "memory", memory_table),
    "mixed": ("README.md", "mixed", mixed_table),
    "bases": ("README.md", "bases", bases_table),
    "layer-full": ("docs/benchmarks.md", "layer", full_table),
    "profile": ("docs/cpu.md", "profile", profile_table),
    "methods": ("docs/benchmarks.md", "methods", methods_table),
    "init": ("docs/benchmarks.md", "init", init_table),
    "exponents": ("docs/benchmarks.md", "scaling", exponent_table),
    "gpu-layer": ("README.md", "NVIDIA-H100-80GB-HBM3/results.jsonl", gpu_table),
    "gpu-step": ("README.md", "NVIDIA-H100-80GB-HBM3/results.jsonl", gpu_step_table),
}


def _measured(suite: str) -> list[Path]:
    """Return the result files of a suite, one for each processor that has been measured, or the file itself."""
    return [RESULTS / suite] if suite.endswith(".jsonl") else sorted(RESULTS.glob(f"*-{suite}.jsonl"))


def _of(rows: Rows, suite: str, dtype: str | None = None) -> Rows:
    return [row for row in rows if row["suite"] == suite and (dtype is None or _dtype(row) == dtype)]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    differing = []
    texts = {name: (ROOT / name).read_text() for name, _, _ in TABLES.values()}
    for name, (document, file, table) in TABLES.items():
        up = "../" * document.count("/")
        parts = []
        for path in _measured(file):
            environment, rows = results.read(path)
            parts += ["\n".join([*table(rows), "", _source(environment, path).replace("{up}", up)])]
        content = "\n\n".join(parts)
        pattern = rf"(<!-- {name}: written by tools/readme.py -->\n).*?(\n<!-- end -->)"
        replace = lambda m, text=content: m[1] + text + m[2]  # noqa: E731
        new, found = re.subn(pattern, replace, texts[document], flags=re.S)
        if found != 1:
            print(f"{document}: expected one place for the table {name!r}, found {found}")
            return 1
        differing += [f"{document}, table {name!r}"] if new != texts[document] else []
        texts[document] = new
    figures = plots.draw([row for path in sorted(RESULTS.glob(f"{PICTURED}-*.jsonl")) for row in results.read(path)[1]])
    for name, figure in figures.items():
        picture = PLOTS / f"{name}.svg"
        if not picture.exists() or plots.digest(figure) not in picture.read_text():
            differing.append(str(picture.relative_to(ROOT)))
    if not args.check:
        for document, text in texts.items():
            (ROOT / document).write_text(text)
        plots.save(figures, PLOTS, ("svg",))
    elif differing:
        print(f"differs from bench/results: {', '.join(differing)}; run python tools/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

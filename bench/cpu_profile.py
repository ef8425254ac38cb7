"""Where the time of one layer goes on the CPU: shares of perf's samples by function.

Usage: python bench/cpu_profile.py [--out bench/results/PROCESSOR-profile.jsonl] [--seconds 8]

Needs Linux perf. Samples of all threads count, waiting ones too: a share of 10 % in which one of two threads waits for
the other is 20 % of the time.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from adamss_kernels.cli.bench import layer, measure, providers, results
from adamss_kernels.compiled.allocator import keep_freed_memory

# The layers of README's table that are furthest from the bare one.
CASES: list[dict[str, Any]] = [
    {"D": 384, "M": 512},
    {"D": 4096, "M": 512, "r": 3},
    {"D": 768, "M": 4096, "r": 3, "dtype": "bfloat16"},
]
NAMES = ("linear", "cpu")
# Shared object and symbol to a word; the first that matches.
_WORDS = [
    (r"libadamss_cpu\S* .*?(\w+)(?:<.*)?$", r"cpu: \1"),
    (r"libtorch_cpu\S* .*(?:mkl_|dnnl|gemm|_acopy)|\[JIT\]|jit", "base product"),
    (r"libtorch_cpu\S* ", "other PyTorch kernels"),
    (r"libgomp|libiomp|libomp", "waiting for the other thread"),
    (r"libpython|libtorch_python|libc10|libtorch\S* |libstdc\+\+|^python", "Python and PyTorch around the kernels"),
    (r"^\[kernel|^\[vdso", "operating system"),
    (r"libc\.so|ld-linux|libm\.so", "C library"),
]


def word(shared_object: str, symbol: str) -> str:
    """Return what a function of a shared object counts as; a function of ours by its own name."""
    # Work handed to a loop counts as what handed it over; template arguments, parameters and lambdas do not matter.
    symbol = symbol.replace("(anonymous namespace)::", "")
    plain = re.sub(r"^.*?(?:for_tiles|parallel_blocks)<", "", symbol).split("::{lambda")[0].split("(")[0]
    while plain != (plain := re.sub(r"<[^<>]*>", "", plain)):
        pass
    text = f"{shared_object} {plain if 'adamss' in shared_object else symbol}"
    for pattern, meaning in _WORDS:
        if match := re.search(pattern, text):
            return match.expand(meaning)
    return "other"


def shares(report: Iterable[str]) -> dict[str, float]:
    """Return the share of samples of each word, the largest first, from perf's `overhead,shared object,symbol`."""
    total: dict[str, float] = {}
    for line in report:
        fields = [field.strip() for field in line.split(";", 2)]
        if len(fields) != 3 or not fields[0].endswith("%"):
            continue
        name = word(fields[1], re.sub(r"^\[.\] ", "", fields[2]))
        total[name] = total.get(name, 0.0) + float(fields[0][:-1]) / 100
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def repeat(case: dict[str, Any], name: str, seconds: float) -> None:
    """Run forward and backward of one provider for a while, after a sign that everything is built."""
    shape, dtype = (case["M"], case["D"], case["N"]), getattr(torch, case["dtype"])
    keep_freed_memory()
    model = providers.build([name], case, torch.device("cpu"))[name].layer
    x = measure.Rotation(lambda: torch.randn(*shape[:2]).to(dtype).requires_grad_(), torch.device("cpu"))
    dy = measure.Rotation(lambda: torch.randn(shape[0], shape[2]).to(dtype), torch.device("cpu"))
    run = layer.forward_backward(model, x, dy)
    for _ in range(5):
        run()
    print("ready", flush=True)
    sys.stdin.readline()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        run()
    print("done", flush=True)
    sys.stdin.readline()


def profile(index: int, name: str, seconds: float) -> dict[str, float]:
    """Return the shares of a run of case `index` in a process of its own."""
    command = [sys.executable, __file__, "--repeat", str(index), name, "--seconds", str(seconds)]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdin and child.stdout
        child.stdout.readline()
        data = str(Path(folder) / "perf.data")
        record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "2000", "-o", data, "-p", str(child.pid)]
        with subprocess.Popen(record, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as recorder:
            time.sleep(0.5)  # until perf has attached
            child.stdin.write("\n")
            child.stdin.flush()
            child.stdout.readline()
            recorder.send_signal(signal.SIGINT)
        child.stdin.write("\n")
        child.stdin.flush()
        fields = ["--no-children", "-F", "overhead,dso,symbol", "-t", ";"]
        report = subprocess.run(
            ["perf", "report", "-q", "-i", data, *fields], capture_output=True, text=True, check=True
        )
    return shares(report.stdout.splitlines())


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write JSON lines")
    parser.add_argument("--seconds", type=float, default=8, help="for each case and layer")
    parser.add_argument("--repeat", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = [layer.complete(case) for case in CASES]
    if args.repeat:
        repeat(cases[int(args.repeat[0])], args.repeat[1], args.seconds)
        return
    rows = []
    for index, case in enumerate(cases):
        for name in NAMES:
            found = profile(index, name, args.seconds)
            rows.append({"suite": "profile", "case": {"pass": layer.FORWARD_BACKWARD, **case}, "provider": name,
                         "shares": {name: share for name, share in found.items() if share >= 0.005}})  # fmt: skip
            print(results.key(rows[-1]), *(f"{share:7.1%} {name}" for name, share in found.items()), sep="\n  ")
    if args.out:
        results.write(args.out, results.environment(), rows)


if __name__ == "__main__":
    main()

"""Time the initialisation of a stack of layers against PEFT's own, in the same run."""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from measure import add_output_argument, write
from torch import nn

from adamss_kernels import AdaMSSConfig, inject_adamss


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=3)
    add_output_argument(parser)
    args = parser.parse_args()

    import peft

    torch.manual_seed(0)
    options = {"r": 100, "num_subspaces": 10, "subspace_rank": 1}
    base = nn.ModuleDict({f"layer{i}": nn.Linear(args.width, args.width) for i in range(args.layers)})
    names = list(base)
    seconds: dict[str, list[float]] = {"adamss_kernels": [], "peft-adamss": []}
    for _ in range(args.rounds):
        for name in seconds:
            model = copy.deepcopy(base)
            start = time.perf_counter()
            if name == "peft-adamss":
                peft.inject_adapter_in_model(peft.AdamssConfig(target_modules=names, **options), model)
            else:
                inject_adamss(model, AdaMSSConfig(target_modules=names, **options), progress=False)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:<16}{median:>8.2f} s{median / medians['peft-adamss']:>8.3f}")
    write(args.out, [{"layers": args.layers, "width": args.width, "seconds": seconds, "median_s": medians}])


if __name__ == "__main__":
    main()

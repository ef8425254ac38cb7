"""Fine-tune a small vision transformer on real digits, from pretraining to a reloaded adapter.

Pretrains on the digits 0 to 4, freezes the model, and adapts it to 5 to 9 twice: with a new head alone, and with a new
head and AdaMSS in every attention and MLP layer. Needs no download.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..checkpoint import load_adapter, save_adapter
from ..config import AdaMSSConfig
from ..model import adamss_layers, inject_adamss
from .digits import DigitsViT, Split, load_digits_split

TARGETS = ["query", "key", "value", "output", "up", "down"]


class Run(NamedTuple):
    """What one training run leaves to report."""

    losses: list[float]
    accuracies: list[float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `demo`."""
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for adapter and plot")
    parser.add_argument("--epochs", type=_positive, default=30, help="epochs of adaptation (default: 30)")
    parser.add_argument("--pretrain-epochs", type=_positive, default=12, help="epochs of pretraining (default: 12)")
    parser.add_argument("--subspaces", type=_positive, default=8, help="subspaces K per layer (default: 8)")
    parser.add_argument("--seed", type=int, default=0)


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
    pretrained = train(base, old, args.pretrain_epochs, lr=1e-3, title="pretrain on 0-4")
    base.head = nn.Linear(base.head.in_features, 5)
    before = accuracy(base, new)

    head_only = copy.deepcopy(base).requires_grad_(False)
    head_only.head.requires_grad_(True)
    head_run = train(head_only, new, args.epochs, lr=5e-3, title="head only on 5-9")

    config = AdaMSSConfig(
        r=32, num_subspaces=args.subspaces, subspace_rank=2, target_modules=TARGETS, modules_to_save=["head"]
    )
    adapted = inject_adamss(copy.deepcopy(base), config)
    adamss_run = train(adapted, new, args.epochs, lr=5e-3, title="AdaMSS on 5-9")

    path = save_adapter(adapted, args.output / "adapter")
    reloaded = load_adapter(copy.deepcopy(base), args.output / "adapter")
    with torch.no_grad():
        same = torch.equal(adapted(new.test_x), reloaded(new.test_x))

    frozen = copy.deepcopy(base).requires_grad_(False)
    frozen.head.requires_grad_(True)
    frozen_time, adamss_time = step_times([frozen, adapted], new)
    plot = args.output / "curves.png"
    plotted = draw(plot, {"head only": head_run, "AdaMSS": adamss_run})

    trainable = sum(layer.layout.num_parameters(layer.basis.shape[0]) for layer in adamss_layers(adapted).values())
    head = sum(p.numel() for p in adapted.head.parameters())
    total = sum(p.numel() for p in base.parameters())
    print(
        f"\npretraining accuracy on digits 0-4   {pretrained.accuracies[-1]:7.1%}"
        f"\n\n{'digits 5-9':<28}{'head only':>14}{'head + AdaMSS':>16}"
        f"\n{'accuracy before':<28}{before:>14.1%}{before:>16.1%}"
        f"\n{'accuracy after':<28}{head_run.accuracies[-1]:>14.1%}{adamss_run.accuracies[-1]:>16.1%}"
        f"\n{'trained in the head':<28}{head:>14,}{head:>16,}"
        f"\n{'trained in linear layers':<28}{0:>14,}{trainable:>16,}"
        f"\n{'  share of the model':<28}{'':>14}{trainable / total:>16.2%}"
        f"\n{'training step':<28}{frozen_time * 1e3:>11.2f} ms{adamss_time * 1e3:>13.2f} ms"
        f"\n{'  ratio to frozen model':<28}{'':>14}{adamss_time / frozen_time:>15.2f}x"
        f"\n{'adapter file':<28}{'':>14}{path.stat().st_size / 1024:>12.0f} KiB"
        f"\n{'reloaded, same predictions':<28}{'':>14}{'yes' if same else 'NO':>16}"
        f"\n\nadapter: {path}\n{f'curves:  {plot}' if plotted else 'curves:  not drawn, matplotlib is missing'}"
    )
    return 0 if same else 1


def train(model: nn.Module, data: Split, epochs: int, lr: float, title: str) -> Run:
    """Train what requires grad with AdamW, one-cycle learning rate and batches of 64, showing progress."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    batches = -(-len(data.train_y) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    run = Run([], [])
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
                total += loss.item() / batches
            run.losses.append(total)
            run.accuracies.append(accuracy(model, data))
            bar.set_postfix(loss=f"{total:.3f}", accuracy=f"{run.accuracies[-1]:.1%}")
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


def draw(path: Path, runs: dict[str, Run]) -> bool:
    """Plot loss and accuracy of each run over epochs; False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for (name, run), style in zip(runs.items(), ("--", "-"), strict=True):
        epochs = range(1, len(run.losses) + 1)
        left.plot(epochs, run.losses, style, color="black", label=name)
        right.plot(epochs, [100 * a for a in run.accuracies], style, color="black", label=name)
    left.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log", title="Digits 5-9, training loss")
    right.set(xlabel="epoch", ylabel="test accuracy (%)", title="Digits 5-9, test accuracy")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True

"""Train eight AdaMSS adapters in one batch, a learning rate each, and the same eight runs one after the other.

    python examples/sweep.py --output_dir sweep

A small vision transformer is trained on the handwritten digits 0 to 4, and adapted to 5 to 9. In one batch every run
has its own rows, so all of them share each product with the frozen weights. The curves are the same but for rounding.
Adapters, `report.json` and `curves.png` go to the output directory. Needs no download.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adamss_kernels import AdaMSSConfig, AdapterBank, inject_adamss
from adamss_kernels.cli.digits import DigitsViT, load_digits_split

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 3e-2)
CONFIG = AdaMSSConfig(
    r=32, num_subspaces=8, subspace_rank=2, target_modules=["query", "value", "up", "down"], modules_to_save=["head"]
)


def main() -> None:
    """Run both ways, print a table, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("sweep"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, help="of each run (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="of each run (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    base = pretrained()
    data = load_digits_split(5, 9)
    order = torch.randint(len(data.train_x), (args.steps, args.batch_size), generator=torch.Generator().manual_seed(0))

    start = time.perf_counter()
    alone = {lr: train_alone(copy.deepcopy(base), lr, data, order) for lr in LEARNING_RATES}
    seconds_alone = time.perf_counter() - start
    start = time.perf_counter()
    bank = AdapterBank(copy.deepcopy(base))
    together = train_together(bank, data, order)
    seconds_together = time.perf_counter() - start

    rows = []
    for lr in LEARNING_RATES:
        with torch.no_grad(), bank.select([name_of(lr)] * len(data.test_x)):
            accuracy = float((bank.model(data.test_x).argmax(1) == data.test_y).float().mean())
        difference = max(abs(a - b) for a, b in zip(alone[lr], together[lr], strict=True))
        rows.append({"learning_rate": lr, "accuracy": accuracy, "loss": together[lr][-1], "difference": difference})
        print(f"learning rate {lr:<7g} accuracy {accuracy:.1%}  loss {together[lr][-1]:.4f}  "
              f"largest difference between the curves {difference:.1g}")  # fmt: skip
        bank.save(name_of(lr), args.output_dir / name_of(lr))
    print(f"one after the other {seconds_alone:.1f} s, in one batch {seconds_together:.1f} s")
    report = {"runs": rows, "seconds_alone": seconds_alone, "seconds_together": seconds_together}
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    draw(together, args.output_dir / "curves.png")


def pretrained() -> DigitsViT:
    """Return a model that knows the digits 0 to 4."""
    data, model = load_digits_split(0, 4), DigitsViT(width=64, depth=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        batch = torch.randint(len(data.train_x), (64,))
        F.cross_entropy(model(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_alone(model: nn.Module, lr: float, data, order: Tensor) -> list[float]:
    """Adapt `model` by itself; return the loss of each step."""
    inject_adamss(model, CONFIG, progress=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    losses = []
    for batch in order:
        loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train_together(bank: AdapterBank, data, order: Tensor) -> dict[float, list[float]]:
    """Train an adapter for each learning rate in one batch; return the loss of each step, by learning rate."""
    for lr in LEARNING_RATES:
        bank.add(name_of(lr), CONFIG)
    # A group of parameters for each run; AdamW treats every parameter by itself.
    groups = [{"params": bank.parameters(name_of(lr)), "lr": lr} for lr in LEARNING_RATES]
    optimizer = torch.optim.AdamW(groups)
    runs, size = len(LEARNING_RATES), order.shape[1]
    names = [name_of(lr) for lr in LEARNING_RATES for _ in range(size)]
    losses: dict[float, list[float]] = {lr: [] for lr in LEARNING_RATES}
    for batch in order:
        with bank.select(names):
            logits = bank.model(data.train_x[batch].repeat(runs, 1, 1))
        each = F.cross_entropy(logits, data.train_y[batch].repeat(runs), reduction="none").view(runs, size).mean(1)
        each.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for lr, loss in zip(LEARNING_RATES, each.tolist(), strict=True):
            losses[lr].append(loss)
    return losses


def name_of(lr: float) -> str:
    """Return the name of the adapter that is trained with this learning rate."""
    return f"lr-{lr:g}"


def draw(curves: dict[float, list[float]], path: Path) -> None:
    """Draw the loss of each run over its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for lr, losses in curves.items():
        axes.plot(losses, label=f"{lr:g}", linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Eight learning rates trained in one batch")
    axes.legend(title="learning rate", frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()

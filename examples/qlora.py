"""Fine-tune a small causal model whose weights are in 4 bits (NF4), and load the adapter onto it in bfloat16.

Needs no download: the model is pretrained here, on the bytes of docstrings of Python's standard library, and tuned on
those of other packages. Beside it the same fine-tuning runs over the weights in bfloat16. Writes the adapter and
report.json into --output_dir.

    pip install '.[hf,quantized]'
    python examples/qlora.py --output_dir qlora
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from make_docstrings import docstrings
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adamss_kernels import AdaMSSConfig, BaseWeightWarning, inject_adamss, load_adapter, save_adapter

PRETRAINED_ON, TUNED_ON = ("asyncio", "importlib", "logging", "unittest"), ("email", "http", "xml")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Pretrain, quantise, fine-tune, save, and load onto the base in bfloat16; return what report.json holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="where adapter and report go")
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the model (default: 128)")
    parser.add_argument("--layers", type=int, default=2, help="its layers (default: 2)")
    parser.add_argument("--pretrain_steps", type=int, default=300, help="steps of pretraining (default: 300)")
    parser.add_argument("--steps", type=int, default=150, help="steps of fine-tuning (default: 150)")
    parser.add_argument("--batch_size", type=int, default=16, help="texts of 128 bytes in a batch (default: 16)")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    pretrained = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=args.hidden_size,
            intermediate_size=2 * args.hidden_size,
            num_hidden_layers=args.layers,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    texts, held_out = windows(TUNED_ON)
    train(pretrained, windows(PRETRAINED_ON)[0], args.pretrain_steps, args.batch_size, 1e-3)
    base = pretrained.to(torch.bfloat16)
    in_4_bits = quantised(base)
    report = {"loss_pretrained": loss(base, held_out), "loss_quantised": loss(in_4_bits, held_out)}

    # The output head stays as it is: a rounding there costs most.
    config = AdaMSSConfig(r=32, num_subspaces=8, subspace_rank=2, target_modules=r".*_proj")
    for name, model in (("nf4", in_4_bits), ("bf16", copy.deepcopy(base))):
        inject_adamss(model, config)
        report[f"step_ms_{name}"] = train(model, texts, args.steps, args.batch_size, 5e-3)
        report[f"loss_tuned_{name}"] = loss(model, held_out)
        frozen = [p for p in (*model.parameters(), *model.buffers()) if not p.requires_grad]
        report[f"frozen_mib_{name}"] = sum(t.nbytes for t in frozen) / 2**20
    save_adapter(in_4_bits, args.output_dir / "adapter")

    with warnings.catch_warnings():
        # Four bits are further from the full weight than a rounding that passes without being asked for.
        warnings.simplefilter("ignore", BaseWeightWarning)
        served = load_adapter(base, args.output_dir / "adapter", strict=False)
    report["loss_adapter_on_bf16"] = loss(served, held_out)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    for key, value in report.items():
        print(f"{key:<22}{value:8.3f}")
    return report


def windows(packages: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return pieces of 128 bytes of the packages' docstrings, (n, 128) int64: to train on, and each eighth held out."""
    text = "\n".join(text for package in packages for text in docstrings(package)).encode()
    pieces = torch.frombuffer(bytearray(text[: len(text) // 128 * 128]), dtype=torch.uint8).long().reshape(-1, 128)
    is_held_out = torch.arange(len(pieces)) % 8 == 0
    return pieces[~is_held_out], pieces[is_held_out][:256]


def quantised(model: nn.Module) -> nn.Module:
    """Return a copy of the model with the linear layers of its blocks in NF4, as transformers loads it in 4 bits."""
    model = copy.deepcopy(model)
    for name, linear in list(model.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            options = {"quant_type": "nf4", "compute_dtype": linear.weight.dtype}
            packed = Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, **options)
            packed = packed.to(linear.weight.dtype)
            packed.load_state_dict(linear.state_dict())
            model.set_submodule(name, packed.to(linear.weight.device))
    return model


def train(model: nn.Module, texts: Tensor, steps: int, batch_size: int, lr: float) -> float:
    """Train what is trainable for so many steps; return the median milliseconds of one."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    order, seconds = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        begin = time.perf_counter()
        batch = texts[torch.randint(len(texts), (batch_size,), generator=order)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return 1000 * sorted(seconds)[len(seconds) // 2]


@torch.no_grad()
def loss(model: nn.Module, texts: Tensor) -> float:
    """Return the mean loss over the texts, in nats a byte."""
    losses = [model(input_ids=batch, labels=batch).loss.item() for batch in texts.split(64)]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()

"""Time one training step of a BERT-shaped encoder, adapted in every linear layer, against the frozen model and PEFT."""

from __future__ import annotations

import argparse
import copy

import torch
from measure import add_output_argument, interleaved, summary, write
from torch import nn

from adamss_kernels import AdaMSSConfig, inject_adamss


def encoder(layers: int, width: int, ffn: int) -> nn.Module:
    """A post-norm transformer encoder whose linear layers are all plain `nn.Linear`s."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=32,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        intermediate_size=ffn,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config, add_pooling_layer=False).encoder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=40.0)
    add_output_argument(parser)
    args = parser.parse_args()

    import peft

    torch.manual_seed(0)
    base = encoder(args.layers, args.width, args.ffn).requires_grad_(False)
    targets = ["query", "key", "value", "dense"]
    options = {"r": 100, "num_subspaces": 10, "subspace_rank": 1, "target_modules": targets}
    models = {
        "frozen": base,
        "adamss_kernels": inject_adamss(copy.deepcopy(base), AdaMSSConfig(**options), progress=False),
        "peft-adamss": peft.inject_adapter_in_model(peft.AdamssConfig(**options), copy.deepcopy(base)),
        "peft-lora": peft.inject_adapter_in_model(peft.LoraConfig(r=8, target_modules=targets), copy.deepcopy(base)),
    }

    def step(model: nn.Module) -> object:
        x = torch.randn(args.batch, args.tokens, args.width, requires_grad=True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters) if parameters else None

        def run() -> None:
            model(x).last_hidden_state.square().mean().backward()
            x.grad = None
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()

        return run

    results = summary(interleaved({name: step(model) for name, model in models.items()}, args.seconds), "frozen")
    for name, cell in results.items():
        print(f"{name:<16}{cell['median_s'] * 1e3:>10.2f} ms{cell['ratio']:>8.3f}")
    write(args.out, [vars(args) | {"out": str(args.out), "step": results}])


if __name__ == "__main__":
    main()

"""Serve many AdaMSS adapters of one causal language model, requests for different ones in the same batch.

    python examples/serve.py --adapters 64

The model is a small Llama with random weights, since nothing is downloaded; adapters are made, saved without their
basis (`compact=True`), and loaded into a bank. Every batch mixes requests; what they get is compared with what a model
with one adapter alone gives, and the time with serving adapter after adapter.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from adamss_kernels import AdaMSSConfig, AdapterBank

CONFIG = AdaMSSConfig(r=64, num_subspaces=10, subspace_rank=1, target_modules=["q_proj", "v_proj"])


def main() -> None:
    """Make adapters, load them, and answer batches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=3, help="of one request for each adapter (default: %(default)s)")
    parser.add_argument("--new_tokens", type=int, default=16, help="for each request (default: %(default)s)")
    args = parser.parse_args()
    names = [f"user-{i}" for i in range(args.adapters)]
    with tempfile.TemporaryDirectory() as folder:
        sizes = make_adapters(names, Path(folder))
        model = causal_model()
        bank = AdapterBank(model, {name: Path(folder, name) for name in names})
    memory = sum(p.numel() * p.element_size() for p in bank.parameters(names[0]))
    print(f"{len(names)} adapters: {memory / 1024:.1f} KiB each in memory, {sizes / 1024:.1f} KiB on the disk")

    generator = torch.Generator().manual_seed(1)
    mixed = one_by_one = 0.0
    for _ in range(args.batches):
        prompts = torch.randint(1, 1000, (len(names), 12), generator=generator)
        wanted = [names[i] for i in torch.randperm(len(names), generator=generator)]
        start = time.perf_counter()
        answers = answer(bank, wanted, prompts, args.new_tokens)
        mixed += time.perf_counter() - start
        start = time.perf_counter()
        alone = [answer(bank, [name], prompts[i : i + 1], args.new_tokens) for i, name in enumerate(wanted)]
        one_by_one += time.perf_counter() - start
        same = sum(torch.equal(answers[i], other[0]) for i, other in enumerate(alone))
        print(f"a batch of {len(names)}: {same} answers as from its adapter alone")
    count = args.batches * len(names) * args.new_tokens
    print(f"mixed batches {count / mixed:.0f} tokens/s, adapter after adapter {count / one_by_one:.0f} tokens/s")


def causal_model() -> torch.nn.Module:
    """Return a Llama of 4 layers, the same one at every call."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, pad_token_id=0, **sizes)).eval()


def make_adapters(names: list[str], folder: Path) -> int:
    """Save an adapter for each name, different from one another as if trained; return the bytes of one."""
    bank = AdapterBank(causal_model())
    bank.add("any", CONFIG)
    path = folder
    for name in names:
        for parameter in bank.parameters("any"):
            parameter.data.normal_(std=0.1)
        path = bank.save("any", folder / name, compact=True)
    return path.stat().st_size


@torch.inference_mode()
def answer(bank: AdapterBank, names: list[str], prompts: Tensor, new_tokens: int) -> Tensor:
    """Return the continuations (requests, tokens), each by the adapter of its name."""
    with bank.select(names):
        return bank.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )


if __name__ == "__main__":
    main()

"""Stage `step` of bench/gpu.py: a training step of a 3B-Llama-shaped model with q and v adapted."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import interleaved
from torch import nn

from adamss_kernels import AdaMSSConfig, inject_adamss

SHAPES = {
    "cuda": {
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
        "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 2048,
    },
    "cpu": {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 32,
    },
}  # fmt: skip
TOKENS = {"cuda": (4, 1024), "cpu": (2, 8)}
TARGETS = ["q_proj", "v_proj"]


def run(device: torch.device, budget: float, record: Callable[[dict[str, Any]], None]) -> None:
    """Time one optimizer step, and record its peak memory, for each method; 8 layers where 28 would take too long."""
    deadline = time.monotonic() + budget
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        record({"skipped": f"{error.name} is not installed"})
        return
    layers = SHAPES[device.type]["num_hidden_layers"]
    if budget < 50:
        layers = min(layers, 8)
    where = {"layers": layers, "tokens": TOKENS[device.type]}
    for name, adapt in _methods(device).items():
        if time.monotonic() > deadline:
            record({"method": name, "skipped": "no time left"})
            continue
        try:
            record({"method": name, **where, **_measure(adapt, device, layers)})
        except Exception as error:  # out of memory, or whatever another library cannot do
            record({"method": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
        # transformers' models hold themselves: one would still count in the peak of the next method.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _methods(device: torch.device) -> dict[str, Callable[[nn.Module], nn.Module]]:
    options = {"r": 100, "num_subspaces": 32, "subspace_rank": 1}
    if device.type == "cpu":
        options = {"r": 8, "num_subspaces": 3, "subspace_rank": 1}
    fused = AdaMSSConfig(**options, target_modules=TARGETS)

    def with_peft(config: str, **values: int) -> Callable[[nn.Module], nn.Module]:
        def adapt(model: nn.Module) -> nn.Module:
            # Not there, or older than AdaMSS in it: then this method is the one that fails.
            import peft

            return peft.get_peft_model(model, getattr(peft, config)(**values, target_modules=TARGETS))

        return adapt

    return {
        "adamss_kernels": lambda model: inject_adamss(model, fused, progress=False),
        "peft lora r=32": with_peft("LoraConfig", r=32),
        "frozen": lambda model: model.requires_grad_(False),
        "peft adamss": with_peft("AdamssConfig", **options),
    }


def _measure(adapt: Callable[[nn.Module], nn.Module], device: torch.device, layers: int) -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(**(SHAPES[device.type] | {"num_hidden_layers": layers}))
    with torch.device(device):
        model = LlamaForCausalLM(config).to(dtype)
    start = time.perf_counter()
    model = adapt(model).train()
    initialised = time.perf_counter() - start
    trained = [p for p in model.parameters() if p.requires_grad]
    tokens = torch.randint(0, config.vocab_size, TOKENS[device.type], device=device)
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    # Gradients flow through the frozen model to its first layer, as they do when something there is trained.
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()

    def step() -> None:
        embedded.grad = None
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = interleaved({"step": step}, device, rounds=5 if device.type == "cuda" else 1)["step"]
    if isinstance(seconds, str):
        return {"error": seconds}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "ms": seconds * 1e3,
        "peak GiB": peak,
        "trainable": sum(p.numel() for p in trained),
        "initialisation s": initialised,
    }

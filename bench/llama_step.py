"""Stage `step` of bench/gpu.py: a training step of a 3B-Llama-shaped model with q and v adapted."""

from __future__ import annotations

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


def run(device: torch.device, budget: float) -> dict[str, Any]:
    """Time one optimizer step, and record its peak memory, for each method; 8 layers where 28 would take too long."""
    deadline = time.monotonic() + budget
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        return {"skipped": f"{error.name} is not installed"}
    layers = SHAPES[device.type]["num_hidden_layers"]
    rows: list[dict[str, Any]] = []
    note = ""
    for name, adapt in _methods(device).items():
        left = deadline - time.monotonic()
        if left < 0:
            rows.append({"method": name, "error": "skipped for time"})
            continue
        if layers > 8 and not rows and left < 120:
            layers, note = 8, "8 layers instead of 28, for time"
        try:
            rows.append({"method": name, **_measure(adapt, device, layers)})
        except torch.OutOfMemoryError as error:
            rows.append({"method": name, "error": str(error).splitlines()[0]})
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows, "layers": layers, "note": note, "tokens": TOKENS[device.type]}


def _methods(device: torch.device) -> dict[str, Callable[[nn.Module], nn.Module]]:
    from peft import AdamssConfig, LoraConfig, get_peft_model

    options = {"r": 100, "num_subspaces": 32, "subspace_rank": 1}
    if device.type == "cpu":
        options = {"r": 8, "num_subspaces": 3, "subspace_rank": 1}
    fused = AdaMSSConfig(**options, target_modules=TARGETS)
    return {
        "frozen": lambda model: model.requires_grad_(False),
        "adamss_kernels": lambda model: inject_adamss(model, fused, progress=False),
        "peft lora r=32": lambda model: get_peft_model(model, LoraConfig(r=32, target_modules=TARGETS)),
        "peft adamss": lambda model: get_peft_model(model, AdamssConfig(**options, target_modules=TARGETS)),
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
    seconds = interleaved({"step": step}, device, rounds=3 if device.type == "cuda" else 1)["step"]
    if isinstance(seconds, str):
        return {"error": seconds}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None
    return {
        "ms": seconds * 1e3,
        "peak GiB": peak,
        "trainable": sum(p.numel() for p in trained),
        "initialisation s": initialised,
    }

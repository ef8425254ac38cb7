"""Measure one ASA update against PEFT's, against the optimizer step, and against the number of layers.

    python bench/asa.py --out results/asa.json

The models are stacks of square linear layers that share one frozen weight and one clustering, since ASA sees only the
trainable matrices; those are separate. Contenders run interleaved, and medians are compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import peft
import torch
from measure import add_output_argument, write
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, SubspaceAllocator

ASA = {"init_warmup": 1, "final_warmup": 10**9, "asa_target_subspaces": 1}


def chain_of(layer: nn.Module, num_layers: int) -> nn.Sequential:
    """Return `num_layers` copies of an adapted layer that share what is frozen."""
    frozen = {id(p): p for p in (*layer.parameters(), *layer.buffers()) if not p.requires_grad}
    return nn.Sequential(*(copy.deepcopy(layer, dict(frozen)) for _ in range(num_layers)))


def fused_chain(num_layers: int, width: int, K: int, r: int, interval: int) -> tuple[nn.Module, SubspaceAllocator]:
    config = AdaMSSConfig(num_subspaces=K, r=r, use_asa=True, mask_interval=interval, **ASA)
    torch.manual_seed(0)
    layer = FusedAdaMSSLinear.from_linear(nn.Linear(width, width), config)
    model = chain_of(layer, num_layers)
    for part in model:
        part.active, part.trainable = part.active.clone(), part.trainable.clone()
    return model, SubspaceAllocator(model, config)


def peft_chain(num_layers: int, width: int, K: int, r: int, interval: int) -> peft.PeftModel:
    config = peft.AdamssConfig(
        num_subspaces=K, r=r, use_asa=True, mask_interval=interval, target_modules=["linear"], **ASA
    )
    torch.manual_seed(0)
    model = nn.Sequential()
    for index in range(num_layers):
        model.add_module(str(index), nn.ModuleDict({"linear": nn.Linear(width, width)}))
    return peft.get_peft_model(model, config)


def fill_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Give the trainable parameters of `model` random values and gradients, and return them."""
    torch.manual_seed(1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.data.normal_()
        parameter.grad = torch.randn_like(parameter)
    return trainable


class Contender(NamedTuple):
    """What is timed, and what runs before it each time."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


def medians(contenders: dict[str, Contender], repeats: int) -> dict[str, float]:
    """Run the contenders in turn `repeats` times and return each one's median in seconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(repeats + 3):
        for name, contender in contenders.items():
            contender.prepare()
            start = time.perf_counter()
            contender.run()
            elapsed = time.perf_counter() - start
            if round_ >= 3:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def optimizer_of(parameters: list[nn.Parameter], **options: bool) -> torch.optim.Optimizer:
    """Return an AdamW that changes nothing, so that every repetition sees the same numbers."""
    return torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, **options)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time the contenders in groups, each interleaved by itself: what is compared shares its run and its caches."""
    shape = (args.width, args.subspaces, args.r)
    never, always = 10**9 - 1, 1
    milliseconds: dict[str, dict[str, float]] = {}

    def compare(group: str, contenders: dict[str, Contender]) -> dict[str, float]:
        seconds = medians(contenders, args.repeats)
        milliseconds[group] = {name: 1e3 * value for name, value in seconds.items()}
        return seconds

    # An update comes after an optimizer step, which leaves weights and gradients in the caches.
    def ours(num_layers: int, interval: int) -> Contender:
        model, allocator = fused_chain(num_layers, *shape, interval)
        return Contender(lambda: allocator.update_and_allocate(2), optimizer_of(fill_gradients(model)).step)

    def theirs(interval: int) -> Contender:
        model = peft_chain(args.layers, *shape, interval)
        return Contender(lambda: model.base_model.update_and_allocate(2), optimizer_of(fill_gradients(model)).step)

    update = compare("update", {"ours": ours(args.layers, never), "PEFT": theirs(never)})
    event = compare("update with event", {"ours": ours(args.layers, always), "PEFT": theirs(always)})
    scale = compare("layers", {"as given": ours(args.layers, never), "10 x": ours(args.layers * 10, never)})

    model, allocator = fused_chain(args.layers, *shape, never)
    parameters = fill_gradients(model)
    x = torch.randn(args.tokens, args.width)

    def forward() -> None:
        with torch.no_grad():
            model(x)

    # What attach() adds to a step where every layer is partly frozen.
    guarded_model, guard = fused_chain(args.layers, *shape, never)
    guarded_parameters = fill_gradients(guarded_model)
    for layer in guarded_model:
        layer.trainable[::2] = False
    guarded = optimizer_of(guarded_parameters, foreach=True)
    guard.attach(guarded)
    step = compare(
        "training step",
        {
            "forward": Contender(forward),
            "AdamW step, fused": Contender(optimizer_of(parameters, fused=True).step),
            "AdamW step, foreach": Contender(optimizer_of(parameters, foreach=True).step),
            "update": Contender(lambda: allocator.update_and_allocate(2)),
            "AdamW step, foreach, half of the subspaces frozen": Contender(guarded.step),
        },
    )
    return {
        "milliseconds": milliseconds,
        "PEFT / ours, update": update["PEFT"] / update["ours"],
        "PEFT / ours, update with event": event["PEFT"] / event["ours"],
        "10 x layers / update": scale["10 x"] / scale["as given"],
        "update / (AdamW step, fused, + forward)": step["update"] / (step["AdamW step, fused"] + step["forward"]),
        "update / (AdamW step, foreach, + forward)": step["update"] / (step["AdamW step, foreach"] + step["forward"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--subspaces", type=int, default=10)
    parser.add_argument("--r", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=128, help="rows of x in the forward that is compared with")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=None)
    add_output_argument(parser)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {"options": {k: str(v) for k, v in vars(args).items()}} | measure(args)
    print(json.dumps(result, indent=2))
    write(args.out, [result])


if __name__ == "__main__":
    main()

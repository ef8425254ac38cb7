"""Time one adapted layer against the bare frozen `nn.Linear`, PEFT's AdaMSS layer and PEFT's LoRA on the CPU."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from measure import add_output_argument, interleaved, summary, write
from torch import Tensor, nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear

# (D, N, M, K, r): BERT- and Llama-sized layers, long and short batches.
SHAPES = [
    (768, 768, 4096, 10, 3),
    (768, 768, 512, 10, 1),
    (384, 384, 512, 10, 1),
    (1024, 4096, 2048, 10, 1),
    (4096, 4096, 512, 10, 3),
]


def providers(linear: nn.Linear, K: int, r: int, names: list[str]) -> dict[str, nn.Module]:
    """Build each named provider around a copy of `linear`, all with the same trained update where they have one."""
    layer = FusedAdaMSSLinear.from_linear(copy.deepcopy(linear), AdaMSSConfig(num_subspaces=K, subspace_rank=r))
    nn.init.normal_(layer.C, std=0.02)
    built: dict[str, nn.Module] = {}
    for name in names:
        if name == "linear":
            built[name] = linear
        elif name in ("native", "reference"):
            built[name] = copy.deepcopy(layer)
            built[name].config = AdaMSSConfig(num_subspaces=K, subspace_rank=r, backend=name)
        elif name == "native-half-pruned":
            built[name] = copy.deepcopy(layer)
            built[name].active[::2] = False
        elif name == "peft-lora":
            built[name] = _peft(linear, "LoraConfig", r=8)
            nn.init.normal_(built[name].lora_B["default"].weight, std=0.02)
        else:
            adamss = _peft(linear, "AdamssConfig", num_subspaces=K, subspace_rank=r)
            B, C = layer.layout.unpack(layer.B.data, layer.C.data)
            for parameters, values in ((adamss.adamss_A["default"], B), (adamss.adamss_B["default"], C)):
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.data.copy_(value)
            built[name] = torch.compile(adamss) if name == "peft-adamss-compiled" else adamss
    return built


def _peft(linear: nn.Linear, config: str, **options: object) -> nn.Module:
    import peft

    model = nn.ModuleDict({"linear": copy.deepcopy(linear)})
    return peft.inject_adapter_in_model(getattr(peft, config)(target_modules=["linear"], **options), model)["linear"]


def check(built: dict[str, nn.Module], x: Tensor) -> None:
    """Refuse to time anything unless all AdaMSS providers agree."""
    outputs = {name: layer(x[:64]).float() for name, layer in built.items() if "adamss" in name or name == "native"}
    expected = next(iter(outputs.values()))
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    for name, output in outputs.items():
        error = ((output - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            raise SystemExit(f"{name} disagrees with {next(iter(outputs))}: relative difference {error}")


def forward(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward without gradients."""

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def forward_backward(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """Forward and backward with x requiring grad, gradients released as an optimizer step would."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> None:
        layer(x).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return run


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=10.0, help="per shape and direction (default: 10)")
    parser.add_argument("--shapes", default="", help="indices into the table of shapes, as in 0,2 (default: all)")
    parser.add_argument(
        "--providers", default="linear,native,native-half-pruned,peft-adamss,peft-adamss-compiled,peft-lora"
    )
    add_output_argument(parser)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    shapes = [SHAPES[int(i)] for i in args.shapes.split(",") if i] or SHAPES

    rows = []
    print(f"{'D':>5}{'N':>6}{'M':>6}{'K':>4}{'r':>3}  {'provider':<22}{'forward':>19}{'forward + backward':>22}")
    for D, N, M, K, r in shapes:
        # Otherwise the compiled provider of the last shape runs into dynamo's recompilation limit and goes eager.
        torch._dynamo.reset()
        torch.manual_seed(0)
        linear = nn.Linear(D, N).to(dtype).requires_grad_(False)
        built = providers(linear, K, r, args.providers.split(","))
        x, dy = torch.randn(M, D, dtype=dtype), torch.randn(M, N, dtype=dtype)
        check(built, x)
        inputs = {name: x.clone().requires_grad_() for name in built}
        results = {
            "forward": interleaved({k: forward(layer, x) for k, layer in built.items()}, args.seconds),
            "forward_backward": interleaved(
                {k: forward_backward(layer, inputs[k], dy) for k, layer in built.items()}, args.seconds
            ),
        }
        summaries = {direction: summary(times, "linear") for direction, times in results.items()}
        for name in built:
            cells = [summaries[direction][name] for direction in ("forward", "forward_backward")]
            text = "".join(f"{c['median_s'] * 1e3:>10.3f} ms{c['ratio']:>7.3f}" for c in cells)
            print(f"{D:>5}{N:>6}{M:>6}{K:>4}{r:>3}  {name:<22}{text}", flush=True)
        rows.append({"D": D, "N": N, "M": M, "K": K, "r": r, "dtype": args.dtype} | summaries)
    write(args.out, rows)


if __name__ == "__main__":
    main()

"""Every kernel of a GPU backend once, on small odd shapes: what compute-sanitizer watches in `sanitize`."""

from __future__ import annotations

import argparse
import itertools

import torch

from adamss_kernels import SubspaceLayout, adamss_linear


def main() -> None:
    """Run forward and backward of the backend, and compare with the reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("triton", "cuda"), default="triton")
    args = parser.parse_args()
    (_triton if args.backend == "triton" else _cuda)(args.device)
    print("agrees with the reference")


def _triton(device: str) -> None:
    # Few tokens, several tiles, and with sizes that nothing divides what torch multiplies.
    sizes = (
        [(1, 48, 64), (70, 96, 272), (64, 64, 64), (33, 37, 130)] if device == "cuda" else [(5, 16, 32), (5, 17, 20)]
    )
    dtypes = [torch.bfloat16, torch.float32] if device == "cuda" else [torch.float16, torch.float32]
    for (M, D, N), dtype, mode in itertools.product(sizes, dtypes, ("projection", "input")):
        _compare("triton", M, D, N, (2, 1, 3), dtype, device, mode)


def _cuda(device: str) -> None:
    sizes = [(1, 33, 40), (70, 37, 301), (64, 64, 64), (300, 200, 264), (130, 264, 776)]
    # Few columns of S; more than a block has; more than shared memory has; the fused kernels' 32 and 64.
    ranks = [(2, 1, 3), (7,) * 20, (60,) * 40, (3,) * 10, (4,) * 12]
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    for ((M, D, N), rank), dtype, mode in itertools.product(
        zip(sizes, ranks, strict=True), dtypes, ("projection", "input")
    ):
        _compare("cuda", M, D, N, rank, dtype, device, mode)


def _compare(
    backend: str, M: int, D: int, N: int, ranks: tuple[int, ...], dtype: torch.dtype, device: str, mode: str
) -> None:
    torch.manual_seed(0)
    K = len(ranks)
    layout = SubspaceLayout((torch.arange(N, device=device) % K).to(torch.int32), ranks)
    R = 5
    shapes = ((M, D), (N, D), (N,), (R, D), (R,), (sum(ranks), R), (N, max(ranks)))
    operands = [torch.randn(*shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    operands = [t.to(dtype if i < 5 else wide) for i, t in enumerate(operands)]
    leaves = [operands[i].requires_grad_() for i in (0, 5, 6)]
    active = torch.arange(K, device=device) % 3 != 1
    dy = torch.randn(M, N, device=device).to(dtype)
    results = []
    trainable = torch.arange(K, device=device) % 2 == 0
    for name in (backend, "reference"):
        options = {"active": active, "trainable": trainable, "backend": name}
        y = adamss_linear(*operands, layout, save_for_backward=mode, **options)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
        with torch.no_grad():
            adamss_linear(*operands, layout, **options)
    # As a whole: single entries, where terms cancel, are off by any factor in both.
    for what, got, want in zip(("y", "dx", "dB", "dC"), *results, strict=True):
        error = ((got.double() - want.double()).norm() / want.double().norm()).item()
        if not error <= 8 * torch.finfo(dtype).eps:
            raise SystemExit(f"{backend}, {dtype}, M={M}, D={D}, N={N}, {mode}: {what} is off by {error:.2g}")


if __name__ == "__main__":
    main()

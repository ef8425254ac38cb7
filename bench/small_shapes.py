"""Every kernel and form once, on small odd shapes: what compute-sanitizer watches in stage `sanitize`."""

from __future__ import annotations

import argparse
import itertools

import torch

from adamss_kernels import SubspaceLayout, adamss_linear
from adamss_kernels.triton import tuning


def main() -> None:
    """Run forward and backward of the Triton backend in each form, and compare with the reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args().device
    sizes = [(1, 33, 40), (70, 37, 130), (64, 64, 64)] if device == "cuda" else [(5, 17, 20)]
    dtypes = [torch.bfloat16, torch.float32] if device == "cuda" else [torch.float32]
    for (M, D, N), dtype in itertools.product(sizes, dtypes):
        for forward, mode in itertools.product(tuning.FORWARD_FORMS, ("projection", "input")):
            backward = "epilogue" if forward == "epilogue" else "two_launch"
            arch, shape = tuning.arch_of(torch.device(device)), tuning.shape_class(M, D, N)
            keys = (tuning.key("forward", dtype, arch, shape), tuning.key("backward", dtype, arch, shape))
            tuning.use({}, dict(zip(keys, (forward, backward), strict=True)))
            _compare(M, D, N, dtype, device, mode)
    print("agrees with the reference")


def _compare(M: int, D: int, N: int, dtype: torch.dtype, device: str, mode: str) -> None:
    torch.manual_seed(0)
    ranks = (2, 1, 3)
    layout = SubspaceLayout((torch.arange(N, device=device) % 3).to(torch.int32), ranks)
    R = 5
    shapes = ((M, D), (N, D), (N,), (R, D), (R,), (sum(ranks), R), (N, max(ranks)))
    operands = [torch.randn(*shape, device=device) / shape[-1] ** 0.5 for shape in shapes]
    operands = [t.to(dtype) if i < 5 else t for i, t in enumerate(operands)]
    leaves = [operands[i].requires_grad_() for i in (0, 5, 6)]
    active = torch.tensor([True, False, True], device=device)
    dy = torch.randn(M, N, device=device).to(dtype)
    results = []
    for backend in ("triton", "reference"):
        y = adamss_linear(*operands, layout, active=active, save_for_backward=mode, backend=backend)
        results.append((y, *torch.autograd.grad(y, leaves, dy)))
        with torch.no_grad():
            adamss_linear(*operands, layout, active=active, backend=backend)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


if __name__ == "__main__":
    main()

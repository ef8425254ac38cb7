"""The Triton kernels compile for GPUs that are not here, and their launchers do what the operators' fakes declare."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from adamss_kernels import ops

pytest.importorskip("triton")
_path = Path(__file__).parents[1] / "bench" / "triton_compile.py"
_spec = importlib.util.spec_from_file_location("triton_compile", _path)
triton_compile = importlib.util.module_from_spec(_spec)
sys.modules["triton_compile"] = triton_compile
_spec.loader.exec_module(triton_compile)


def compile_all(arch, dtype, shapes, rank=3, kernels=None):
    units = triton_compile.units_for(arch, dtype, shapes, rank)
    units = [unit for unit in units if kernels is None or unit.kernel.__name__ in kernels]
    assert units
    wrong = [fault for unit in units for fault in triton_compile.faults(triton_compile.compile_unit(unit, arch), arch)]
    assert not wrong


# The whole table, every dtype and shape class, is `python bench/triton_compile.py`: minutes.
@pytest.mark.parametrize("arch", triton_compile.ARCHS)
def test_shipped_configurations_compile_without_spills(arch):
    shapes = {name: triton_compile.SHAPES[name] for name in ("large-wide",)}
    kernels = None if arch == "sm_90" else triton_compile.PRODUCTS
    compile_all(arch, torch.bfloat16, shapes, kernels=kernels)


def test_decode_compiles():
    compile_all("sm_90", torch.float16, {"decode": triton_compile.SHAPES["decode"]}, kernels=("_linear_fwd_kernel",))


def test_shapes_that_nothing_divides_compile():
    compile_all("sm_90", torch.bfloat16, {"odd": (1001, 771, 773), "no whole step": (1001, 784, 784)}, rank=1)


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_float32_compiles(precision, monkeypatch):
    monkeypatch.setattr(triton_compile.backend._launchers(), "precision", lambda dtype: precision)
    shapes = {"large-narrow": triton_compile.SHAPES["large-narrow"]}
    compile_all("sm_90", torch.float32, shapes, kernels=("_linear_fwd_kernel", "_delta_bwd_kernel", "_project_kernel"))


def test_tf32_follows_torchs_setting():
    precision = triton_compile.backend._launchers().precision
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert precision(torch.float32) == setting
            assert precision(torch.bfloat16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("M", [1, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_launchers_allocate_what_the_fakes_declare(M, dtype):
    declared, made = [], []
    names = {"forward": ops._linear_forward_fake, "backward": ops._linear_backward_fake}
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        for name, fake in names.items():
            real = getattr(triton_compile.backend, name)

            def both(*args, real=real, fake=fake):
                made.append(real(*args))
                declared.append(fake(*args, "triton"))
                return made[-1]

            patch.setattr(triton_compile.backend, name, both)
        for call in triton_compile.operators(dtype, M, 768, 1024, R=100, K=10, rank=3):
            triton_compile.record("sm_90", call)
    assert len(made) == 9 + 4
    for outputs, expected in zip(made, declared, strict=True):
        for got, want in zip(outputs, expected, strict=True):
            assert (got.shape, got.stride(), got.dtype, got.device) == (
                want.shape,
                want.stride(),
                want.dtype,
                want.device,
            )


def test_operators_trace_on_fake_cuda_tensors():
    with FakeTensorMode():
        x, weight, A = (torch.empty(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((5, 8), (6, 8), (3, 8)))
        B, C = torch.empty(4, 3, device="cuda"), torch.empty(6, 2, device="cuda")
        rows, offsets = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (6, 3))
        y, S, P = ops.linear_forward(x, weight, None, A, None, B, C, rows, offsets, None, True, True, "auto")
    assert (y.shape, y.dtype, y.device.type) == ((5, 6), torch.bfloat16, "cuda")
    assert (S.shape, S.dtype, P.shape, P.dtype) == ((5, 4), torch.float32, (5, 3), torch.bfloat16)

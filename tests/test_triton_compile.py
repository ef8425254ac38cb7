"""The Triton kernels compile for GPUs that are not here, and their launchers do what the operators' fakes declare."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode

from adamss_kernels import SubspaceLayout, adamss_linear, ops
from adamss_kernels.subspaces import Subspaces

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
_path = Path(__file__).parents[1] / "tools" / "triton_compile.py"
_spec = importlib.util.spec_from_file_location("triton_compile", _path)
triton_compile = importlib.util.module_from_spec(_spec)
sys.modules["triton_compile"] = triton_compile
_spec.loader.exec_module(triton_compile)


@pytest.mark.timeout(1200)
def test_every_kernel_and_shipped_configuration_compiles_without_spills(tmp_path):
    """No spills, tensor cores where they belong, shared memory within the limit: in bfloat16, and on sm_90 in all.

    The tool compiles every dtype for every GPU, which takes minutes, when docs/triton-registers.md is written.
    """

    def compile_for(arch):
        command = [sys.executable, str(_path), "--arch", arch, "--out", str(tmp_path / f"{arch}.md")]
        command += [] if arch == "sm_90" else ["--dtype", "bfloat16"]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in pool.map(compile_for, triton_compile.ARCHS):
            assert done.returncode == 0, done.stderr[-3000:]
    kept = (_path.parents[1] / "docs" / "triton-registers.md").read_text()
    for arch in triton_compile.ARCHS:
        assert f"## {arch}" in kept


def test_shapes_that_nothing_divides_compile():
    shapes = {"few": (15, 784, 800), "torch's products": (1001, 771, 773)}
    units = triton_compile.units_for("sm_90", torch.bfloat16, shapes, rank=1)
    assert units
    for unit in units:
        assert not triton_compile.faults(triton_compile.compile_unit(unit, "sm_90"), "sm_90")


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
    names = {"forward": ops._forward_fake, "backward": ops._backward_fake}
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        for name, fake in names.items():
            real = getattr(triton_compile.backend, name)

            # Forward takes no mask of what trains.
            def both(*args, real=real, fake=fake, fields=5 if name == "forward" else 6):
                made.append(real(*args))
                flat = (part for arg in args for part in (arg[:fields] if isinstance(arg, Subspaces) else (arg,)))
                declared.append(fake(*flat))
                return made[-1]

            patch.setattr(triton_compile.backend, name, both)
        for call in triton_compile.operators(dtype, M, 768, 1024, R=100, K=10, rank=3):
            triton_compile.record("sm_90", call)
    assert len(made) == 4 + 4
    for outputs, expected in zip(made, declared, strict=True):
        for got, want in zip(outputs, expected, strict=True):
            assert (got.shape, got.stride(), got.dtype, got.device) == (
                want.shape,
                want.stride(),
                want.dtype,
                want.device,
            )


def test_compiles_whole_on_fake_cuda_tensors():
    # Without gradients: torch without CUDA has no autograd for CUDA tensors, fake ones included.
    layout = SubspaceLayout(torch.tensor([0, 1, 0, 1, 0, 1], dtype=torch.int32), (2, 2))
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with FakeTensorMode():
        rows, offsets = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (6, 3))
        layout = layout.with_tensors(rows, offsets)
        weight, basis = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (6, 3))
        B, C = torch.empty(4, 3, device="cuda"), torch.empty(6, 2, device="cuda")

        def function(x):
            return adamss_linear(x, weight, None, basis, None, B, C, layout)

        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=aot_autograd(fw_compiler=compiler))
        for shape in ((5, 8), (2, 9, 8)):
            y = compiled(torch.empty(shape, device="cuda", dtype=torch.bfloat16))
            assert (y.shape, y.dtype, y.device.type) == ((*shape[:-1], 6), torch.bfloat16, "cuda")
    called = [node.target for graph in graphs for node in graph.graph.nodes]
    assert called.count(ops.OPERATORS["reference"].forward) == len(graphs)

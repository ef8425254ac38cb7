"""Compile every Triton kernel for GPUs that are not here, and tabulate registers, spills and shared memory.

Usage: python tools/triton_compile.py [--arch sm_90 ...] [--dtype bfloat16 ...] [--out docs/triton-registers.md]

The operators run on fake CUDA tensors with the launches recorded instead of made, so what is compiled is what would be
launched: the same kernels, argument types, divisibility and configurations. Exit status 1 if a kernel spills, needs
more shared memory than its GPU has, or multiplies without tensor cores (on sm_90: without wgmma, or not overlapped).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import adamss_kernels.triton as backend
from adamss_kernels.mixed_batch import Groups
from adamss_kernels.subspaces import Subspaces
from adamss_kernels.triton import tuning

ARCHS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PRODUCTS = ("_low_rank_gemm_kernel", "_token_products_kernel")
SHAPES = {"few": (16, 768, 1024), "small": (256, 768, 1024), "large": (4096, 768, 1024)}
"""(M, D, N) of a member of each shape class."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """One compilation: what Triton's JIT would key its cache on."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int

    @property
    def tile(self) -> str:
        """The block sizes, as in the kernel's parameters."""
        return " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in self.constants if k.startswith("BLOCK_"))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What ptxas, or the AMD backend, says about one unit."""

    unit: Unit
    registers: int
    spilled: int
    shared: int
    tensor_core: str
    serialised: bool


def record(arch: str, run: Callable[[], object]) -> list[Unit]:
    """Return the distinct launches that `run` makes on fake CUDA tensors, as if the GPU were an `arch`."""
    units: dict[Unit, None] = {}

    def launch(kernel, grid, config, tensors, free, fixed, **constants):  # type: ignore[no-untyped-def]
        assert all(0 < size < 2**31 for size in grid[:1]) and all(0 < size < 65536 for size in grid[1:]), grid
        assert [param.name for param in kernel.params if param.do_not_specialize] == [
            param.name for param in kernel.params[len(tensors) : len(tensors) + len(free)]
        ]
        units[_unit(kernel, config, (*tensors, *free, *fixed), constants)] = None

    with (
        mock.patch.object(backend._launchers(), "launch", launch),
        mock.patch.object(backend, "_current", lambda device: contextlib.nullcontext()),
        mock.patch.object(tuning, "arch_of", lambda device: arch),
    ):
        run()
    return list(units)


def _unit(kernel: Any, config: tuning.Config, args: tuple[Any, ...], constants: dict[str, Any]) -> Unit:
    """Specialise as Triton's JIT does: None and 1 become constants, multiples of 16 are marked."""
    signature, fixed, divisible = [], list(constants.items()), []
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "i1"}
    names |= {torch.int32: "i32", torch.int64: "i64"}
    for param, value in zip(kernel.params, args, strict=False):
        specialised = not param.do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and specialised):
            signature.append((param.name, "constexpr"))
            fixed.append((param.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((param.name, f"*{names[value.dtype]}"))
            divisible.append(param.name)
        else:
            signature.append((param.name, "i32" if value < 2**31 else "i64"))
            if value % 16 == 0 and specialised:
                divisible.append(param.name)
    signature += [(name, "constexpr") for name in constants]
    return Unit(kernel, tuple(signature), tuple(fixed), tuple(divisible), config.num_warps, config.num_stages)


def compile_unit(unit: Unit, arch: str) -> Compiled:
    """Compile for `arch` and read registers, spilled bytes, shared bytes and the tensor-core instruction."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = [name for name, _ in unit.signature]
    source = ASTSource(
        fn=unit.kernel,
        signature=dict(unit.signature),
        constexprs={(names.index(name),): value for name, value in unit.constants},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in unit.divisible},
    )
    options = {"num_warps": unit.num_warps, "num_stages": unit.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget(*ARCHS[arch]), options=options)
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Compiled(unit, registers, 4 * spilled, compiled.metadata.shared, _first(text, r"v_mfma_\w+"), False)
    said = _ptxas(compiled.asm["ptx"], int(arch.removeprefix("sm_")))
    registers = int(re.search(r"Used (\d+) registers", said)[1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    instruction = _first(compiled.asm["ptx"], r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
    return Compiled(unit, registers, spilled, compiled.metadata.shared, instruction, "serialized" in said)


def _ptxas(ptx: str, capability: int) -> str:
    """Return what ptxas -v says."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "kernel.ptx")
        path.write_text(ptx)
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name={target}",
            str(path),
            "-o",
            str(path.with_suffix(".o")),
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _first(text: str, pattern: str) -> str:
    found = re.search(pattern, text)
    return found[0] if found else ""


def _preferred(form: str) -> Any:
    """Take this form wherever it is possible."""
    return mock.patch.object(tuning, "_form", lambda *key: form)


def operators(dtype: torch.dtype, M: int, D: int, N: int, R: int, K: int, rank: int) -> Iterator[Callable[[], object]]:
    """Yield calls that reach every kernel: each form forward and backward, with S and P kept and with neither."""
    with FakeTensorMode():
        B = torch.empty(K * rank, R, device="cuda", requires_grad=True)
        C = torch.empty(N, rank, device="cuda")
        operands = [torch.empty(shape, dtype=dtype, device="cuda") for shape in ((M, D), (N, D), (N,), (R, D), (R,))]
        rows, offsets = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (N, K + 1))
        active, trainable = (torch.empty(K, dtype=torch.bool, device="cuda") for _ in range(2))
        x, weight, bias, basis, basis_bias = operands
        subspaces = Subspaces(basis, basis_bias, rows, offsets, active, trainable)
        dy = torch.empty(M, N, dtype=dtype, device="cuda")
        S = torch.empty(M, K * rank, device="cuda")
        for form, keep_S in itertools.product(tuning.FORMS, (False, True)):

            def forward(form=form, keep_S=keep_S):  # type: ignore[no-untyped-def]
                with _preferred(form):
                    return backend.forward(x, weight, bias, B, C, subspaces, keep_S, keep_S)

            yield forward
        for form, P in itertools.product(tuning.FORMS, (None, x.new_empty(M, R))):

            def backward(form=form, P=P):  # type: ignore[no-untyped-def]
                with _preferred(form):
                    needs = [True, False, False, True, True]
                    return backend.backward(dy, x, S, P, weight, B, C, subspaces, needs)

            yield backward
        yield from grouped_operators(x, weight, bias, subspaces, dy, K * rank, rank)


def grouped_operators(x, weight, bias, subspaces, dy, rho, rank):  # type: ignore[no-untyped-def]
    """Yield the same for 64 adapters in a batch."""
    (M, _), (N, _), R, G = x.shape, weight.shape, subspaces.basis.shape[0], 64

    def indices(*shape, dtype=torch.int64):  # type: ignore[no-untyped-def]
        return torch.empty(shape, dtype=dtype, device="cuda")

    B, C = torch.empty(G, rho, R, device="cuda"), torch.empty(G, N, rank, device="cuda")
    masks = [torch.empty(G, subspaces.active.shape[0], dtype=torch.bool, device="cuda") for _ in range(2)]
    subspaces = subspaces._replace(active=masks[0], trainable=masks[1])
    groups = Groups(indices(M), indices(G), indices(G + 1), indices(-(-M // 16) + min(M, G), 3, dtype=torch.int32))
    S, P = torch.empty(M, rho, device="cuda"), x.new_empty(M, R)
    for keep in (False, True):
        yield lambda keep=keep: backend.grouped_forward(x, weight, bias, B, C, subspaces, groups, keep, keep)
    for need_dx in (False, True):
        needs = [need_dx, False, False, True, True]
        yield lambda needs=needs: backend.grouped_backward(dy, None, S, P, weight, B, C, subspaces, groups, needs)


def units_for(arch: str, dtype: torch.dtype, shapes: dict[str, tuple[int, int, int]], rank: int = 3) -> list[Unit]:
    """Return the distinct units of the operators over `shapes`, for K = 10 subspaces over a basis of rank 100."""
    found: dict[Unit, None] = {}
    for M, D, N in shapes.values():
        for call in operators(dtype, M, D, N, R=100, K=10, rank=rank):
            found |= dict.fromkeys(record(arch, call))
    return list(found)


def faults(compiled: Compiled, arch: str) -> list[str]:
    """Return what is wrong with a compilation, in words."""
    name, said = compiled.unit.kernel.__name__, []
    if compiled.spilled:
        said.append(f"{name} on {arch} ({compiled.unit.tile}) spills {compiled.spilled} bytes")
    if compiled.shared > SHARED_LIMIT[arch]:
        said.append(f"{name} on {arch} ({compiled.unit.tile}) needs {compiled.shared} bytes of shared memory")
    if compiled.serialised:
        said.append(f"{name} on {arch} ({compiled.unit.tile}) runs its wgmma one after the other")
    constants, signature = dict(compiled.unit.constants), dict(compiled.unit.signature)
    fma = constants.get("PRECISION") == "ieee" and "*fp32" in (signature.get("L_ptr"), signature.get("dy_ptr"))
    # A warp group works on 64 rows at least: below that mma.sync is what there is.
    expected = (
        "wgmma" if arch == "sm_90" and constants.get("BLOCK_M", 0) >= 64 else "mfma" if arch == "gfx942" else "mma"
    )
    if name in PRODUCTS and not fma and expected not in compiled.tensor_core:
        said.append(f"{name} on {arch} ({compiled.unit.tile}) runs without {expected}")
    return said


def table(results: dict[str, list[tuple[str, Compiled]]]) -> str:
    """Return docs/triton-registers.md."""
    import triton

    lines = [
        "# Registers and shared memory of the Triton kernels",
        "",
        f"Written by `python tools/triton_compile.py` with Triton {triton.__version__}, without a GPU: what the",
        "compiler says, for K = 10 and R = 100. A spill count other than 0 is an error. None of this measures speed.",
        "",
    ]
    for arch, rows in results.items():
        lines += [f"## {arch}", "", "| kernel | dtype | tile | warps | stages | registers | spilled | shared | unit |"]
        lines += ["|---|---|---|---:|---:|---:|---:|---:|---|"]
        for dtype, c in sorted(rows, key=lambda row: (row[1].unit.kernel.__name__, row[0], row[1].unit.tile)):
            unit = c.unit
            lines.append(
                f"| `{unit.kernel.__name__}` | {dtype} | {unit.tile} | {unit.num_warps} | {unit.num_stages} "
                f"| {c.registers} | {c.spilled} | {c.shared} | {c.tensor_core} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile, print what is wrong, and write the table where `--out` says so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, help="file for the table; it is printed otherwise")
    options = parser.parse_args(argv)
    shapes = {name: SHAPES[name] for name in options.shape}
    results: dict[str, list[tuple[str, Compiled]]] = {}
    wrong: list[str] = []
    for arch, dtype in itertools.product(options.arch, options.dtype):
        for precision in ("ieee", "tf32") if dtype == "float32" else ("ieee",):
            with mock.patch.object(backend._launchers(), "precision", lambda dtype, precision=precision: precision):
                units = units_for(arch, DTYPES[dtype], shapes)
            for unit in units:
                compiled = compile_unit(unit, arch)
                label = "tf32" if precision == "tf32" else dtype
                row = (label, compiled)
                results.setdefault(arch, []).append(row)
                wrong += faults(compiled, arch)
                print(f"{arch} {label} {unit.kernel.__name__}: {compiled.registers} registers", file=sys.stderr)
    print("\n".join(wrong), file=sys.stderr)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(table(results))
    else:
        print(table(results))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

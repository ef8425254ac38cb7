"""Forward and backward on GPUs of compute capability 9.0 (csrc/cuda/hopper.cu): one kernel for base and update.

Forward is y = x W^T + S C^T with S = x Q^T + q, backward dx = dy W + dS Q with dS = dy C: the same kernel, which takes
the inner product from the tiles that it reads for the base product. A bias rides along as one more column of S.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from ..compiled.cuda_library import FusedArgs, load
from ..subspaces import Subspaces
from .operands import DTYPES as NUMBERS
from .operands import dense, layout_of, place, pointer

DTYPES = (torch.bfloat16, torch.float16)

# Fewer tokens leave most of a tile of 128 rows empty.
_MIN_TOKENS = 65
_MAX_RHO_PAD = 64


def takes(t: Tensor, weight: Tensor, rho: int, bias: Tensor | None = None) -> bool:
    """Return whether the kernel can read `t` (x or dy) and `weight`, and holds `rho` columns of S, and the bias."""
    return (
        t.dtype in DTYPES
        and t.shape[0] >= _MIN_TOKENS
        and _is_hopper(t.device)
        and _padded(rho, bias) <= _MAX_RHO_PAD
        and is_aligned(t)
        and is_aligned(weight)
        # Rows of y and dx are dense.
        and weight.shape[0] % 8 == 0
        and weight.shape[1] % 8 == 0
    )


def is_here() -> bool:
    """Return whether the current GPU runs these kernels."""
    try:
        return _is_hopper(torch.device("cuda", torch.cuda.current_device()))
    except (RuntimeError, AssertionError, OSError):  # a torch without CUDA asserts
        return False


def is_aligned(t: Tensor) -> bool:
    """Return whether rows are dense and start at multiples of 16 bytes, as bulk copies need them."""
    rows, columns = t.stride()
    return columns == 1 and rows % 8 == 0 and rows >= t.shape[1] and t.data_ptr() % 16 == 0


def input_product(x: Tensor, basis: Tensor, basis_bias: Tensor | None) -> Tensor:
    """Return P = x A^T + a (M, R), through rows of whole 16 bytes: cuBLAS writes others at half the speed."""
    R = basis.shape[0]
    basis, basis_bias = basis.to(x.dtype), None if basis_bias is None else basis_bias.to(x.dtype)
    padding = -R % 8
    if padding:
        basis = F.pad(basis, (0, 0, 0, padding))
        basis_bias = None if basis_bias is None else F.pad(basis_bias, (0, padding))
    return F.linear(x, basis, basis_bias)[:, :R].contiguous()


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    keep_S: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return y = x W^T + bias + S C^T (M, N), and S (M, RHO) in float32 where it is kept, in two launches."""
    y = x.new_empty(x.shape[0], weight.shape[0])
    S = x.new_empty((x.shape[0], B.shape[0]), dtype=torch.float32) if keep_S else None
    bias = dense(bias, x.dtype)
    args = _operands(x, x, weight, bias, B, C, subspaces)
    args[0].y, args[0].S = y.data_ptr(), pointer(S)
    _run(x, args[0])
    return y, S


def backward(
    dy: Tensor,
    x: Tensor | None,
    S: Tensor | None,
    P: Tensor | None,
    weight: Tensor,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
    need_dB: bool,
    need_dC: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return dx = dy W + dS Q (M, D), dB (RHO, R) and dC (N, r_max), in four launches, or five where x was kept.

    dB is dS^T P, or (dS^T x) A^T + (sum_m dS) a^T where x was kept and P was not.
    """
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    dB = torch.empty_like(B, dtype=torch.float32, memory_format=torch.contiguous_format) if need_dB else None
    dC = torch.empty_like(C, dtype=torch.float32, memory_format=torch.contiguous_format) if need_dC else None
    S, P = dense(S, torch.float32) if need_dC else None, dense(P, dy.dtype) if need_dB else None
    args = _operands(dy, x, weight, None, B, C, subspaces)
    fused = args[0]
    fused.dy, fused.stride_dym = dy.data_ptr(), dy.stride(0)
    fused.S, fused.P, fused.dx, fused.dB, fused.dC = pointer(S), pointer(P), dx.data_ptr(), pointer(dB), pointer(dC)
    _run(dy, fused)
    return dx, None if dB is None else dB.to(B.dtype), None if dC is None else dC.to(C.dtype)


def _operands(
    like: Tensor,
    x: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    B: Tensor,
    C: Tensor,
    subspaces: Subspaces,
) -> tuple[FusedArgs, tuple[Tensor | None, ...]]:
    """Return the arguments that both directions share, and the tensors that have to live until the launch."""
    basis, basis_bias, row_subspace, offsets, active, trainable, *_ = subspaces
    dtype = like.dtype
    B, C = dense(B, torch.float32), dense(C, torch.float32)
    active, trainable = dense(active, torch.bool), dense(trainable, torch.bool)
    if basis is not None:
        basis = basis if basis.dtype in (dtype, torch.float32) else basis.float()
        basis_bias = None if basis_bias is None else basis_bias.to(basis.dtype)
    args = FusedArgs(
        # In the order of csrc/cuda/interface.h; keywords would take longer than a small layer's kernel.
        *place(like),
        NUMBERS[dtype],
        NUMBERS[dtype if basis is None else basis.dtype],
        like.shape[0],
        weight.shape[1],
        B.shape[0],
        _padded(B.shape[0], bias),
        B.shape[1],
        C.shape[1],
        _multiprocessors(like.device),
        pointer(x),
        0 if x is None else x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        pointer(bias),
        pointer(basis),
        *((0, 0) if basis is None else basis.stride()),
        pointer(basis_bias),
        0 if basis_bias is None else basis_bias.stride(0),
        B.data_ptr(),
        C.data_ptr(),
    )
    args.layout = layout_of(row_subspace, offsets, active, trainable)
    return args, (bias, basis, basis_bias, B, C, active, trainable)


def _run(like: Tensor, args: FusedArgs) -> None:
    library = load()
    workspace = like.new_empty(library.fused_workspace(args), dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    library.fused(args)


def _padded(rho: int, bias: Tensor | None) -> int:
    """Return RHO_PAD: a multiple of 32, with room for the bias."""
    return -(-(rho + (bias is not None)) // 32) * 32


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Return whether the GPU is one, and the library has code for it: PTX for older ones lacks its instructions."""
    compiled_for = [name.removesuffix("+PTX") for name in load().architectures.split()]
    return torch.cuda.get_device_capability(device) == (9, 0) and "90" in compiled_for


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count

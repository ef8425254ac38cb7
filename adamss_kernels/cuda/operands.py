"""How the CUDA library takes tensors: addresses, numbers of dtypes, device and stream."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ..compiled.cuda_library import Layout

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def place(t: Tensor) -> tuple[int, int]:
    """Return the number of the tensor's device, and the address of that device's current stream."""
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


@overload
def dense(t: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return t contiguous and of `dtype`, copied only where it is not."""
    return t if t is None or (t.dtype is dtype and t.is_contiguous()) else t.to(dtype).contiguous()


def pointer(t: Tensor | None) -> int | None:
    """Return the tensor's address, null for none."""
    return None if t is None else t.data_ptr()


def layout_of(row_subspace: Tensor, offsets: Tensor, active: Tensor | None, trainable: Tensor | None) -> Layout:
    """Return rows, offsets and masks as the library takes them."""
    return Layout(
        row_subspace.shape[0],
        offsets.shape[0] - 1,
        row_subspace.data_ptr(),
        offsets.data_ptr(),
        pointer(active),
        pointer(trainable),
    )

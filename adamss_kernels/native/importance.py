"""ASA's averages over many small matrices, in two calls of the library instead of several per matrix."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from .library import load

_DTYPES = {torch.float32: 0, torch.float64: 1}


def measure_importance(
    weights: Sequence[Tensor], grads: Sequence[Tensor | None], sizes: array[int], measured: Tensor
) -> float | None:
    """Write |w * g| of every matrix, one after the other, into `measured`.

    Args:
        weights: Matrices.
        grads: Their gradients; None stands for zero.
        sizes: Elements of each matrix, as int64.
        measured: (sum of the sizes,) float32 or float64, contiguous.

    Returns:
        The sum, finite exactly when all elements are; None, with nothing written, where a weight or gradient is not
        contiguous or of another dtype, or a weight not on the CPU or not as large as told.
    """
    dtype = measured.dtype
    if (
        not all(map(Tensor.is_contiguous, weights))
        or not all([weight.is_cpu for weight in weights])  # noqa: C419 (a generator takes longer)
        or {weight.dtype for weight in weights} != {dtype}
        or array("q", map(Tensor.numel, weights)) != sizes
    ):
        return None
    addresses = array("q")
    for grad in grads:
        if grad is None:
            addresses.append(0)
        elif grad.dtype is dtype and grad.is_contiguous():
            addresses.append(grad.data_ptr())
        else:
            return None
    of_weights = array("q", [weight.data_ptr() for weight in weights])
    total = ctypes.c_double()
    load().measure(
        _DTYPES[dtype],
        len(sizes),
        of_weights.buffer_info()[0],
        addresses.buffer_info()[0],
        sizes.buffer_info()[0],
        measured.data_ptr(),
        ctypes.addressof(total),
    )
    return total.value


def accumulate_importance(
    measured: Tensor, importance: Tensor, uncertainty: Tensor, weight1: float, weight2: float
) -> None:
    """Let both averages take in `measured`: uncertainty from the deviation from the old importance, then importance.

    Args:
        measured: Contiguous, float32 or float64, on the CPU; so are the averages, which change in place.
        importance: EMA of `measured`.
        uncertainty: EMA of |measured - importance|.
        weight1: What the importance takes of the new value, 1 - beta1.
        weight2: What the uncertainty takes of the deviation, 1 - beta2.
    """
    pointers = (measured.data_ptr(), importance.data_ptr(), uncertainty.data_ptr())
    load().accumulate(_DTYPES[measured.dtype], measured.numel(), *pointers, weight1, weight2)

"""What follows from a frozen B alone, computed once: the projection Q, q of the GPU backends."""

from __future__ import annotations

import operator
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


class _Projection(NamedTuple):
    state: tuple[object, ...]
    frozen: tuple[Tensor | None, ...]
    Q: Tensor
    q: Tensor | None
    stream: torch.cuda.Stream | None  # that computed it, and when it had
    ready: torch.cuda.Event | None


_projections: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def frozen_projection(
    project: Callable[..., tuple[Tensor, Tensor | None]],
    basis: Tensor,
    basis_bias: Tensor | None,
    B: Tensor,
    offsets: Tensor,
    active: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Return Q and q, computed once for every version of a frozen B, its basis and its mask.

    B counts as frozen when it is a parameter that does not require gradients: other tensors, such as one packed for
    this call alone, are seldom seen again. A changed version is written over the old Q, so the address
    that a CUDA graph recorded stays valid; a graph that replays across such a change reads the new Q only after some
    call outside a graph has computed it. Streams wait for each other's Q, but a change does not wait for other streams
    that still read the old one.
    """
    frozen = (basis, basis_bias, active)
    if (
        not isinstance(B, nn.Parameter)
        or B.requires_grad
        or any(t is not None and t.is_inference() for t in (B, *frozen))
    ):
        return project(basis, basis_bias, B, offsets, active, dtype)
    # `module.to` puts other data into the same tensor; only writing in place counts versions.
    state = (dtype, B.data_ptr(), B._version, *(None if t is None else (t.data_ptr(), t._version) for t in frozen))
    held = _projections.get(B)
    # A capture begins when all streams are done, and must not wait for any.
    stream = torch.cuda.current_stream(B.device) if B.is_cuda else None
    is_capturing = stream is not None and torch.cuda.is_current_stream_capturing()
    if held is not None and held.state == state and all(map(operator.is_, held.frozen, frozen)):
        if stream is not None and held.ready is not None and stream != held.stream and not is_capturing:
            stream.wait_event(held.ready)
        return held.Q, held.q
    if is_capturing:
        # Memory of the graph's pool holds a value only once the graph has run.
        return project(basis, basis_bias, B, offsets, active, dtype)
    if stream is not None:
        Q, q = _in_own_memory(stream, project, basis, basis_bias, B, offsets, active, dtype)
    else:
        with torch.inference_mode(False):  # or the next version could not be written over it
            Q, q = project(basis, basis_bias, B, offsets, active, dtype)
    if held is not None and (held.Q.dtype, held.Q.device, held.q is None) == (dtype, B.device, q is None):
        Q, q = held.Q.copy_(Q), None if q is None else held.q.copy_(q)
    ready = None if stream is None else stream.record_event()
    _projections[B] = _Projection(state, frozen, Q, q, stream, ready)
    return Q, q


def _in_own_memory(
    stream: torch.cuda.Stream, project: Callable[..., tuple[Tensor, Tensor | None]], *args: object
) -> tuple[Tensor, Tensor | None]:
    """Call `project` on `stream` in a thread of its own: what is kept must not lie in a CUDA graph's memory.

    While torch.compile warms up for CUDA graphs (mode="reduce-overhead"), what its thread allocates comes from their
    pool, and an error says that something there has outlived the call. A new thread has neither that pool nor
    inference mode.
    """

    def run() -> tuple[Tensor, Tensor | None]:
        with torch.cuda.stream(stream):
            return project(*args)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()

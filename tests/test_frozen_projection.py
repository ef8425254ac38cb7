"""Where what is kept of a frozen B lies, and who waits for it; when it is computed is tested with what computes it."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from adamss_kernels.frozen_projection import _projections, frozen_projection


class Stream:
    """A pretended CUDA stream, which notes the events that it waits for."""

    def __init__(self):
        self.waited = []

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def cuda(monkeypatch):
    """CPU tensors as if they were CUDA's; its `stream` is current, and may be capturing."""
    state = SimpleNamespace(stream=Stream(), is_capturing=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.is_capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return state


def test_what_is_kept_lies_outside_the_memory_of_cuda_graphs(cuda):
    """While torch.compile warms up for them, it is the calling thread whose memory is theirs."""
    seen = []

    def project(basis, basis_bias, B, offsets, active, dtype):
        seen.append((threading.get_ident(), torch.is_inference_mode_enabled()))
        return B @ basis, None

    B, basis = nn.Parameter(torch.randn(3, 4), requires_grad=False), torch.randn(4, 5)
    with torch.inference_mode():
        Q, _ = frozen_projection(project, basis, None, B, None, None, torch.float32)
        again, _ = frozen_projection(project, basis, None, B, None, None, torch.float32)
    assert again is Q
    ((thread, inference),) = seen
    assert thread != threading.get_ident()
    assert not inference
    cuda.is_capturing = True
    assert frozen_projection(project, basis, None, B, None, None, torch.float32)[0] is Q
    B.mul_(2)
    anew, _ = frozen_projection(project, basis, None, B, None, None, torch.float32)
    assert seen[1][0] == threading.get_ident()
    assert _projections[B].Q is Q is not anew


def test_another_stream_waits_until_it_has_been_computed(cuda):
    B, basis = nn.Parameter(torch.randn(3, 4), requires_grad=False), torch.randn(4, 5)

    def call():
        frozen_projection(lambda *_: (B @ basis, None), basis, None, B, None, None, torch.float32)

    first, second = cuda.stream, Stream()
    call()
    call()
    cuda.stream = second
    call()
    assert (first.waited, second.waited) == ([], [first])
    # Work of other streams is unknown to a capture, which fails if it waits for any.
    cuda.is_capturing = True
    call()
    assert second.waited == [first]


def test_what_is_packed_for_one_call_is_projected_in_place(cuda):
    """In a PEFT model B is packed anew in each forward, which without gradients does not require any."""
    parts, basis = [nn.Parameter(torch.randn(1, 4)) for _ in range(3)], torch.randn(4, 5)
    threads = []

    def project(basis, basis_bias, B, offsets, active, dtype):
        threads.append(threading.get_ident())
        return B @ basis, None

    with torch.no_grad():
        B = torch.cat(parts)
        for _ in range(2):
            frozen_projection(project, basis, None, B, None, None, torch.float32)
    assert threads == [threading.get_ident()] * 2
    assert B not in _projections

"""Where what is kept of a frozen B lies; when it is computed again is tested with the kernels that compute it."""

from __future__ import annotations

import contextlib
import threading

import torch

from adamss_kernels import frozen


def test_what_is_kept_of_a_frozen_B_lies_outside_the_memory_of_cuda_graphs(monkeypatch):
    """While torch.compile warms up for them, it is the calling thread whose memory is theirs."""
    seen = []

    def project(basis, basis_bias, B, offsets, active, dtype):
        seen.append((threading.get_ident(), torch.is_inference_mode_enabled()))
        return B @ basis, None

    B, basis = torch.randn(3, 4), torch.randn(4, 5)
    capturing = False
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    with torch.inference_mode():
        Q, _ = frozen.frozen_projection(project, basis, None, B, None, None, torch.float32)
        again, _ = frozen.frozen_projection(project, basis, None, B, None, None, torch.float32)
    assert again is Q
    ((thread, inference),) = seen
    assert thread != threading.get_ident()
    assert not inference
    capturing = True
    assert frozen.frozen_projection(project, basis, None, B, None, None, torch.float32)[0] is Q
    B.mul_(2)
    anew, _ = frozen.frozen_projection(project, basis, None, B, None, None, torch.float32)
    assert seen[1][0] == threading.get_ident()
    assert frozen._projections[B].Q is Q is not anew

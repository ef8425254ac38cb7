"""A small training run with ASA, the same for the same step whatever ran before."""

from __future__ import annotations

import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, inject_adamss
from adamss_kernels.model import adamss_layers

TOTAL = 32  # subspaces of `chain()`


def config(**overrides):
    fields = {"r": 8, "num_subspaces": 8, "use_asa": True, "asa_target_subspaces": 5}
    fields |= {"init_warmup": 5, "final_warmup": 47, "mask_interval": 5}
    return AdaMSSConfig(**(fields | overrides))


def chain():
    """Four linear layers of different shapes and 8 subspaces each."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(14, 19), nn.Linear(19, 24), nn.Linear(24, 17), nn.Linear(17, 21))


class Run:
    """Trains a chain on a stream of batches that depends on the step alone."""

    def __init__(self, cfg, optimizer=None, model=None, attach=True):
        self.config = cfg
        self.model = inject_adamss(chain(), cfg, progress=False) if model is None else model
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = (optimizer or default_optimizer)(parameters)
        self.allocator = SubspaceAllocator(self.model, cfg)
        if attach:
            self.allocator.attach(self.optimizer)

    def backward(self, step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(6, 14, generator=generator)
        y = torch.randn(6, 21, generator=generator)
        nn.functional.mse_loss(self.model(x), y).backward()

    def steps(self, start, stop):
        for step in range(start, stop):
            self.backward(step)
            self.optimizer.step()
            self.allocator.update_and_allocate(step)
            self.optimizer.zero_grad()
            yield step

    def until(self, stop, start=0):
        for _ in self.steps(start, stop):
            pass
        return self

    @property
    def layers(self):
        return list(adamss_layers(self.model).values())

    def active(self):
        return sum(self.allocator.active_counts().values())


def default_optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def finished(run):
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "asa": run.allocator.state_dict()}

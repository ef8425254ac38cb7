"""Fine-tune a small model on several processes: DDP, FSDP2, tensor parallelism, or the last two together.

    torchrun --nproc-per-node 2 examples/distributed.py --strategy fsdp --output_dir out

On GPUs with NCCL, else on CPUs with gloo. Data and model are made up, and the same however many processes train: so is
the result, to rounding. A run that is started again goes on from its last checkpoint, on any number of processes.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, inject_adamss, save_adapter
from adamss_kernels.tensor_parallel import ColwiseAdaMSS, RowwiseAdaMSS

STRATEGIES = ("ddp", "fsdp", "tensor", "both")
WIDTH, SEQUENCE, BATCH, STEPS = 64, 8, 16, 24
CONFIG = AdaMSSConfig(
    r=32,
    num_subspaces=8,
    subspace_rank=2,
    target_modules=["up", "down"],
    use_asa=True,
    asa_target_subspaces=12,
    init_warmup=4,
    final_warmup=16,
    mask_interval=4,
)


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, sequence, WIDTH) to the same shape."""
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def spread(model: nn.Module, strategy: str, mesh: DeviceMesh) -> nn.Module:
    """Spread an adapted model: tensor parallelism first, then FSDP2 or DDP around it."""
    if "tensor" in mesh.mesh_dim_names:
        # Between its layers a block's tensors are spread over the sequence.
        plan = {"up": ColwiseAdaMSS(input_layouts=Shard(1)), "down": RowwiseAdaMSS(output_layouts=Shard(1))}
        for block in model:
            parallelize_module(block, mesh["tensor"], plan)
    if strategy in ("fsdp", "both"):
        for block in model:
            fully_shard(block, mesh=mesh["data"])
        return fully_shard(model, mesh=mesh["data"])
    return DistributedDataParallel(model) if strategy == "ddp" else model


def batch(step: int, mesh: DeviceMesh, device: torch.device) -> list[Tensor]:
    """Return x and y of this rank: its part of the batch, and of the sequence where that is spread."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, SEQUENCE, WIDTH, generator=generator)
    tensors = [x, x.roll(1, dims=2)]
    for dim, name in enumerate(("data", "tensor")):
        if name in mesh.mesh_dim_names:
            tensors = [t.chunk(mesh[name].size(), dim)[mesh.get_local_rank(name)] for t in tensors]
    return [t.to(device) for t in tensors]


class Checkpoint:
    """What a run continues from, in torch's sharded format."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, allocator: SubspaceAllocator) -> None:
        self.model, self.optimizer, self.allocator = model, optimizer, allocator

    def _state(self) -> dict[str, object]:
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "asa": self.allocator, "step": 0}

    def save(self, step: int, folder: Path) -> None:
        """Write the state after `step` steps; a file that names the last complete checkpoint follows it."""
        dcp.save(self._state() | {"step": step}, checkpoint_id=folder / f"step-{step}")
        if dist.get_rank() == 0:
            (folder / "last.new").write_text(f"step-{step}")
            (folder / "last.new").rename(folder / "last")
        dist.barrier()

    def load(self, folder: Path) -> int:
        """Take the last complete checkpoint, and return how many steps it has; 0 without one."""
        if not (folder / "last").exists():
            return 0
        state = self._state()
        dcp.load(state, checkpoint_id=folder / (folder / "last").read_text())
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),
        )
        return state["step"]


def main() -> None:
    """Train, or go on training, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=STRATEGIES, default="fsdp")
    parser.add_argument("--output_dir", type=Path, default=Path("./output"))
    parser.add_argument("--stop_after", type=int, default=STEPS, help="end early, as if killed after so many steps")
    args = parser.parse_args()

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device, ranks = torch.device(kind), dist.get_world_size()
    if args.strategy == "both":
        mesh = init_device_mesh(kind, (ranks // 2, 2), mesh_dim_names=("data", "tensor"))
    else:
        mesh = init_device_mesh(kind, (ranks,), mesh_dim_names=("tensor" if args.strategy == "tensor" else "data",))
    args.output_dir.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).to(device)
    model = inject_adamss(model, CONFIG, progress=False, group=dist.group.WORLD)
    model = spread(model, args.strategy, mesh)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    allocator = SubspaceAllocator(model, CONFIG)
    allocator.attach(optimizer)

    checkpoint = Checkpoint(model, optimizer, allocator)
    for step in range(checkpoint.load(args.output_dir) + 1, args.stop_after + 1):
        x, y = batch(step, mesh, device)
        # Gradients are averaged over parts of the batch, and summed over parts of the sequence.
        loss = nn.functional.mse_loss(model(x), y) * (y.shape[1] / SEQUENCE)
        loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        if step % 6 == 0:
            checkpoint.save(step, args.output_dir)
    save_adapter(model, args.output_dir / "adapter")

    total = loss.detach() / (mesh["data"].size() if "data" in mesh.mesh_dim_names else 1)
    dist.all_reduce(total)
    if dist.get_rank() == 0:
        active = sum(allocator.active_counts().values())
        print(f"step {step}, loss {total.item():.5f}, active subspaces {active}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""DDP and FSDP2 take the decisions of one process, and a rank that dies leaves the last checkpoint whole."""

import copy
import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import launch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adamss_kernels import (
    AdaMSSConfig,
    SubspaceAllocator,
    export_lora,
    export_peft,
    inject_adamss,
    load_adapter,
    save_adapter,
)
from adamss_kernels.distributed import full_tensor, unwrap
from adamss_kernels.model import adamss_layers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]

RANKS, STEPS, BATCH = 2, 24, 8
# Few enough survivors that whole layers are emptied, which is where DDP would miss gradients.
CONFIG = {
    "r": 6,
    "num_subspaces": 4,
    "subspace_rank": 2,
    "use_asa": True,
    "asa_target_subspaces": 3,
    "init_warmup": 2,
    "final_warmup": 18,
    "mask_interval": 4,
}


def base_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 11), nn.Tanh(), nn.Linear(11, 7))


def adapted_model(mode):
    return inject_adamss(base_model(), AdaMSSConfig(**CONFIG, asa_mode=mode), progress=False)


class Run:
    """A training run of `model`, whose rank sees its part of every batch."""

    def __init__(self, model, mode):
        self.model = model
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
        self.allocator = SubspaceAllocator(model, AdaMSSConfig(**CONFIG, asa_mode=mode))
        self.allocator.attach(self.optimizer)
        self.masks = []

    def train(self, start=0, stop=STEPS):
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(BATCH, 13, generator=generator).chunk(ranks)[rank]
            y = torch.randn(BATCH, 7, generator=generator).chunk(ranks)[rank]
            nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.allocator.update_and_allocate(step)
            self.optimizer.zero_grad()
            layers = adamss_layers(unwrap(self.model)).values()
            self.masks.append(torch.cat([mask for layer in layers for mask in (layer.trainable, layer.active)]))
        return self

    def result(self):
        state = {key: full_tensor(t).clone() for key, t in unwrap(self.model).state_dict().items()}
        return {"masks": torch.stack(self.masks), "state": state}


def sharded(model):
    for layer in adamss_layers(model).values():
        fully_shard(layer)
    return fully_shard(model)


def export(model, folder):
    export_peft(model, folder / "peft", progress=False)
    export_lora(model, folder / "lora")


def ddp_scenario(rank, folder):
    for mode in ("freeze", "prune"):
        run = Run(DistributedDataParallel(adapted_model(mode)), mode).train()
        torch.save(run.result(), folder / f"{mode}-{rank}.pt")
        save_adapter(run.model, folder / f"{mode}-adapter-{rank}")
        export(run.model, folder / f"{mode}-exports")


def fsdp_scenario(rank, folder):
    for mode in ("freeze", "prune"):
        run = Run(sharded(adapted_model(mode)), mode)
        run.train(stop=STEPS // 2)
        model_state, optimizer_state = get_state_dict(run.model, run.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "asa": run.allocator}
        dcp.save(state, checkpoint_id=folder / f"{mode}-dcp")
        run.train(start=STEPS // 2)
        torch.save(run.result(), folder / f"{mode}-{rank}.pt")
        save_adapter(run.model, folder / f"{mode}-adapter-0")
        export(run.model, folder / f"{mode}-exports")

        resumed = Run(sharded(adapted_model(mode)), mode)
        model_state, optimizer_state = get_state_dict(resumed.model, resumed.optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "asa": resumed.allocator}
        dcp.load(state, checkpoint_id=folder / f"{mode}-dcp")
        set_state_dict(
            resumed.model,
            resumed.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        resumed.train(start=STEPS // 2)
        torch.save(resumed.result(), folder / f"{mode}-resumed-{rank}.pt")


@pytest.fixture(scope="module")
def single_process():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {mode: Run(adapted_model(mode), mode).train().result() for mode in ("freeze", "prune")}
    torch.set_num_threads(threads)
    return results


@pytest.mark.parametrize("scenario", [ddp_scenario, fsdp_scenario])
def test_every_rank_decides_and_trains_as_one_process_does(scenario, single_process, tmp_path):
    launch(scenario, tmp_path)
    for mode, expected in single_process.items():
        *_, last = expected["masks"]
        assert last.sum() < last.numel(), "the run is meant to prune"
        for rank in range(RANKS):
            result = torch.load(tmp_path / f"{mode}-{rank}.pt")
            assert torch.equal(result["masks"], expected["masks"])
            for key, tensor in expected["state"].items():
                # Two half batches are averaged, where one process sums over the whole: a few roundings per step.
                torch.testing.assert_close(result["state"][key], tensor, rtol=0, atol=1e-6)

        loaded = load_adapter(base_model(), tmp_path / f"{mode}-adapter-0")
        result = torch.load(tmp_path / f"{mode}-0.pt")
        for key, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, result["state"][key]), key

        export(loaded, tmp_path / "exports")
        for path in (tmp_path / "exports").rglob("*.*"):
            distributed = tmp_path / f"{mode}-exports" / path.relative_to(tmp_path / "exports")
            assert path.read_bytes() == distributed.read_bytes(), path

        if scenario is ddp_scenario:
            assert not (tmp_path / f"{mode}-adapter-1").exists(), "only the first rank writes"
            continue
        for rank in range(RANKS):
            resumed = torch.load(tmp_path / f"{mode}-resumed-{rank}.pt")
            assert torch.equal(resumed["masks"], result["masks"][STEPS // 2 :])
            assert all(torch.equal(resumed["state"][key], t) for key, t in result["state"].items())


def killed_in_save(rank, folder, victim):
    model = adapted_model("freeze")
    if rank == 0:
        # The bits of an initialisation depend on the number of threads, which is another one where they are compared.
        torch.save(model.state_dict(), folder / "before.pt")
    model = sharded(model)
    save_adapter(model, folder / "adapter")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    if rank == victim == 0:
        # The new file is complete but not yet in place.
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
    elif rank == victim:
        adamss_layers(model)["2"].base_parameters = lambda: os.kill(os.getpid(), signal.SIGKILL)
    save_adapter(model, folder / "adapter")


def kill_writer(rank, folder):
    killed_in_save(rank, folder, 0)


def kill_other_rank(rank, folder):
    killed_in_save(rank, folder, 1)


@pytest.mark.parametrize(("scenario", "victim"), [(kill_writer, 0), (kill_other_rank, 1)])
def test_a_rank_killed_during_save_adapter_leaves_the_previous_checkpoint_loadable(scenario, victim, tmp_path):
    codes = launch(scenario, tmp_path, expect_success=False)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] != 0, "the surviving rank reports that the save failed"
    loaded = load_adapter(base_model(), tmp_path / "adapter")
    expected = torch.load(tmp_path / "before.pt")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())


def test_allocator_state_moves_between_sharded_and_whole(tmp_path):
    run = Run(adapted_model("freeze"), "freeze").train(stop=STEPS // 2)
    torch.save(run.allocator.state_dict(), tmp_path / "whole.pt")
    launch(reshard_scenario, tmp_path)
    back = Run(adapted_model("freeze"), "freeze")
    back.allocator.load_state_dict(torch.load(tmp_path / "back.pt"))
    expected, actual = run.allocator.state_dict(), copy.deepcopy(back.allocator.state_dict())
    for key in ("importance", "uncertainty", "trainable", "active"):
        assert all(torch.equal(actual[key][name], t) for name, t in expected[key].items())
    assert actual["history"] == expected["history"]


def reshard_scenario(rank, folder):
    run = Run(sharded(adapted_model("freeze")), "freeze")
    run.allocator.load_state_dict(torch.load(folder / "whole.pt"))
    state = run.allocator.state_dict()
    for key in ("importance", "uncertainty"):
        state[key] = {name: full_tensor(t) for name, t in state[key].items()}
    if rank == 0:
        torch.save(state, folder / "back.pt")


def test_ranks_share_layers_out_and_start_from_the_same_bits(tmp_path, one_thread):
    launch(shared_init_scenario, tmp_path, ranks=3)
    for dtype in (torch.float32, torch.bfloat16):
        expected = inject_adamss(shared_model().to(dtype), SHARED, progress=False)
        for rank in range(3):
            state = torch.load(tmp_path / f"{dtype}-{rank}.pt")
            assert state.keys() == expected.state_dict().keys()
            for key, tensor in expected.state_dict().items():
                assert torch.equal(state[key], tensor), key
    counts = [torch.load(tmp_path / f"decomposed-{rank}.pt") for rank in range(3)]
    assert counts == [2, 1, 1]


SHARED = AdaMSSConfig(r=6, num_subspaces=4, subspace_rank=2, use_dynamic_rank=True, init_weights=None)


def shared_model():
    """Four layers, one of them under two names."""
    model = base_model()
    model.append(nn.Linear(7, 5, bias=False))
    model.add_module("again", model[0])
    return model


def shared_init_scenario(rank, folder):
    import adamss_kernels.shared_init as shared_init

    count, decompose = 0, shared_init.decompose

    def counting(*args, **options):
        nonlocal count
        count += 1
        return decompose(*args, **options)

    shared_init.decompose = counting
    group = dist.group.WORLD
    model = inject_adamss(shared_model(), SHARED, progress=False, group=group)
    assert model.again is model[0]
    torch.save(count, folder / f"decomposed-{rank}.pt")
    torch.save(model.state_dict(), folder / f"{torch.float32}-{rank}.pt")
    model = inject_adamss(shared_model().to(torch.bfloat16), SHARED, progress=False, group=group)
    torch.save(model.state_dict(), folder / f"{torch.bfloat16}-{rank}.pt")

    with torch.device("meta"):
        inject_adamss(base_model(), AdaMSSConfig(r=6), progress=False, group=group)
    model = shared_model()
    if rank == 1:
        # The layer that is decomposed by the second rank.
        model[2].weight.data.fill_(float("nan"))
    message = "2: expected finite values, found NaN"
    error = (ValueError, message) if rank == 1 else (RuntimeError, f"rank 1 of the group has failed: {message}")
    with pytest.raises(error[0], match=error[1]):
        inject_adamss(model, SHARED, progress=False, group=group)
    assert not adamss_layers(model)
    with pytest.raises(ValueError, match="group: expected the same layers on all ranks, but rank"):
        inject_adamss(nn.Sequential(nn.Linear(3 + (rank == 2), 4)), SHARED, progress=False, group=group)

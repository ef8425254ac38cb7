"""Adapters and sharded checkpoints go in and out of models that FSDP2 has spread over ranks."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import launch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, inject_adamss, load_adapter, save_adapter
from adamss_kernels.adapters import inject_adapter
from adamss_kernels.distributed import full_tensor
from adamss_kernels.model import adamss_layers
from adamss_kernels.sharded import initialise_adamss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]

OPTIONS = {"r": 6, "num_subspaces": 4, "subspace_rank": 2, "modules_to_save": ["head"], "use_asa": True}
CONFIG = AdaMSSConfig(
    **OPTIONS, asa_target_subspaces=4, init_warmup=1, final_warmup=9, mask_interval=3, target_modules=["0", "2"]
)
CROWDED = AdaMSSConfig(r=6, num_subspaces=10, subspace_rank=2, target_modules=["0", "2"], modules_to_save=["head"])


def base_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 17), nn.Tanh(), nn.Linear(17, 11), nn.Tanh())
    model.add_module("head", nn.Linear(11, 3))
    return model


def adapted(seed=1):
    """A model that looks trained: other seeds, other values, masks and rows."""
    model = inject_adamss(base_model(), CONFIG, progress=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        for layer in adamss_layers(model).values():
            layer.row_subspace.copy_(layer.row_subspace[torch.randperm(len(layer.row_subspace), generator=generator)])
            layer.set_masks(trainable=torch.rand(4, generator=generator) < 0.5)
    return model


def sharded(model):
    for layer in (*adamss_layers(model).values(), model.head):
        fully_shard(layer)
    return fully_shard(model)


def send_base(model, rank):
    """Give the ranks of a sharded model the base weights that the first one has."""
    base = base_model().state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, base, options=options)


def whole_state(model):
    return {key: full_tensor(t).clone() for key, t in model.state_dict().items()}


def require_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


@contextlib.contextmanager
def reports(error, message):
    """Every rank has to raise, in time, and all of them the same model afterwards."""
    with pytest.raises(error, match=message):
        yield


def adapter_scenario(rank, folder):
    warnings.simplefilter("error")
    expected = torch.load(folder / "expected.pt")

    # After fully_shard, over other values, rows and masks.
    for kind in ("full", "compact"):
        model = sharded(adapted(seed=2))
        model(torch.ones(2, 13))  # FSDP2 leaves the parameters of the root whole
        local = adamss_layers(model)["0"].C.to_local()
        load_adapter(model, folder / kind)
        assert adamss_layers(model)["0"].C.to_local().data_ptr() == local.data_ptr()
        assert len(local) in (8, 9)
        torch.save(whole_state(model), folder / f"{kind}-{rank}.pt")

    # From meta: shapes, shards, base weights, then the adapter.
    for kind in ("full", "compact"):
        with torch.device("meta"):
            model = base_model()
        with pytest.warns(UserWarning, match="on the meta device: only shapes are set up"):
            load_adapter(model, folder / kind)
        model = sharded(model)
        with reports(ValueError, "0: the base weight is on the meta device; load the base model's weights first"):
            load_adapter(model, folder / kind)
        model.to_empty(device="cpu")
        send_base(model, rank)
        load_adapter(model, folder / kind)
        torch.save(whole_state(model), folder / f"meta-{kind}-{rank}.pt")
        assert [name for name, p in model.named_parameters() if p.requires_grad] == expected["trains"]

    # The same without an adapter: the first values, decomposed after the base weights have come.
    with torch.device("meta"):
        model = inject_adamss(base_model(), CONFIG, progress=False)
    model = sharded(model)
    with reports(ValueError, "0: the base weight is on the meta device; load the base model's weights first"):
        initialise_adamss(model, progress=False)
    model.to_empty(device="cpu")
    send_base(model, rank)
    initialise_adamss(model, progress=False)
    torch.save(whole_state(model), folder / f"first-{rank}.pt")
    with torch.device("meta"):
        model = inject_adamss(base_model(), CROWDED, progress=False)
    model = sharded(model).to_empty(device="cpu")
    send_base(model, rank)
    with reports(
        ValueError, r"0: expected the ranks of the decomposition, \(.*1.*\), got \(2, 2, 2, 2, 2, 2, 2, 2, 2, 2\)"
    ):
        initialise_adamss(model, progress=False)

    # A related method.
    model = inject_adapter(base_model(), "lora", ["0", "2"], modules_to_save=["head"], progress=False, rank=3)
    for module in (model[0], model[2], model.head):
        fully_shard(module)
    model = load_adapter(fully_shard(model), folder / "lora")
    torch.save(whole_state(model), folder / f"lora-{rank}.pt")
    with reports(ValueError, "0: expected a LoRALinear as in the file, got a FSDPFusedAdaMSSLinear"):
        load_adapter(sharded(adapted()), folder / "lora")

    # Before fully_shard, and back to disk: the rows of every rank.
    model = sharded(load_adapter(base_model(), folder / "full"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                local = parameter.to_local()
                local.copy_(torch.arange(local.numel()).view_as(local) + 1000 * (rank + 1))
    torch.save([adamss_layers(model)["0"].C.to_local(), model.head.weight.to_local()], folder / f"rows-{rank}.pt")
    save_adapter(model, folder / "gathered")

    # What is wrong on one rank fails on all of them, and changes nothing.
    before = whole_state(model)
    with reports(OSError if rank == 0 else RuntimeError, "is a file" if rank == 0 else "rank 0 .* has failed: .*Error"):
        save_adapter(model, folder / "is a file")
    source = folder / ("full" if rank == 0 else "nowhere")
    with reports(*((RuntimeError, "rank 1 .*FileNotFound") if rank == 0 else (FileNotFoundError, "nowhere"))):
        load_adapter(model, source)
    with reports(ValueError, "rank 1 has read another file than rank 0"):
        load_adapter(model, folder / ("full" if rank == 0 else "compact"))
    with reports(ValueError, r"0: expected the ranks of the file, \(1, 1, 1\), got \(2, 2, 2, 2\)"):
        load_adapter(model, folder / "other-ranks")
    with reports(ValueError, "0: the base weight differs from the one trained on by"):
        load_adapter(model, folder / "other-base")
    require_equal(whole_state(model), before)
    with reports(ValueError, "0: expected an adapted layer in a model that is sharded, got FSDPLinear; adapt"):
        plain = base_model()
        fully_shard(plain[0])
        load_adapter(fully_shard(plain), folder / "full")


def test_adapters_load_onto_sharded_models_and_are_gathered_from_them(tmp_path, one_thread):
    model = adapted()
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    torch.save({"trains": trains}, tmp_path / "expected.pt")
    save_adapter(model, tmp_path / "full")
    save_adapter(model, tmp_path / "compact", compact=True)
    other = AdaMSSConfig(r=6, num_subspaces=3, target_modules=["0", "2"], modules_to_save=["head"])
    save_adapter(inject_adamss(base_model(), other, progress=False), tmp_path / "other-ranks")
    with torch.no_grad():
        model[0].weight.add_(1)
    save_adapter(model, tmp_path / "other-base")
    (tmp_path / "is a file").touch()
    lora = inject_adapter(base_model(), "lora", ["0", "2"], modules_to_save=["head"], progress=False, rank=3)
    with torch.no_grad():
        lora[0].B.fill_(1)
    save_adapter(lora, tmp_path / "lora")
    launch(adapter_scenario, tmp_path)

    first = inject_adamss(base_model(), CONFIG, progress=False).state_dict()
    for rank in range(2):
        require_equal(torch.load(tmp_path / f"first-{rank}.pt"), first)
        require_equal(torch.load(tmp_path / f"lora-{rank}.pt"), lora.state_dict())
    full = load_adapter(base_model(), tmp_path / "full").state_dict()
    compact = load_adapter(base_model(), tmp_path / "compact").state_dict()
    for rank in range(2):
        for where in ("", "meta-"):
            require_equal(torch.load(tmp_path / f"{where}full-{rank}.pt"), full)
            found = torch.load(tmp_path / f"{where}compact-{rank}.pt")
            for name in ("0", "2"):
                # The basis is rebuilt, whose bits depend on the number of threads.
                actual, expected = (state[f"{name}.B"] @ state[f"{name}.basis"] for state in (found, compact))
                assert (actual - expected).norm() < 1e-5 * expected.norm()
                assert torch.equal(found[f"{name}.C"], compact[f"{name}.C"])

    gathered = load_adapter(base_model(), tmp_path / "gathered")
    rows = zip(*(torch.load(tmp_path / f"rows-{rank}.pt") for rank in range(2)), strict=True)
    C, head = (torch.cat(parts) for parts in rows)
    assert torch.equal(gathered[0].C, C)
    assert torch.equal(gathered.head.weight, head)


class Run:
    def __init__(self, model):
        self.model = model
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        self.allocator = SubspaceAllocator(model, CONFIG)
        self.allocator.attach(self.optimizer)

    def train(self, start, stop):
        for step in range(start, stop):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(6, 13, generator=generator), torch.randn(6, 3, generator=generator)
            nn.functional.mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.allocator.update_and_allocate(step)
            self.optimizer.zero_grad()
        return self

    def state(self):
        # What does not train is in nobody's checkpoint twice.
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer, "asa": self.allocator}

    def save(self, folder):
        dcp.save(self.state(), checkpoint_id=folder)
        return self

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),
        )
        return self

    def result(self):
        state = {key: full_tensor(t) for key, t in get_model_state_dict(self.model).items()}
        return {"state": state, "history": self.allocator.history}


def fresh():
    return inject_adamss(base_model(), CONFIG, progress=False)


def checkpoint_scenario(rank, folder):
    Run(sharded(fresh())).train(0, 5).save(folder / "two")
    resumed = Run(sharded(fresh())).load(folder / "one").train(5, 12)
    torch.save(resumed.result(), folder / f"one-to-two-{rank}.pt")
    if rank == 0:
        (folder / "two" / "__1_0.distcp").rename(folder / "lost")
    dist.barrier()
    with reports(BaseException, "__1_0.distcp"):  # torch derives it from that
        Run(sharded(fresh())).load(folder / "two")
    dist.barrier()
    if rank == 0:
        (folder / "lost").rename(folder / "two" / "__1_0.distcp")


def test_torchs_sharded_checkpoints_move_between_one_process_and_two(tmp_path, one_thread):
    Run(fresh()).train(0, 5).save(tmp_path / "one")
    unbroken = Run(fresh()).train(0, 12).result()
    assert len(unbroken["history"]) == 3

    launch(checkpoint_scenario, tmp_path)

    results = [Run(fresh()).load(tmp_path / "two").train(5, 12).result()]
    results += [torch.load(tmp_path / f"one-to-two-{rank}.pt") for rank in range(2)]
    for result in results:
        assert result["history"] == unbroken["history"]
        for key, tensor in unbroken["state"].items():
            torch.testing.assert_close(result["state"][key], tensor, rtol=0, atol=1e-6)

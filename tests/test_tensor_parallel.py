"""Adapted layers under torch's `parallelize_module`, alone and with FSDP2, train as one process does."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import launch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamss_kernels import (
    AdaMSSConfig,
    FusedAdaMSSLinear,
    SubspaceAllocator,
    export_lora,
    export_peft,
    inject_adamss,
    load_adapter,
    save_adapter,
)
from adamss_kernels.distributed import full_tensor
from adamss_kernels.model import adamss_layers
from adamss_kernels.tensor_parallel import ColwiseAdaMSS, RowwiseAdaMSS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]

WIDTH, SEQUENCE, STEPS = 13, 8, 12
# Ranks that divide nothing: 13, 18 and 11 rows and columns over 2 or 4 ranks.
CONFIG = AdaMSSConfig(
    r=6,
    num_subspaces=4,
    subspace_rank=2,
    use_asa=True,
    asa_target_subspaces=4,
    init_warmup=2,
    final_warmup=9,
    mask_interval=3,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 18), nn.Linear(18, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = Block(), Block(), nn.Linear(WIDTH, 11, bias=False)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def base_model():
    torch.manual_seed(0)
    return Model()


def adapted():
    return inject_adamss(base_model(), CONFIG, progress=False)


def parallel(model, mesh, *, sequence=False):
    """Spread a model; with `sequence`, what is between its layers is spread over the sequence."""
    between = Shard(1) if sequence else Replicate()
    plan = {"last": ColwiseAdaMSS(input_layouts=between, output_layouts=between)}
    for block in ("first", "second"):
        plan |= {f"{block}.up": ColwiseAdaMSS(input_layouts=between)}
        plan |= {f"{block}.down": RowwiseAdaMSS(output_layouts=between)}
    return parallelize_module(model, mesh, plan)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, SEQUENCE, WIDTH, generator=generator)
    return x, torch.randn(4, SEQUENCE, 11, generator=generator)


class Run:
    """A training run whose rank sees its part of every batch (`data`) and of every sequence (`sequence`)."""

    def __init__(self, model, data=None, sequence=None):
        self.model, self.data, self.sequence = model, data, sequence
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        self.allocator = SubspaceAllocator(model, CONFIG)
        self.allocator.attach(self.optimizer)
        self.losses, self.masks = [], []

    def train(self):
        for step in range(STEPS):
            tensors = batch(step)
            for mesh, dim in ((self.data, 0), (self.sequence, 1)):
                if mesh is not None:
                    tensors = [t.chunk(mesh.size(), dim)[mesh.get_local_rank()] for t in tensors]
            x, y = tensors
            loss = nn.functional.mse_loss(self.model(x), y)
            if self.sequence is not None:
                loss = loss / self.sequence.size()
            loss.backward()
            total = loss.detach().clone()
            if self.data is not None:
                dist.all_reduce(total, group=self.data.get_group())
                total /= self.data.size()
            if self.sequence is not None:
                dist.all_reduce(total, group=self.sequence.get_group())
            self.optimizer.step()
            self.allocator.update_and_allocate(step)
            self.optimizer.zero_grad()
            self.losses.append(total)
            layers = adamss_layers(self.model).values()
            self.masks.append(torch.cat([layer.trainable for layer in layers]))
        return self

    def result(self):
        return {"losses": torch.stack(self.losses), "masks": torch.stack(self.masks), "state": whole_state(self.model)}


class SummedBytes(TorchDispatchMode):
    """Notes the size of every sum over ranks."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if any(isinstance(arg, DTensor) for arg in args):
            return NotImplemented  # what it is made of comes by again
        if operator.namespace in ("c10d", "_c10d_functional") and "all_reduce" in str(operator).replace(
            "allr", "all_r"
        ):
            self.sizes.append(sum(t.nbytes for t in tree_leaves(args) if isinstance(t, torch.Tensor)))
        return operator(*args, **kwargs or {})


def whole_state(model):
    return {key: full_tensor(t).clone() for key, t in model.state_dict().items()}


def scenario(rank, folder):
    line, grid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    data, tensor = grid["data"], grid["tensor"]

    def both(model, **options):
        model = parallel(model, tensor, **options)
        for block in (model.first, model.second):
            fully_shard(block, mesh=data)
        return fully_shard(model, mesh=data)

    run = Run(parallel(adapted(), line)).train()
    torch.save(run.result(), folder / f"line-{rank}.pt")
    save_adapter(run.model, folder / "line")
    torch.save(Run(parallel(adapted(), line, sequence=True), None, line).train().result(), folder / f"sp-{rank}.pt")
    grid_run = Run(both(adapted()), data).train()
    torch.save(grid_run.result(), folder / f"grid-{rank}.pt")
    save_adapter(grid_run.model, folder / "grid")
    torch.save(Run(both(adapted(), sequence=True), data, tensor).train().result(), folder / f"grid-sp-{rank}.pt")

    # Adapters and checkpoints see the whole layer, from any mesh onto any other.
    loaded = load_adapter(both(adapted()), folder / "line")
    torch.save(whole_state(loaded), folder / f"line-on-grid-{rank}.pt")
    torch.save(
        whole_state(load_adapter(parallel(adapted(), line), folder / "grid")), folder / f"grid-on-line-{rank}.pt"
    )
    dcp.save(get_model_state_dict(grid_run.model), checkpoint_id=folder / "dcp")
    model = parallel(adapted(), line)
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state)
    torch.save(whole_state(model), folder / f"dcp-{rank}.pt")

    # Other people's formats, and a base that begins on the meta device.
    export_lora(run.model, folder / "lora")
    export_peft(run.model, folder / "peft", progress=False)
    with torch.device("meta"):
        model = base_model()
    with pytest.warns(UserWarning, match="only shapes are set up"):
        load_adapter(model, folder / "line")
    model = both(model).to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(model, base_model().state_dict() if rank == 0 else {}, options=options)
    load_adapter(model, folder / "line")
    torch.save(whole_state(model), folder / f"meta-{rank}.pt")

    # One sum a block forward, as without an update; backward that of dx, and one each for the trained tensors.
    x, _ = batch(0)
    model = run.model
    x.requires_grad_()
    with SummedBytes() as forward:
        y = model.first(x)
    with SummedBytes() as backward:
        y.sum().backward()
    up, down = (4 * layer.B.numel() for layer in (model.first.up, model.first.down))
    assert forward.sizes == [4 * x.numel()]
    assert sorted(backward.sizes) == sorted([up, down + 4 * model.first.down.C.numel(), 4 * x.numel()])
    model.zero_grad()

    # Merging and copies.
    x.requires_grad_(False)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(copy.deepcopy(model.first.up)(x), model.first.up(x), rtol=0, atol=0)
        deltas = {name: full_tensor(layer.delta_weight()) for name, layer in adamss_layers(model).items()}
        torch.save(deltas, folder / f"deltas-{rank}.pt")
        for layer in adamss_layers(model).values():
            layer.merge()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)
        for layer in adamss_layers(model).values():
            layer.unmerge()
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        for layer in adamss_layers(model).values():
            layer.set_masks(active=torch.zeros(4, dtype=torch.bool))
        torch.testing.assert_close(model(x), base_model()(x), rtol=0, atol=1e-5)

    # What cannot be spread is an error, before anything is changed.
    layer = adapted().first.up
    for wrong, mesh, style, error, message in (
        (base_model().first.up, line, ColwiseAdaMSS(), TypeError, "ColwiseAdaMSS: expected a FusedAdaMSSLinear, got a"),
        (layer, grid, RowwiseAdaMSS(), ValueError, "expected a mesh of one dimension, got 2 of them"),
    ):
        with pytest.raises(error, match=message):
            style._apply(wrong, mesh)
    other = nn.Linear(WIDTH, 18 + (rank == 3))
    with pytest.raises(ValueError, match=r"of equal shapes on all ranks of the mesh, .* and \(19, 13, 6, .*\) on 3"):
        ColwiseAdaMSS()._apply(FusedAdaMSSLinear.from_linear(other, CONFIG), line)
    layer.merge()
    with pytest.raises(ValueError, match="expected an unmerged layer"):
        ColwiseAdaMSS()._apply(layer, line)
    with pytest.raises(NotImplementedError, match="delta_weight: expected parameters that only tensor parallelism"):
        grid_run.model.first.up.delta_weight()


def test_tensor_parallel_runs_decide_and_train_as_one_process_does(tmp_path, one_thread):
    one = Run(adapted()).train()
    expected = one.result()
    assert expected["masks"][-1].sum() == 4
    launch(scenario, tmp_path, ranks=4)
    for rank in range(4):
        for name in ("line", "sp", "grid", "grid-sp"):
            result = torch.load(tmp_path / f"{name}-{rank}.pt")
            assert torch.equal(result["masks"], expected["masks"]), name
            torch.testing.assert_close(result["losses"], expected["losses"], rtol=0, atol=1e-5)
            for key, tensor in expected["state"].items():
                torch.testing.assert_close(result["state"][key], tensor, rtol=0, atol=1e-5)
        for name, source in (("line-on-grid", "line"), ("meta", "line"), ("grid-on-line", "grid"), ("dcp", "grid")):
            state, saved = torch.load(tmp_path / f"{name}-{rank}.pt"), torch.load(tmp_path / f"{source}-0.pt")["state"]
            assert all(torch.equal(state[key], tensor) for key, tensor in saved.items()), name
    for name in ("line", "grid"):
        state = torch.load(tmp_path / f"{name}-0.pt")["state"]
        loaded = load_adapter(base_model(), tmp_path / name)
        assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    loaded = load_adapter(base_model(), tmp_path / "line")
    export_lora(loaded, tmp_path / "lora-of-one")
    export_peft(loaded, tmp_path / "peft-of-one", progress=False)
    for kind in ("lora", "peft"):
        for path in (tmp_path / f"{kind}-of-one").iterdir():
            assert path.read_bytes() == (tmp_path / kind / path.name).read_bytes(), path
    deltas = torch.load(tmp_path / "deltas-0.pt")
    for name, layer in adamss_layers(load_adapter(base_model(), tmp_path / "line")).items():
        torch.testing.assert_close(deltas[name], layer.delta_weight(), rtol=0, atol=1e-6)


def test_styles_are_what_parallel_plans_can_hold():
    style = RowwiseAdaMSS(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False)
    again = pickle.loads(pickle.dumps(style))
    assert vars(again) == vars(style)
    assert vars(ColwiseAdaMSS())["output_layout"] == Shard(-1)

"""Under FSDP2 a `transformers.Trainer` prunes, saves and resumes as one process does."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from accelerate_on_cpu import allow_fsdp, forget_accelerator
from ranks import launch
from safetensors.torch import load_file
from test_trainer import OPTIONS, WIDTH, KillAt, Killed, history, trainer
from torch import nn

from adamss_kernels import (
    AdaMSSConfig,
    ASACallback,
    apply_adamss_kernels,
    inject_adamss,
    load_adapter,
    save_adapter,
)
from adamss_kernels.distributed import full_tensor

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
]

FORMATS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")


class Block(nn.Module):
    """What accelerate shards as one."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = Block(), Block(), nn.Linear(WIDTH, 3)

    def forward(self, x, labels=None):
        logits = self.head(self.second(self.first(x)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def base_model():
    torch.manual_seed(0)
    return Model()


def build(kind):
    options = OPTIONS | {"target_modules": ["up", "down"], "subspace_rank": 2}
    if kind == "ours":
        return inject_adamss(base_model(), AdaMSSConfig(**options), progress=False)
    return apply_adamss_kernels(peft.get_peft_model(base_model(), peft.AdamssConfig(**options)))


def fsdp_trainer(model, folder, state_dict_type, *callbacks, **options):
    forget_accelerator()
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["Block"]}
    config["state_dict_type"] = state_dict_type
    return trainer(model, folder, *callbacks, per_device_train_batch_size=4, fsdp=True, fsdp_config=config, **options)


def result(run):
    state = {key: full_tensor(t).clone() for key, t in run.model.state_dict().items()}
    trains = [p.requires_grad for p in run.model.parameters()]
    losses = [(step, active, loss) for step, loss, active in history(run)]
    return {"history": losses, "state": state, "trains": trains}


def scenario(rank, folder):
    allow_fsdp()
    for kind in ("ours", "fused"):
        for state_dict_type in FORMATS:
            where = folder / f"{kind}-{state_dict_type}"
            run = fsdp_trainer(build(kind), where, state_dict_type, ASACallback(), KillAt(11))
            with contextlib.suppress(Killed):
                # Killed between two events, after the checkpoint of step 8 was saved between two others.
                run.train()
            run = fsdp_trainer(build(kind), where, state_dict_type, ASACallback())
            run.train(resume_from_checkpoint=True)
            torch.save(result(run), folder / f"{kind}-{state_dict_type}-{rank}.pt")
        if kind == "ours":
            save_adapter(run.model, folder / "adapter")


def test_a_killed_and_resumed_run_under_fsdp2_is_that_of_one_process(tmp_path, one_thread):
    expected = {}
    for kind in ("ours", "fused"):
        run = trainer(build(kind), tmp_path / kind, ASACallback())
        run.train()
        expected[kind] = result(run)
    launch(scenario, tmp_path)
    for kind, one in expected.items():
        for state_dict_type in FORMATS:
            for rank in range(2):
                two = torch.load(tmp_path / f"{kind}-{state_dict_type}-{rank}.pt")
                assert two["trains"] == one["trains"]
                for (*counts, loss), (*counts_of_one, loss_of_one) in zip(two["history"], one["history"], strict=True):
                    assert counts == counts_of_one
                    assert abs(loss - loss_of_one) < 1e-6
                for key, tensor in one["state"].items():
                    torch.testing.assert_close(two["state"][key], tensor, rtol=0, atol=1e-5)
                    if tensor.dtype == torch.bool:
                        assert torch.equal(two["state"][key], tensor)
                if (kind, state_dict_type) == ("fused", "FULL_STATE_DICT"):
                    # What PEFT loads has the rows of both ranks, and frozen subspaces too.
                    saved = load_file(
                        tmp_path / "fused-FULL_STATE_DICT" / "checkpoint-14" / "adapter_model.safetensors"
                    )
                    loaded = peft.get_peft_model_state_dict(build("fused"), state_dict=two["state"])
                    assert saved.keys() == loaded.keys()
                    assert all(torch.equal(saved[key], tensor) for key, tensor in loaded.items())

    loaded = load_adapter(base_model(), tmp_path / "adapter").state_dict()
    for key, tensor in torch.load(tmp_path / "ours-SHARDED_STATE_DICT-0.pt")["state"].items():
        assert torch.equal(loaded[key], tensor)

"""`ASACallback` prunes in a `transformers.Trainer`, and a resumed run is the unbroken one."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, ASACallback, apply_adamss_kernels, inject_adamss
from adamss_kernels.model import adamss_layers

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

WIDTH = 16
OPTIONS = {
    "r": 6,
    "num_subspaces": 4,
    "target_modules": ["first", "second", "third"],
    "modules_to_save": ["head"],
    "use_asa": True,
    "asa_target_subspaces": 5,
    "init_warmup": 2,
    "final_warmup": 10,
    "mask_interval": 3,
}
KINDS = ("ours", "fused", "stock")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x, labels=None):
        for layer in (self.first, self.second, self.third):
            x = x + self.dropout(torch.tanh(layer(x)))
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def build(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    if kind == "ours":
        return inject_adamss(Model(), AdaMSSConfig(**OPTIONS | options), progress=False)
    model = peft.get_peft_model(Model(), peft.AdamssConfig(**OPTIONS | options))
    return apply_adamss_kernels(model) if kind == "fused" else model


def dataset() -> list[dict[str, torch.Tensor]]:
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row[:3].argmax()} for row in x]


def trainer(model: nn.Module, folder: Path, *callbacks: object, **options: object):
    arguments = {
        "max_steps": 14,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 4,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    args = transformers.TrainingArguments(str(folder), **arguments | options)
    return transformers.Trainer(model, args, train_dataset=dataset(), callbacks=list(callbacks))


class Killed(Exception):
    pass


class KillAt(transformers.TrainerCallback):
    """Ends the run before the optimizer step with this number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            raise Killed


def history(trainer: object) -> list[tuple[object, ...]]:
    return [(e["step"], e["loss"], e["asa/active"]) for e in trainer.state.log_history if "loss" in e]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_is_the_unbroken_one_bit_for_bit(kind, tmp_path):
    whole = build(kind)
    unbroken = trainer(whole, tmp_path / "whole", ASACallback())
    unbroken.train()
    with pytest.raises(Killed):
        # Killed between two events, after the checkpoint of step 8 was saved between two others.
        trainer(build(kind), tmp_path / "broken", ASACallback(), KillAt(11)).train()
    model = build(kind)
    resumed = trainer(model, tmp_path / "broken", ASACallback())
    resumed.train(resume_from_checkpoint=True)

    assert history(resumed) == history(unbroken)
    state = whole.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in whole.parameters()]


def test_fused_and_stock_peft_models_are_pruned_alike_and_ours_exactly(tmp_path):
    runs = {}
    for kind in KINDS:
        runs[kind] = trainer(build(kind), tmp_path / kind, ASACallback())
        runs[kind].train()
    active = {kind: [entry[2] for entry in history(run)] for kind, run in runs.items()}
    assert active["fused"] == active["stock"]
    # Total 12, target 5: events after steps 3, 6, 9, and for ours also 10; PEFT keeps one fewer.
    assert active["ours"] == [12, 12, 9, 9, 9, 5, 5, 5, 5, 5, 5, 5, 5, 5]
    assert active["stock"] == [12, 12, 8, 8, 8, 4, 4, 4, 4, 4, 4, 4, 4, 4]
    for fused, stock in zip(history(runs["fused"]), history(runs["stock"]), strict=True):
        assert abs(fused[1] - stock[1]) <= 1e-4 * stock[1]
    assert all(entry["asa/total"] == 12 for entry in runs["ours"].state.log_history)


def test_the_first_optimizer_step_is_step_one(tmp_path, monkeypatch):
    model = build("fused")
    steps: list[int] = []
    update = type(model.base_model).update_and_allocate
    monkeypatch.setattr(
        type(model.base_model), "update_and_allocate", lambda self, step: steps.append(step) or update(self, step)
    )
    trainer(model, tmp_path, ASACallback(), max_steps=4, gradient_accumulation_steps=2).train()
    assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_replace_the_configs_under_either_name(kind, tmp_path):
    model = build(kind)
    callback = ASACallback(
        target_kk=3, init_warmup=1, final_warmup=6, mask_interval=2, beta1=0.5, beta2=0.6, verbose=True
    )
    run = trainer(model, tmp_path, callback, max_steps=7)
    run.train()
    assert history(run)[-1][2] == {"ours": 3, "fused": 2, "stock": 2}[kind]
    config = model.peft_config["default"] if kind != "ours" else callback._target._config
    assert (config.asa_target_subspaces, config.asa_importance_beta, config.asa_uncertainty_beta) == (3, 0.5, 0.6)


def test_verbose_reports_every_event_where_it_is_seen(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "adamss_kernels"):
        trainer(build("ours"), tmp_path, ASACallback(verbose=True)).train()
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("ASA step")]
    assert [line.split(",")[0] for line in lines] == [
        "ASA step 3: active subspaces 12 -> 9",
        "ASA step 6: active subspaces 9 -> 5",
        "ASA step 9: active subspaces 5 -> 5",
        "ASA step 10: active subspaces 5 -> 5",
    ]


def test_layer_scope_counts_per_layer_as_the_original_scripts_did(tmp_path):
    model = build("ours")
    trainer(model, tmp_path, ASACallback(target_kk=2, asa_scope="layer")).train()
    assert [int(layer.trainable.sum()) for layer in adamss_layers(model).values()] == [2, 2, 2]


@pytest.mark.parametrize(
    ("kind", "options", "overrides", "message"),
    [
        ("ours", {"use_asa": False}, {}, r"expected AdaMSSConfig.use_asa = True .* got False"),
        ("fused", {"use_asa": False}, {}, r"expected AdamssConfig.use_asa = True .* got False"),
        ("ours", {}, {"mask_interval": 0}, r"mask_interval = 0: expected an integer >= 1"),
        ("stock", {}, {"mask_interval": 0}, r"mask_interval = 0: expected an integer >= 1"),
        ("fused", {}, {"asa_scope": "layer"}, r"asa_scope: expected only with inject_adamss"),
    ],
)
def test_what_cannot_be_pruned_is_an_error_before_training(kind, options, overrides, message, tmp_path):
    model = build(kind, **options)
    with pytest.raises(ValueError, match=message):
        trainer(model, tmp_path, ASACallback(**overrides)).train()


def test_unknown_and_doubled_arguments_are_errors():
    with pytest.raises(TypeError, match=r"unexpected argument 'target', expected one of .*'target_kk'"):
        ASACallback(target=3)
    with pytest.raises(TypeError, match="asa_target_subspaces is given twice"):
        ASACallback(target_kk=3, asa_target_subspaces=4)


def test_a_model_without_adamss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="ASACallback: the model has no AdaMSS layer"):
        trainer(Model(), tmp_path, ASACallback()).train()


def test_training_that_ends_before_the_last_event_warns(tmp_path):
    with pytest.warns(UserWarning, match=r"training ends at step 4, before the last event at final_warmup=10"):
        trainer(build("fused"), tmp_path, ASACallback(), max_steps=4).train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ASACallback")
        trainer(build("fused"), tmp_path, ASACallback(), max_steps=10).train()


def test_a_checkpoint_without_state_is_an_error(tmp_path):
    trainer(build("fused"), tmp_path, max_steps=4).train()
    with pytest.raises(ValueError, match="the checkpoint of step 4 has no state of an ASACallback"):
        trainer(build("fused"), tmp_path, ASACallback()).train(resume_from_checkpoint=True)


def test_the_state_is_in_the_file_that_makes_a_checkpoint_resumable(tmp_path):
    trainer(build("ours"), tmp_path, ASACallback(), max_steps=4).train()
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["ASACallback"]["attributes"]["allocation"]["tensors"]

"""What a new user gets wrong is answered by what to do instead."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

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
from adamss_kernels.adapters import inject_adapter
from adamss_kernels.cli import main
from adamss_kernels.formats import import_peft, read_contents


def base_model():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.up, model.down, model.head = nn.Linear(12, 16), nn.Linear(16, 12), nn.Linear(12, 3)
    return model


def adapted(**fields):
    config = AdaMSSConfig(**{"r": 6, "num_subspaces": 3, "target_modules": ["up"], **fields})
    return inject_adamss(base_model(), config, progress=False)


@pytest.fixture
def folder(tmp_path):
    save_adapter(adapted(), tmp_path / "ours")
    export_peft(adapted(), tmp_path / "as-peft", progress=False)
    export_lora(adapted(init_weights=None), tmp_path / "as-lora")
    (tmp_path / "trainer" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_one_misspelt_name_among_several_is_named():
    with pytest.warns(
        UserWarning, match=r"target_modules: \['dwon'\] match no .* \(1 are\); .*\['down', 'head', 'up'\]"
    ):
        adapted(target_modules=["up", "dwon"])


def test_a_plain_string_is_answered_by_the_list():
    with pytest.raises(ValueError, match=r"for all that end so: target_modules=\['up'\]$"):
        inject_adamss(nn.ModuleDict({"block": base_model()}), AdaMSSConfig(target_modules="up"), progress=False)


def test_all_linear_is_answered_by_none():
    with pytest.raises(ValueError, match="target_modules=None takes them all$"):
        adapted(target_modules="all-linear")


def test_a_head_that_is_saved_is_no_candidate():
    with pytest.raises(ValueError, match=r"outside modules_to_save=\('head',\); .* end in \['down', 'up'\]"):
        adapted(target_modules=["head"], modules_to_save=["head"])


def test_a_layer_that_is_adapted_already_is_called_so():
    with pytest.raises(TypeError, match="'up' is a .*FusedAdaMSSLinear, which is adapted already"):
        inject_adamss(adapted(), AdaMSSConfig(target_modules=["up"]), progress=False)


def test_a_model_where_a_layer_belongs_is_sent_on():
    with pytest.raises(TypeError, match="a whole model goes to inject_adamss"):
        FusedAdaMSSLinear.from_linear(base_model(), AdaMSSConfig())


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("nowhere", "there is no directory .*nowhere$"),
        ("ours/adapter.safetensors", "is a file, give the directory that holds it$"),
        ("as-peft", "an adapter of PEFT: formats.import_peft loads its AdaMSS$"),
        ("as-lora", "an adapter of PEFT"),
        ("trainer", "a Trainer's checkpoints"),
        ("empty", "expected a checkpoint written by save_adapter$"),
    ],
)
def test_another_directory_is_recognised(folder, name, advice):
    with pytest.raises(FileNotFoundError, match=advice):
        load_adapter(base_model(), folder / name)


def test_our_checkpoint_where_one_of_peft_belongs_is_recognised(folder):
    with pytest.raises(FileNotFoundError, match="load_adapter loads what is there"):
        import_peft(base_model(), folder / "ours")


def test_swapped_arguments_are_named(folder):
    for call in (save_adapter, load_adapter):
        with pytest.raises(TypeError, match="^model: expected a torch.nn.Module, got a str$"):
            call("ours", base_model())


def test_a_file_where_a_directory_belongs_is_named(folder, capsys):
    file = folder / "ours" / "adapter.safetensors"
    with pytest.raises(FileNotFoundError, match="a file, expected the directory that holds it"):
        read_contents(file)
    for path, complaint in ((file, "a file, expected a directory"), (folder / "nowhere", "no such directory")):
        assert main(["convert", "--base", "x", "--adapter", str(path), "--to", "lora", "--out", str(folder / "o")]) == 1
        assert f"{path}: {complaint}" in capsys.readouterr().err


def test_an_option_of_another_method_is_answered_by_the_methods_own():
    with pytest.raises(TypeError, match=r"method 'lora': .* 'r', expected some of \['rank', 'alpha'\]"):
        inject_adapter(base_model(), "lora", r=8)
    with pytest.raises(ValueError, match="AdaMSS itself is inject_adamss$"):
        inject_adapter(base_model(), "adamss")


@pytest.mark.parametrize(("scope", "target", "warns"), [("global", 6, True), ("global", 5, False), ("layer", 3, True)])
def test_a_target_that_prunes_nothing_is_named(scope, target, warns, recwarn):
    fields = {"target_modules": ["up", "down"], "use_asa": True, "asa_scope": scope, "asa_target_subspaces": target}
    model = adapted(**fields)
    SubspaceAllocator(model, model.up.config)
    messages = [str(w.message) for w in recwarn if "nothing will be pruned" in str(w.message)]
    assert len(messages) == warns


def test_a_command_without_its_library_names_the_extra(monkeypatch, capsys):
    def run(args):
        import peft.tuners  # noqa: F401

    monkeypatch.setattr("adamss_kernels.cli.info.run", run)
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["info"]) == 1
    needed = "adamss-kernels info: needs peft, which is not installed: pip install 'adamss-kernels[hf]'\n"
    assert capsys.readouterr().err == needed

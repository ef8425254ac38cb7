"""`adamss-kernels inspect` tells what is in an adapter of every kind, and how two differ, without the model."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import randomise
from torch import nn

from adamss_kernels import AdaMSSConfig, export_lora, export_peft, inject_adamss, save_adapter
from adamss_kernels.adapters import inject_adapter
from adamss_kernels.cli import inspect, main
from adamss_kernels.formats import read_contents
from adamss_kernels.model import adamss_layers

KINDS = ("adamss", "compact", "peft", "lora", "trainer")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(24, 24), nn.Linear(24, 40, bias=False)


def base() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    model.head = nn.Linear(24, 3)
    return model


def trained() -> nn.Module:
    config = AdaMSSConfig(
        r=8, num_subspaces=4, subspace_rank=2, target_modules=["query", "value"], modules_to_save=["head"]
    )
    model = inject_adamss(base(), config, progress=False)
    for seed, layer in enumerate(adamss_layers(model).values()):
        randomise(layer, seed)
    return model


@pytest.fixture
def pruned() -> nn.Module:
    model = trained()
    layers = adamss_layers(model)
    layers["layers.0.query"].set_masks(torch.tensor([True, True, False, True]), torch.tensor([True, False, True, True]))
    layers["layers.1.value"].set_masks(trainable=torch.zeros(4, dtype=torch.bool))
    return model


def write(model: nn.Module, kind: str, directory) -> None:
    from safetensors.torch import save_file

    if kind == "trainer":
        folder = directory / "checkpoint-20"
        folder.mkdir(parents=True)
        (directory / "checkpoint-5").mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")
        return
    writers = {
        "adamss": lambda: save_adapter(model, directory),
        "compact": lambda: save_adapter(model, directory, compact=True),
        "peft": lambda: export_peft(model, directory, progress=False),
        "lora": lambda: export_lora(model, directory),
    }
    writers[kind]()


@pytest.mark.parametrize("kind", KINDS)
def test_layers_masks_and_updates_are_told_for_every_kind(tmp_path, kind, pruned):
    write(pruned, kind, tmp_path)
    report = inspect.describe(read_contents(tmp_path), base())
    rows = {row["name"]: row for row in report["layers"]}
    assert set(rows) == set(adamss_layers(pruned))
    for name, layer in adamss_layers(pruned).items():
        row = rows[name]
        assert row["shape"] == [layer.out_features, layer.in_features]
        assert row["relative_update"] == pytest.approx(
            float(layer.delta_weight().norm() / layer.weight.norm()), rel=1e-4
        )
        if kind == "lora":
            assert row["ranks"] == [int((layer.ranks * layer.active).sum())]
            continue
        assert (row["R"], row["ranks"]) == (8, layer.ranks.tolist())
        if kind != "peft":  # which has no masks
            trains, active = layer.active & layer.trainable, layer.active
            assert (row["trained"], row["frozen"], row["pruned"]) == (
                int(trains.sum()),
                int(active.sum() - trains.sum()),
                int((~active).sum()),
            )
            sizes = torch.tensor(layer.layout.sizes)
            assert row["trained_numbers"] == int((layer.ranks * (8 + sizes))[trains].sum())
    totals = report["totals"]
    assert totals["layers"] == 4
    assert totals["file_bytes"] > sum(totals["bytes"].values())


def test_the_command_prints_a_table_or_json_and_draws(tmp_path, capsys, pruned):
    pytest.importorskip("matplotlib")
    save_adapter(pruned, tmp_path)
    assert main(["inspect", str(tmp_path), "--plot", str(tmp_path / "subspaces.png")]) == 0
    text = capsys.readouterr().out
    assert "4 layers, 16 subspaces: 10 trained, 5 frozen, 1 pruned" in text
    assert "saved whole: head (300 bytes)" in text
    assert (tmp_path / "subspaces.png").read_bytes().startswith(b"\x89PNG")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["trained"] for row in report["layers"]] == [2, 4, 4, 0]


def test_two_adapters_differ_where_they_do(tmp_path, capsys, pruned):
    save_adapter(trained(), tmp_path / "a")
    save_adapter(trained(), tmp_path / "same")
    pruned.layers[1].query.C.data.mul_(1.5)
    save_adapter(pruned, tmp_path / "b")
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "same")]) == 0
    assert capsys.readouterr().out == "the same\n"
    assert main(["inspect", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "layers.0.query: active 4 of 4 [xxxx] became 3 of 4 [xx.x]",
        "layers.0.query: trainable 4 of 4 [xxxx] became 2 of 4 [x..x]",
        "layers.1.query: C differs by 0.5 (relative)",
        "layers.1.value: trainable 4 of 4 [xxxx] became 0 of 4 [....]",
    ]
    only = inject_adamss(base(), AdaMSSConfig(r=8, num_subspaces=4, target_modules=["query"]), progress=False)
    save_adapter(only, tmp_path / "c")
    main(["inspect", str(tmp_path / "a"), str(tmp_path / "c")])
    assert "layers.0.value: only in the first" in capsys.readouterr().out


def test_related_methods_are_told_too(tmp_path):
    model = inject_adapter(base(), "randlora", ["query"], progress=False, rank=2)
    save_adapter(model, tmp_path)
    report = inspect.describe(read_contents(tmp_path), base())
    assert [row["method"] for row in report["layers"]] == ["randlora"] * 2
    assert report["layers"][0]["relative_update"] is None


def test_what_cannot_be_read_is_named(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert f"{tmp_path / 'nowhere'}: no such directory" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 1
    assert "expected an adapter, but there is no adapter.safetensors (save_adapter)" in capsys.readouterr().err
    (tmp_path / "adapter.safetensors").write_bytes(b"rubbish")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "adapter.safetensors: not a complete safetensors file" in capsys.readouterr().err
    save_adapter(trained(), tmp_path)
    other = nn.ModuleDict({"layers": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"layers\.0\.query: the base has no such layer"):
        inspect.describe(read_contents(tmp_path), other)

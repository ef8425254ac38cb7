"""What is exported for PEFT, stock PEFT loads with equal outputs; what it could not load so is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file, save_file
from torch import nn

from adamss_kernels import AdaMSSConfig, export_lora, export_peft, inject_adamss, load_adapter, save_adapter
from adamss_kernels.adapters import inject_adapter
from adamss_kernels.formats import import_peft
from adamss_kernels.merge import merge_and_unload
from adamss_kernels.model import adamss_layers

peft = pytest.importorskip("peft")

# Both sums have a few hundred fp32 terms of order one: their rounding stays two orders below.
TOLERANCE = 1e-5


class Net(nn.Module):
    """Two blocks with biased and unbiased layers, a suffix that also ends another name, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False)}) for _ in range(2)
        )
        self.sup = nn.Linear(24, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(self.sup(x))


CONFIG = AdaMSSConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=["up", "down"], modules_to_save=["head"])


def base() -> Net:
    torch.manual_seed(3)
    return Net()


def trained(config: AdaMSSConfig = CONFIG) -> Net:
    """An adapted model whose B, C and head have moved, as by training."""
    model = inject_adamss(base(), config, progress=False)
    for seed, layer in enumerate(adamss_layers(model).values()):
        randomise(layer, seed)
        layer.C.data.mul_(10)
        layer.B.data.add_(torch.randn_like(layer.B), alpha=0.1)
    for parameter in model.head.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def outputs(model: nn.Module) -> torch.Tensor:
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return model.eval()(x)


def assert_stock_peft_gives_the_same(model: nn.Module, directory, onto: nn.Module | None = None):
    loaded = peft.PeftModel.from_pretrained(onto or base(), directory)
    assert (outputs(model) - outputs(base())).abs().max() > 0.1
    assert (outputs(loaded) - outputs(model)).abs().max() <= TOLERANCE
    return loaded


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
def test_stock_peft_loads_an_exported_adamss_checkpoint_with_equal_outputs(dynamic, tmp_path):
    model = trained(dataclasses.replace(CONFIG, subspace_rank=4, use_dynamic_rank=dynamic, svd_threshold=0.5))
    path = export_peft(model, tmp_path, progress=False)
    assert path == tmp_path / "adapter_model.safetensors"
    loaded = assert_stock_peft_gives_the_same(model, tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    ours, theirs = load_file(path), load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("merged", [False, True])
def test_stock_peft_loads_an_exported_lora_with_equal_outputs_rank_rho_and_alpha_rho(merged, tmp_path):
    model = trained()
    if merged:
        for layer in adamss_layers(model).values():
            layer.merge()
    export_lora(model, tmp_path)
    rho = adamss_layers(model)["blocks.0.up"].layout.rho
    header = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (header["r"], header["lora_alpha"], header["rank_pattern"], header["lora_bias"]) == (rho, rho, {}, True)
    loaded = assert_stock_peft_gives_the_same(model, tmp_path)
    assert loaded.base_model.model.blocks[0]["up"].scaling == {"default": 1.0}


def test_a_lora_of_layers_with_biases_can_be_merged_by_peft(tmp_path):
    model = trained(dataclasses.replace(CONFIG, target_modules=["up"]))
    export_lora(model, tmp_path)
    merged = assert_stock_peft_gives_the_same(model, tmp_path).merge_and_unload()
    assert (outputs(merged) - outputs(model)).abs().max() <= TOLERANCE


def test_a_lora_without_a_bias_update_does_not_set_lora_bias(tmp_path):
    model = trained(dataclasses.replace(CONFIG, target_modules=["down"], modules_to_save=None))
    export_lora(model, tmp_path)
    assert not json.loads((tmp_path / "adapter_config.json").read_text())["lora_bias"]
    assert not any(key.endswith("bias") for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_the_bias_update_is_left_out_on_request_and_its_size_is_said(tmp_path, caplog):
    model = trained()
    with caplog.at_level(logging.WARNING):
        export_lora(model, tmp_path, bias=False)
    largest = max(float(d.abs().max()) for x in adamss_layers(model).values() if (d := x.delta_bias()) is not None)
    assert f"{largest:.3g}" in caplog.text
    assert not any(".lora_B.bias" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_pruned_subspaces_cost_no_rank_in_a_lora_and_contribute_nothing_in_either_export(tmp_path):
    model = trained()
    layers = adamss_layers(model)
    layers["blocks.0.up"].active[1] = False
    layers["blocks.1.down"].active[:] = False
    export_lora(model, tmp_path / "lora")
    header = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert header["rank_pattern"] == header["alpha_pattern"]
    assert header["rank_pattern"]["blocks.0.up"] == 4
    assert header["rank_pattern"]["blocks.1.up"] == header["r"] == 6
    assert "blocks.1.down" not in header["target_modules"]
    assert_stock_peft_gives_the_same(model, tmp_path / "lora")
    export_peft(model, tmp_path / "peft", progress=False)
    assert_stock_peft_gives_the_same(model, tmp_path / "peft")


def test_a_layer_whose_name_ends_another_one_gets_its_own_rank(tmp_path):
    model = nn.ModuleDict({"up": nn.Linear(24, 24), "deep": nn.ModuleDict({"up": nn.Linear(24, 24)})})
    model.forward = lambda x: model["deep"]["up"](model["up"](x))  # type: ignore[method-assign]
    fresh = copy.deepcopy(model)
    fresh.forward = lambda x: fresh["deep"]["up"](fresh["up"](x))  # type: ignore[method-assign]
    inject_adamss(model, dataclasses.replace(CONFIG, target_modules=["up"], modules_to_save=None), progress=False)
    for layer in adamss_layers(model).values():
        randomise(layer).C.data.mul_(10)
    model["up"].active[0] = False
    export_lora(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert (outputs(loaded.base_model.model) - outputs(model)).abs().max() <= TOLERANCE


def test_only_the_adapted_of_several_layers_with_one_suffix_are_adapted_by_peft(tmp_path):
    model = trained(dataclasses.replace(CONFIG, target_modules=["up"], layers_to_transform=[1]))
    export_lora(model, tmp_path)
    loaded = assert_stock_peft_gives_the_same(model, tmp_path)
    assert type(loaded.base_model.model.blocks[0]["up"]) is nn.Linear


def test_a_rounded_base_on_which_peft_would_assign_other_rows_is_refused(tmp_path):
    save_adapter(trained(), tmp_path / "ours")
    rounded = base()
    for parameter in rounded.parameters():
        parameter.data.copy_(parameter.data.bfloat16().float())
        parameter.data.add_(torch.randn_like(parameter) * 1e-2 * parameter.data.std())
    with pytest.warns(UserWarning):
        model = load_adapter(rounded, tmp_path / "ours")
    onto = unadapted(rounded)
    with pytest.raises(ValueError, match=r"blocks\.\d\.\w+: from this base weight PEFT would assign \d+ of"):
        export_peft(model, tmp_path / "peft", progress=False)
    assert not (tmp_path / "peft").exists()
    # A LoRA needs no rows.
    export_lora(model, tmp_path / "lora")
    assert_stock_peft_gives_the_same(model, tmp_path / "lora", onto)


def unadapted(model: Net) -> Net:
    """A plain `Net` with the base weights of `model`."""
    plain = Net()
    state = model.state_dict()
    plain.load_state_dict({key: state[key] for key in plain.state_dict()})
    return plain


def test_one_layer_under_two_names_is_refused_by_name(tmp_path):
    model = Net()
    model.blocks[1]["up"] = model.blocks[0]["up"]
    inject_adamss(model, CONFIG, progress=False)
    for export in (export_lora, export_peft):
        with pytest.raises(ValueError, match=r"blocks\.1\.up: is the same module as 'blocks\.0\.up'"):
            export(model, tmp_path)


def test_a_saved_module_whose_name_peft_takes_for_two_is_refused(tmp_path):
    model = Net()
    model.ahead = nn.Linear(2, 2)
    inject_adamss(model, CONFIG, progress=False)
    with pytest.raises(ValueError, match="PEFT would also save 'ahead'"):
        export_lora(model, tmp_path)


def test_a_model_with_layers_of_another_method_is_refused_by_name(tmp_path):
    model = inject_adapter(trained(), "lora", ["sup"], progress=False)
    for export in (export_lora, export_peft):
        with pytest.raises(ValueError, match="sup: is a LoRALinear, whose update would be left out"):
            export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_adapted_or_wholly_pruned_is_refused(tmp_path):
    for export in (export_lora, export_peft):
        with pytest.raises(ValueError, match="model: has no FusedAdaMSSLinear"):
            export(Net(), tmp_path)
    model = trained()
    for layer in adamss_layers(model).values():
        layer.active[:] = False
    with pytest.raises(ValueError, match="no subspace contributes"):
        export_lora(model, tmp_path)


def test_frozen_subspaces_are_exported_and_said_to_be_forgotten_by_peft(tmp_path, caplog):
    model = trained()
    for layer in adamss_layers(model).values():
        layer.trainable[0] = False
    with caplog.at_level(logging.WARNING):
        export_peft(model, tmp_path, progress=False)
    assert "4 frozen subspaces would train again" in caplog.text
    assert_stock_peft_gives_the_same(model, tmp_path)


def test_modules_to_save_inside_one_another_are_refused_for_peft_which_cannot_load_them(tmp_path):
    model = nn.ModuleDict({"body": base(), "tail": nn.Sequential(nn.Linear(4, 4))})
    config = dataclasses.replace(CONFIG, modules_to_save=["tail", "tail.0"])
    inject_adamss(model, config, progress=False)
    with pytest.raises(ValueError, match=r"modules_to_save: PEFT cannot load 'tail\.0', which 'tail' holds"):
        export_peft(model, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing_that_peft_would_load(tmp_path, monkeypatch):
    export_lora(trained(), tmp_path)
    monkeypatch.setattr("safetensors.torch.save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_lora(trained(dataclasses.replace(CONFIG, subspace_rank=1)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_model.safetensors"}


def peft_trained(**config) -> nn.Module:
    """A stock PEFT model whose parameters have moved."""
    options = {"r": 8, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["up", "down"]}
    model = peft.get_peft_model(base(), peft.AdamssConfig(**options, modules_to_save=["head"], **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    return model


@pytest.mark.parametrize("config", [{}, {"use_dynamic_rank": True, "svd_threshold": 0.5}], ids=["fixed", "dynamic"])
def test_a_checkpoint_of_peft_is_imported_and_exported_bit_for_bit(config, tmp_path):
    theirs = peft_trained(**config)
    theirs.save_pretrained(tmp_path / "peft")
    ours = import_peft(base(), tmp_path / "peft", progress=False)
    assert (outputs(ours) - outputs(theirs)).abs().max() <= TOLERANCE
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in trained().named_parameters() if p.requires_grad
    }
    export_peft(ours, tmp_path / "again", progress=False)
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("peft", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_checkpoint_of_peft_on_another_base_is_refused_where_peft_is_silently_wrong(tmp_path):
    peft_trained().save_pretrained(tmp_path)
    other = base()
    other.blocks[0]["up"].weight.data.add_(torch.randn(40, 24) * 0.01)
    with pytest.raises(ValueError, match=r"blocks\.0\.up: the basis rebuilt from this base weight differs"):
        import_peft(other, tmp_path, progress=False)
    assert type(other.blocks[1]["up"]) is nn.Linear


def test_a_damaged_checkpoint_of_peft_is_refused_by_name(tmp_path):
    peft_trained().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for change, message in (
        ({"base_model.model.blocks.0.up.adamss_B.1": torch.zeros(2, 2)}, r"adamss_B\.1' has shape \(2, 2\)"),
        ({"base_model.model.head.bias": None}, r"tensor 'base_model\.model\.head\.bias' is missing"),
        ({"base_model.model.embedding.weight": torch.zeros(2)}, r"embedding\.weight' that belongs to no adapted"),
        ({"base_model.model.blocks.7.up.adamss_newB": torch.zeros(2, 2)}, r"blocks\.7\.up: the checkpoint adapts"),
    ):
        save_file({key: t for key, t in (tensors | change).items() if t is not None}, path)
        model = base()
        with pytest.raises(ValueError, match=message):
            import_peft(model, tmp_path, progress=False)
        assert not adamss_layers(model)
    adapted = trained()
    peft_trained().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="which is adapted already"):
        import_peft(adapted, tmp_path, progress=False)
    export_lora(adapted, tmp_path / "lora")
    with pytest.raises(ValueError, match="type 'LORA', expected 'ADAMSS'"):
        import_peft(base(), tmp_path / "lora")
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        import_peft(base(), tmp_path / "nowhere")


def test_merging_leaves_plain_linear_layers_with_the_same_outputs():
    model = trained()
    expected = outputs(model)
    assert merge_and_unload(model) is model
    assert not adamss_layers(model)
    assert model.state_dict().keys() == Net().state_dict().keys()
    assert (outputs(model) - expected).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="model: has no FusedAdaMSSLinear"):
        merge_and_unload(model)


def test_merging_a_shared_layer_keeps_it_shared_and_a_diverged_one_changes_nothing():
    model = Net()
    model.blocks[1]["up"] = model.blocks[0]["up"]
    inject_adamss(model, CONFIG, progress=False)
    layers = adamss_layers(model)
    layers["blocks.1.down"].C.data.fill_(torch.inf)
    with pytest.raises(ValueError, match=r"blocks\.1\.down: merge: the merged weight"):
        merge_and_unload(model)
    assert adamss_layers(model) == layers
    layers["blocks.1.down"].C.data.zero_()
    merge_and_unload(model)
    assert model.blocks[1]["up"] is model.blocks[0]["up"]
    assert type(model.blocks[0]["up"]) is nn.Linear

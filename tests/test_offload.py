"""Layers whose weights accelerate keeps on the CPU or on disk are adapted, trained and saved as those that stay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adamss_kernels import (
    AdaMSSConfig,
    AdapterBank,
    export_lora,
    export_peft,
    inject_adamss,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from adamss_kernels.adapters import METHODS, inject_adapter
from adamss_kernels.formats import import_peft
from adamss_kernels.model import adapted_layers

accelerate = pytest.importorskip("accelerate")
D = 24
CONFIG = AdaMSSConfig(r=8, num_subspaces=3, target_modules=["up", "down"])


def base() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.up, model.act = nn.Linear(D, 32), nn.Tanh()
    model.down = pytest.importorskip("transformers").pytorch_utils.Conv1D(D, 32)
    model.head = nn.Linear(D, 3, bias=False)
    nn.init.normal_(model.down.bias)
    return model


@pytest.fixture(params=["cpu", "disk", "some on disk"])
def offloaded(request, tmp_path):
    """Makes a base whose weights are away; that of the head stays in the last case."""
    folders = iter(range(9))

    def make() -> nn.Module:
        if request.param == "cpu":
            return accelerate.cpu_offload(base(), execution_device="cpu")
        folder = tmp_path / f"weights-{next(folders)}"
        if request.param == "disk":
            return accelerate.disk_offload(base(), folder, execution_device="cpu")
        devices = {"up": "disk", "act": "cpu", "down": "disk", "head": "cpu"}
        return accelerate.dispatch_model(base(), devices, main_device="cpu", offload_dir=folder, force_hooks=True)

    return make


def without_conv1d(model: nn.Module) -> nn.Module:
    """Only what PEFT's format takes."""
    return nn.ModuleDict({"up": model.up})


def are_away(model: nn.Module) -> bool:
    return all(t.is_meta for layer in adapted_layers(model).values() for t in (layer.weight, layer.bias))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    x = torch.randn(16, D, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters


def test_they_are_adapted_and_trained_to_the_same_bits(offloaded):
    model, plain = offloaded(), base()
    x = torch.randn(5, D)
    inject_adamss(model, CONFIG, progress=False)
    assert are_away(model)
    torch.testing.assert_close(model(x), plain(x))
    inject_adamss(plain, CONFIG, progress=False)
    got, expected = trained(model), trained(plain)
    assert are_away(model)
    assert got.keys() == expected.keys() == {"up.B", "up.C", "down.B", "down.C"}
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert torch.equal(model(x), plain(x))


def test_what_is_trained_is_saved_and_loaded_onto_them(offloaded, tmp_path):
    model, x = inject_adamss(offloaded(), CONFIG, progress=False), torch.randn(5, D)
    trained(model)
    expected = model(x)
    save_adapter(model, tmp_path / "adapter")
    export_lora(model, tmp_path / "lora")
    export_peft(without_conv1d(model), tmp_path / "peft", progress=False)
    imported = import_peft(offloaded(), tmp_path / "peft", progress=False)
    torch.testing.assert_close(imported.up(x), model.up(x))
    assert imported.up.weight.is_meta
    for other in (offloaded(), base()):
        # Once more onto one that is adapted already.
        for _ in range(2):
            assert torch.equal(load_adapter(other, tmp_path / "adapter")(x), expected)
    assert are_away(load_adapter(offloaded(), tmp_path / "adapter"))
    for name, layer in adapted_layers(model).items():
        assert torch.equal(layer.to_linear().weight, adapted_layers(other)[name].to_linear().weight)


@pytest.mark.parametrize("method", METHODS)
def test_related_methods_take_them_too(method, tmp_path):
    model, plain = accelerate.cpu_offload(base(), execution_device="cpu"), base()
    for each in (model, plain):
        torch.manual_seed(2)
        inject_adapter(each, method, ["up"], progress=False)
        trained(each)
    x = torch.randn(5, D)
    assert are_away(model)
    assert torch.equal(model(x), plain(x))
    save_adapter(model, tmp_path)
    again = accelerate.cpu_offload(base(), execution_device="cpu")
    assert torch.equal(load_adapter(again, tmp_path)(x), plain(x))


def test_what_would_need_the_weight_for_longer_is_refused_by_name():
    model = accelerate.cpu_offload(base(), execution_device="cpu")
    with pytest.raises(ValueError, match=r"^modules_to_save: 'head' is to train, but accelerate takes"):
        inject_adamss(model, AdaMSSConfig(r=8, target_modules=["up"], modules_to_save=["head"]), progress=False)
    with pytest.raises(ValueError, match=r"^up: accelerate takes its weight away after each call"):
        AdapterBank(model).add("ann", CONFIG)
    assert not adapted_layers(model)
    inject_adamss(model, CONFIG, progress=False)
    with pytest.raises(TypeError, match=r"^merge: accelerate keeps the weight off its device.*save the adapter"):
        model.up.merge()
    with pytest.raises(ValueError, match=r"^up: accelerate keeps its weight off its device; save the adapter"):
        merge_and_unload(model)
    assert set(adapted_layers(model)) == {"up", "down"}


def test_a_copy_has_weights_of_its_own():
    model = inject_adamss(accelerate.cpu_offload(base(), execution_device="cpu"), CONFIG, progress=False)
    x = torch.randn(5, D)
    expected, copied = model(x), copy.deepcopy(model)
    nn.init.normal_(model.up.C)
    assert torch.equal(copied(x), expected) and are_away(copied)


def test_a_quantised_weight_is_brought_too():
    quantization = pytest.importorskip("torchao.quantization")
    models = [nn.Sequential(nn.Linear(D, 32)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(set_inductor_config=False))
    accelerate.cpu_offload(models[0], execution_device="cpu")
    for model in models:
        inject_adamss(model, AdaMSSConfig(r=8, num_subspaces=3, target_modules=["0"]), progress=False)
        trained(model)
    x = torch.randn(5, D)
    assert torch.equal(models[0](x), models[1](x))
    assert models[0][0].weight.is_meta

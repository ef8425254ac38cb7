"""A merged layer is saved merged and gives back the parameters that it found, whichever method's it is."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_layer
from torch import nn
from torch.nn.utils import prune

from adamss_kernels import frozen_linear
from adamss_kernels.adapters import METHODS
from adamss_kernels.checkpoint import load_adapter, save_adapter
from adamss_kernels.frozen_linear import FrozenLinear
from adamss_kernels.model import adapted_layers


def adapted(method: str, seed: int = 0) -> FrozenLinear:
    """A layer of `method` (24 in, 20 out) with an update that can be told from none."""
    if method == "adamss":
        return make_layer(seed=seed)
    torch.manual_seed(seed)
    layer = METHODS[method].from_linear(nn.Linear(24, 20))
    for name, parameter in layer.named_parameters():
        if name not in ("weight", "bias"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return layer


methods = pytest.mark.parametrize("method", ["adamss", *METHODS])


@methods
def test_unmerging_gives_back_the_parameters_with_all_that_hangs_on_them(method):
    layer = adapted(method)
    weight, bias = layer.weight, layer.bias
    tied = nn.Linear(24, 20)
    tied.weight = weight
    values = weight.detach().clone()
    weight.requires_grad_(True)
    weight.mark = "of a user"
    seen = []
    weight.register_hook(seen.append)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    layer.merge()
    assert layer.weight is not weight
    assert torch.equal(tied.weight, values)
    layer.unmerge()
    assert layer.weight is weight is tied.weight
    assert layer.bias is bias
    assert weight.requires_grad
    assert weight.mark == "of a user"
    assert not bias.requires_grad
    layer(torch.randn(5, 24)).sum().backward()
    optimizer.step()
    assert seen
    assert optimizer.state[weight]["momentum_buffer"].any()
    assert not torch.equal(tied.weight, values)


@methods
def test_a_copy_of_a_merged_layer_keeps_the_ties_among_the_copies(method):
    model = nn.ModuleDict({"layer": adapted(method), "tied": nn.Linear(24, 20)})
    model["tied"].weight = model["layer"].weight
    model["layer"].merge()
    other = copy.deepcopy(model)
    other["layer"].unmerge()
    assert other["layer"].weight is other["tied"].weight
    assert other["layer"].weight is not model["tied"].weight
    assert torch.equal(other["layer"].weight, model["tied"].weight)


def test_what_is_unmerged_follows_where_the_merged_layer_was_cast():
    layer = make_layer()
    weight = layer.weight
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.weight is weight
    assert layer.weight.dtype == layer.bias.dtype == torch.float64


def test_only_values_that_nobody_else_holds_are_moved_away(monkeypatch):
    moved: list[torch.Size] = []
    monkeypatch.setattr(frozen_linear, "_move", lambda parameter, device: moved.append(parameter.shape))
    layer = make_layer()
    layer.merge(keep_original_on="somewhere")
    assert moved == [(20, 24), (20,)]
    moved.clear()
    layer = make_layer()
    tied = nn.Linear(24, 20)
    tied.weight = layer.weight
    layer.merge(keep_original_on="somewhere")
    assert moved == [(20,)]


def test_values_that_a_graph_still_needs_are_not_moved_away():
    layer, x = make_layer(), torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    layer.merge(keep_original_on="meta")
    assert layer.base_parameters()[0].device.type == "cpu", "backward needs it"
    y.sum().backward()
    assert x.grad.any()


@methods
def test_a_merged_state_dict_is_merged_for_a_plain_layer(method):
    layer, x = adapted(method), torch.randn(5, 24)
    layer.merge()
    y = layer(x)
    plain = nn.Linear(24, 20)
    assert not plain.load_state_dict(layer.state_dict(), strict=False).missing_keys
    assert torch.equal(plain(x), y)


@methods
@pytest.mark.parametrize("target", ["fresh", "trained", "merged", "itself"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_state_dict_applies_the_update_once_in_an_adapted_layer(method, target, assign):
    layer, x = adapted(method), torch.randn(5, 24)
    y, weight = layer(x), layer.weight.detach().clone()
    layer.merge()
    state = layer.state_dict() if target == "itself" else copy.deepcopy(layer.state_dict())
    other = layer if target == "itself" else adapted(method, seed=int(target != "fresh"))
    if target == "merged":
        other.merge()
    other.load_state_dict(state, assign=assign)
    assert not other.merged
    assert torch.equal(other(x), y)
    assert torch.equal(other.weight, weight)


def test_a_merged_state_dict_goes_through_torchs_distributed_checkpoints():
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, x = nn.Sequential(make_layer()), torch.randn(5, 24)
    y = model(x)
    model[0].merge()
    state = copy.deepcopy(get_model_state_dict(model))
    other = nn.Sequential(make_layer(seed=1))
    set_model_state_dict(other, state)
    assert torch.equal(other(x), y)


@methods
def test_an_adapter_saved_from_a_merged_model_is_that_of_the_unmerged_one(method, tmp_path):
    model = nn.Sequential(adapted(method))
    base = nn.Sequential(nn.Linear(24, 20))
    base[0].weight, base[0].bias = copy.deepcopy((model[0].weight, model[0].bias))
    before = save_adapter(model, tmp_path / "before").read_bytes()
    model[0].merge()
    assert save_adapter(model, tmp_path / "after").read_bytes() == before
    x = torch.randn(5, 24)
    model[0].unmerge()
    assert torch.equal(load_adapter(base, tmp_path / "after")(x), model(x))


def test_a_transformer_that_is_saved_merged_is_read_merged(tmp_path):
    transformers = pytest.importorskip("transformers")
    from adamss_kernels import AdaMSSConfig, inject_adamss

    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config).eval()
    inject_adamss(model, AdaMSSConfig(r=8, num_subspaces=3, target_modules=["query", "value"]), progress=False)
    for layer in adapted_layers(model).values():
        layer.C.data.normal_()
        layer.merge()
    ids = torch.arange(8)[None]
    model.save_pretrained(tmp_path)
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)


def test_a_layer_whose_weight_is_pruned_refuses_to_merge_and_says_why():
    layer = make_layer()
    prune.l1_unstructured(layer, "weight", 0.5)
    with pytest.raises(TypeError, match="merge: expected weight to be a parameter, but it is computed from others"):
        layer.merge()
    assert not layer.merged

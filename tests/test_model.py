"""`inject_adamss` replaces exactly the layers it is told to, or nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, inject_adamss
from adamss_kernels.model import adamss_layers


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.query, self.value, self.dense = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        return self.dense(torch.tanh(self.query(x)) * self.value(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.classifier = nn.Linear(12, 4)

    def forward(self, x):
        for block in self.layers:
            x = x + block(x)
        return self.classifier(x)


def config(**options) -> AdaMSSConfig:
    return AdaMSSConfig(**({"r": 6, "num_subspaces": 3} | options))


def adapted(model: nn.Module) -> set[str]:
    return set(adamss_layers(model))


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_suffixes_choose_layers_and_everything_else_is_frozen():
    model = Model()
    x = torch.randn(2, 12)
    before = model(x)
    assert inject_adamss(model, config(target_modules=["query", "value"]), progress=False) is model
    assert adapted(model) == {f"layers.{i}.{name}" for i in range(3) for name in ("query", "value")}
    assert trainable(model) == {f"{name}.{p}" for name in adapted(model) for p in "BC"}
    torch.testing.assert_close(model(x), before)


def test_modules_to_save_stay_trainable_and_are_not_adapted():
    model = inject_adamss(Model(), config(modules_to_save=["classifier"]), progress=False)
    assert len(adapted(model)) == 9
    assert type(model.classifier) is nn.Linear
    assert {"classifier.weight", "classifier.bias"} <= trainable(model)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": r".*\.(query|dense)"}, {f"layers.{i}.{n}" for i in range(3) for n in ("query", "dense")}),
        ({"target_modules": r"layers\.1\.query"}, {"layers.1.query"}),
        ({"target_modules": ["layers.2.value"]}, {"layers.2.value"}),
        ({"target_modules": ["query"], "layers_to_transform": 1}, {"layers.1.query"}),
        ({"target_modules": ["query"], "layers_to_transform": [0, 2]}, {"layers.0.query", "layers.2.query"}),
        ({"target_modules": ["query"], "layers_to_transform": 1, "layers_pattern": "layers"}, {"layers.1.query"}),
    ],
)
def test_patterns_match_as_in_peft(options, expected):
    assert adapted(inject_adamss(Model(), config(**options), progress=False)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["querry"]}, r"matches no linear layer; .* \['classifier', 'dense', 'query', 'value'\]"),
        ({"target_modules": ["query"], "layers_to_transform": 7}, "matches no linear layer"),
        ({"modules_to_save": ["head"]}, r"modules_to_save: 'head' matches no module; .*'classifier'"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_what_there_is(options, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        inject_adamss(model, config(**options), progress=False)
    assert not adapted(model)
    assert len(trainable(model)) == len(list(model.parameters()))


def test_a_target_that_is_no_plain_linear_is_refused_by_name():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2), "query": nn.ModuleDict({"a": nn.Linear(3, 3)})})
    with pytest.raises(TypeError, match=r"'attention.out_proj' is a .*NonDynamicallyQuantizableLinear"):
        inject_adamss(model, config(target_modules=["out_proj"]), progress=False)
    with pytest.raises(TypeError, match=r"'query' is a .*ModuleDict"):
        inject_adamss(model, config(target_modules=["query"]), progress=False)
    # Without a pattern such a module is passed over: its owner reads the weight and never calls it.
    assert adapted(inject_adamss(model, config(), progress=False)) == {"query.a"}


def test_a_conv1d_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    model = nn.ModuleDict({"attn": nn.ModuleDict({"c_attn": transformers.pytorch_utils.Conv1D(9, 3)})})
    with pytest.raises(TypeError, match=r"'attn.c_attn' is a transformers.pytorch_utils.Conv1D; only torch.nn.Linear"):
        inject_adamss(model, config(target_modules=["c_attn"]), progress=False)


class Quantised(torch.Tensor):
    """A weight that computes in its own way, as quantisation libraries make it."""


@pytest.mark.parametrize(
    ("quantise", "message"),
    [
        (
            lambda linear: torch.ao.nn.quantized.dynamic.Linear(12, 12),
            r"'query' is a torch.ao.nn.quantized.dynamic.*Linear; only torch.nn.Linear itself",
        ),
        (
            lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.data.as_subclass(Quantised))),
            r"the weight of 'query' is a .*Quantised; only a plain torch.nn.Parameter",
        ),
        (
            lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.data.to(torch.int8), False)),
            r"the weight of 'query' is of dtype torch.int8; expected one of",
        ),
    ],
)
def test_a_quantised_linear_is_refused_by_name(quantise, message):
    block = Block()
    block.query = quantise(block.query) or block.query
    with pytest.raises(TypeError, match=message):
        inject_adamss(block, config(target_modules=["query", "value"]), progress=False)
    assert not adapted(block)


def test_a_tied_weight_stays_tied_and_merging_leaves_its_other_owner_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 12), "head": nn.Linear(12, 10, bias=False)})
    model.head.weight = model.embed.weight
    inject_adamss(model, config(target_modules=["head"]), progress=False)
    assert model.head.weight is model.embed.weight
    before = model.embed.weight.clone()
    x = torch.randn(3, 12)
    nn.init.normal_(model.head.C)
    expected = model.head(x)
    model.head.merge()
    assert torch.equal(model.embed.weight, before)
    torch.testing.assert_close(model.head(x), expected)
    model.head.unmerge()
    assert torch.equal(model.head.weight, before)


def test_a_failure_half_way_changes_nothing():
    model = Model()
    model.layers[2].dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="layers.2.dense: expected finite values"):
        inject_adamss(model, config(), progress=False)
    assert not adapted(model)
    assert len(trainable(model)) == len(list(model.parameters()))


def test_a_module_registered_twice_is_wrapped_once_and_stays_shared():
    model = Model()
    model.layers[1] = model.layers[0]
    model.again = model.layers[2].query
    inject_adamss(model, config(target_modules=["query", "again"]), progress=False)
    assert model.layers[1].query is model.layers[0].query
    assert model.again is model.layers[2].query
    assert isinstance(model.again, FusedAdaMSSLinear)


def test_a_bare_linear_cannot_be_replaced_in_place():
    with pytest.raises(ValueError, match="from_linear"):
        inject_adamss(nn.Linear(3, 3), config(), progress=False)


def test_progress_names_each_layer(capsys):
    inject_adamss(Model(), config(target_modules=["query"]))
    shown = capsys.readouterr().err
    assert "layers.2.query" in shown
    assert "3/3" in shown

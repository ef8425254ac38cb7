"""`inject_adamss` replaces exactly the layers it is told to, or nothing."""

from __future__ import annotations

import pickle

import pytest
import torch
from conftest import make_layer, randomise
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, inject_adamss, print_trainable_parameters
from adamss_kernels.adapters import LoRALinear
from adamss_kernels.merge import merge_and_unload
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
        (
            {"target_modules": ["query"], "modules_to_save": ["query"]},
            r"linear layer outside modules_to_save=\('query',\)",
        ),
        ({"target_modules": "query"}, r"matches no linear layer as a regular expression for whole names; .*'query'"),
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
    with pytest.warns(UserWarning, match=r"passes over 1 layers .*\(NonDyn.*\), such as 'attention.out_proj'; 1 are"):
        assert adapted(inject_adamss(model, config(), progress=False)) == {"query.a"}


def test_a_model_with_adapters_of_peft_is_left_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Model(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match=r"query' has an adapter of PEFT, which would be frozen"):
        inject_adamss(model, config(), progress=False)
    assert not adapted(model)
    inject_adamss(model.merge_and_unload(), config(), progress=False)


class Quantised(torch.Tensor):
    """A weight that computes in its own way, as quantisation libraries make it."""


@pytest.mark.parametrize(
    ("quantise", "message"),
    [
        (
            lambda linear: torch.ao.nn.quantized.dynamic.Linear(12, 12),
            r"'query' is a torch.ao.nn.quantized.dynamic.*Linear; what can be adapted is torch.nn.Linear",
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


def test_a_model_in_ddp_is_refused_since_ddp_would_not_see_the_new_parameters():
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = Model()
    with pytest.raises(ValueError, match="model: is wrapped in DDP, .* adapt it before wrapping it"):
        inject_adamss(wrapped, config(), progress=False)
    assert not adapted(wrapped)


def test_progress_names_each_layer(capsys):
    inject_adamss(Model(), config(target_modules=["query"]))
    shown = capsys.readouterr().err
    assert "layers.2.query" in shown
    assert "3/3" in shown


def test_a_module_is_adapted_under_all_its_names_whichever_is_targeted():
    model = Model()
    model.again = model.layers[2].query
    inject_adamss(model, config(target_modules=["again"]), progress=False)
    assert adapted(model) == {"layers.2.query"}
    assert model.again is model.layers[2].query


def test_a_second_call_adapts_further_layers_and_the_first_ones_go_on_training():
    model = inject_adamss(Model(), config(target_modules=["query"], modules_to_save=["dense"]), progress=False)
    before = trainable(model)
    inject_adamss(model, config(r=3, target_modules=["value"], modules_to_save=["classifier"]), progress=False)
    added = {f"layers.{i}.value.{p}" for i in range(3) for p in "BC"} | {"classifier.weight", "classifier.bias"}
    assert trainable(model) == before | added
    with pytest.raises(TypeError, match=r"'layers.0.query' is a .*FusedAdaMSSLinear, which is adapted already"):
        inject_adamss(model, config(target_modules=["query"]), progress=False)


def test_hooks_of_a_replaced_layer_go_on_being_called():
    model, calls = Model(), []
    linear = model.layers[0].query
    first = linear.register_forward_hook(lambda *_: calls.append("after"))
    linear.register_forward_pre_hook(lambda *_: calls.append("before"))
    linear.register_full_backward_hook(lambda *_: calls.append("backward"))
    inject_adamss(model, config(), progress=False)
    model(torch.randn(2, 12, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]
    first.remove()
    merge_and_unload(model)(torch.randn(2, 12))
    assert calls[3:] == ["before"]


def test_pytorchs_own_encoder_calls_its_adapted_layers_in_eval_mode_too():
    model = nn.Module()
    model.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True), 2)
    inject_adamss(model, config(target_modules=["linear1", "linear2"]), progress=False)
    x = torch.randn(3, 5, 12)
    padding = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    unadapted = model.encoder(x, src_key_padding_mask=padding)[~padding]
    for layer in adamss_layers(model).values():
        randomise(layer)
    expected = model.encoder(x, src_key_padding_mask=padding)[~padding]
    assert (expected - unadapted).abs().max() > 0.01
    model.eval()
    torch.testing.assert_close(model.encoder(x, src_key_padding_mask=padding)[~padding], expected)
    with torch.inference_mode():
        torch.testing.assert_close(model.encoder(x, src_key_padding_mask=padding)[~padding], expected)
    # Merged it is PyTorch's own again: nothing of this package is left in it.
    merge_and_unload(model)
    assert "adamss" not in str(pickle.dumps(model))
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(x, src_key_padding_mask=padding)[~padding], expected)


def test_what_is_no_config_of_ours_is_refused_before_anything_changes():
    model = Model()
    pefts = pytest.importorskip("peft").AdamssConfig(target_modules=["query"])
    for wrong, kind in ((pefts, "peft.*AdamssConfig"), ({"r": 4}, "builtins.dict"), (None, "builtins.NoneType")):
        with pytest.raises(TypeError, match=f"config: expected an adamss_kernels.AdaMSSConfig, got a {kind}"):
            inject_adamss(model, wrong, progress=False)
        with pytest.raises(TypeError, match="config: expected an adamss_kernels.AdaMSSConfig"):
            FusedAdaMSSLinear.from_linear(nn.Linear(3, 3), wrong)
    assert not adapted(model)


@pytest.mark.parametrize("bias", [True, False])
def test_copies_that_data_parallel_makes_compute_the_same(bias):
    layers = [make_layer(bias=bias), LoRALinear.from_linear(nn.Linear(24, 20, bias=bias))]
    for layer in layers:
        # What torch.nn.parallel.replicate does for each GPU.
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():
            setattr(replica, name, parameter * 1)
        if not bias:
            replica._parameters["bias"] = None
        x = torch.randn(5, 24)
        torch.testing.assert_close(replica(x), layer(x), rtol=0, atol=0)
        replica(x).sum().backward()
        assert layer.B.grad.abs().sum() > 0


@pytest.mark.parametrize("wrap", [lambda m: FusedAdaMSSLinear.from_linear(m, config()), LoRALinear.from_linear])
def test_a_single_layer_that_is_no_plain_linear_is_refused(wrap):
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(3, 3)
    with pytest.raises(TypeError, match="'linear' is a .*Conv1D, which inject_adamss adapts; this takes a plain"):
        wrap(conv1d)
    linear = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
    with pytest.raises(TypeError, match="'linear' is a .*ParametrizedLinear, whose parameters are computed anew"):
        wrap(linear)


def test_trainable_parameters_are_printed_as_peft_prints_them(capsys):
    peft = pytest.importorskip("peft")
    model = nn.ModuleDict({"a": nn.Linear(30, 20), "b": nn.Linear(20, 30)})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["a"]))
    wrapped.print_trainable_parameters()
    theirs = capsys.readouterr().out
    print_trainable_parameters(wrapped)
    assert capsys.readouterr().out == theirs
    model = inject_adamss(nn.Sequential(nn.Linear(8, 6)), AdaMSSConfig(r=4, num_subspaces=2), progress=False)
    print_trainable_parameters(model)
    assert capsys.readouterr().out == "trainable params: 14 || all params: 68 || trainable%: 20.5882\n"

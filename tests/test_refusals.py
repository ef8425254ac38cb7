"""What cannot be adapted is refused before anything changes, and the message says which layer and why."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, inject_adamss, merge_and_unload
from adamss_kernels.model import adamss_layers


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


class Experts(nn.Module):
    """As transformers has them since 5.0: the weights of all experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 6, 12))
        self.down_proj = nn.Parameter(torch.randn(4, 12, 3))


def config(**options) -> AdaMSSConfig:
    return AdaMSSConfig(**{"r": 4, "num_subspaces": 2, "target_modules": ["query"]} | options)


def model_with(query: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"first": nn.ModuleDict({"query": nn.Linear(12, 12)}), "block": nn.ModuleDict({"query": query})}
    )


def changed(linear: nn.Linear, change) -> nn.Linear:
    change(linear)
    return linear


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (lambda: Scaled(12, 12), r"'block.query' is a test_refusals.Scaled, with a forward of its own, which"),
        (
            lambda: Renamed(12, 12),
            r"'block.query' is a test_refusals.Renamed, a subclass, which .*; what can be adapted",
        ),
        (
            lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(12, 12)),
            r"'block.query' is a .*, whose parameters are computed anew in each call \(weight by _SpectralNorm\); make",
        ),
        (
            lambda: nn.utils.prune.l1_unstructured(nn.Linear(12, 12), "weight", 3),
            r"the weight of 'block.query' is computed from weight_orig before each call .*prune.remove",
        ),
        (
            lambda: changed(nn.Linear(12, 12), lambda m: setattr(m, "forward", lambda x: x)),
            r"the forward of 'block.query' was replaced on this module alone",
        ),
        (
            lambda: nn.Conv2d(12, 12, 1),
            r"'block.query' is a torch.nn.modules.conv.Conv2d; what can be adapted is torch",
        ),
    ],
)
def test_a_layer_that_computes_in_another_way_is_refused_with_the_reason(query, message):
    import torch.nn.utils.prune  # noqa: F401

    model = model_with(query())
    before = dict(model.named_modules())
    with pytest.raises(TypeError, match=message):
        inject_adamss(model, config(), progress=False)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_the_output_projection_of_multihead_attention_is_refused_since_it_is_never_called():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(12, 2)})
    with pytest.raises(
        TypeError, match=r"'attention.out_proj' is a .*: nn.MultiheadAttention reads .* and never calls"
    ):
        inject_adamss(model, config(target_modules=["out_proj"]), progress=False)


@pytest.mark.parametrize("targets", [None, ["query", "experts"], ["query", "gate_up_proj", "down_proj"]])
def test_experts_that_are_parameters_are_passed_over_and_counted(targets):
    model = nn.ModuleDict(
        {"query": nn.Linear(12, 12), "experts": Experts(), "more": nn.ModuleDict({"experts": Experts()})}
    )
    with pytest.warns(
        UserWarning, match=r"passing over 4 weights of experts .*, such as 'experts.down_proj'; 1 layers"
    ):
        inject_adamss(model, config(target_modules=targets), progress=False)
    assert set(adamss_layers(model)) == {"query"}


def test_a_model_of_which_only_experts_are_meant_says_so():
    model = nn.ModuleDict({"query": nn.Linear(12, 12), "experts": Experts()})
    with pytest.raises(ValueError, match=r"matches no linear layer \(2 weights of experts that are three-dimensional"):
        inject_adamss(model, config(target_modules=["experts"]), progress=False)


def test_three_dimensional_parameters_of_other_modules_are_nobodys_business(recwarn):
    model = nn.ModuleDict({"query": nn.Linear(12, 12), "conv": nn.Conv1d(4, 4, 3)})
    inject_adamss(model, config(target_modules=None), progress=False)
    assert not recwarn.list


def test_a_weight_that_alone_was_never_loaded_is_refused():
    model = model_with(nn.Linear(12, 12, device="meta"))
    with pytest.raises(ValueError, match=r"^block.query: the base weight is on the meta device: it was never loaded"):
        inject_adamss(model, config(), progress=False)
    assert not adamss_layers(model)


@pytest.mark.parametrize("of_transformers", [False, True])
def test_a_hook_of_accelerate_goes_on_working_on_the_layer_in_its_place(of_transformers):
    hooks = pytest.importorskip("accelerate.hooks")
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(12, 12)
    model = model_with(conv1d if of_transformers else nn.Linear(12, 12))
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module))
            return args, kwargs

    query = model["block"]["query"]
    hooks.add_hook_to_module(
        query, hooks.SequentialHook(Counting(), hooks.AlignDevicesHook("cpu", io_same_device=True))
    )
    x = torch.randn(3, 12)
    expected = query(x)
    inject_adamss(model, config(), progress=False)
    layer = model["block"]["query"]
    assert isinstance(layer, FusedAdaMSSLinear)
    torch.testing.assert_close(layer(x), expected)
    nn.init.normal_(layer.C)
    changed_output = layer(x)
    assert (changed_output - expected).abs().max() > 0.01
    merge_and_unload(model)
    torch.testing.assert_close(model["block"]["query"](x), changed_output)
    assert calls == [type(query), type(layer), type(layer), type(query)]

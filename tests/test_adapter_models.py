"""The related methods in models: injected, saved and loaded as AdaMSS is, and equal to PEFT's where PEFT has them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from adapter_variants import IDS, VARIANTS, update_parameters
from torch import Tensor, nn

from adamss_kernels import BaseWeightWarning, load_adapter, save_adapter
from adamss_kernels.adapters import METHODS, AdapterLinear, LoRALinear, RandLoRALinear, inject_adapter


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"up": nn.Linear(24, 40), "down": nn.Linear(40, 24, bias=False), "head": nn.Linear(24, 3)})


def run(net: nn.Module, x: Tensor) -> Tensor:
    return net["head"](net["down"](torch.relu(net["up"](x))))


@pytest.mark.parametrize("method", METHODS)
def test_every_linear_layer_is_adapted_unless_told_otherwise(method):
    net = model()
    x = torch.randn(3, 24)
    before = run(net, x)
    assert inject_adapter(net, method, modules_to_save=["head"], progress=False) is net
    assert type(net["up"]) is type(net["down"]) is METHODS[method]
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    updates = {f"{name}.{p}" for name in ("up", "down") for p in update_parameters(net[name])}
    assert trains == updates | {"head.weight", "head.bias"}
    torch.testing.assert_close(run(net, x), before)
    only = inject_adapter(model(), method, ["up"], progress=False)
    assert type(only["up"]) is METHODS[method]
    assert type(only["down"]) is nn.Linear


def test_bad_arguments_are_named_and_change_nothing():
    net = model()
    for arguments, options, message in (
        (("dora",), {}, "method: expected one of .*'lora'.*, got 'dora'"),
        (("lora", ["query"]), {}, "matches no linear layer"),
        (("lora",), {"rank": 0}, "up: rank: expected an integer >= 1, got 0"),
        (("kronecker",), {"rank": 2, "rank_in": 1.5}, "up: rank_in: expected an integer >= 1, got 1.5"),
        (("randlora",), {"num_bases": 0}, "up: num_bases: expected an integer >= 1"),
        (("lora",), {"alpha": "x"}, "up: alpha: expected a finite number, got 'x'"),
        (("sinlora",), {"omega": None}, "up: omega: expected a finite number, got None"),
        (("kradapter",), {"scaling": float("nan")}, "up: scaling: expected a finite number, got nan"),
        (("spectral_additive",), {"window": "middle"}, "up: window: expected 'top', 'bottom' or an index"),
    ):
        with pytest.raises(ValueError, match=message):
            inject_adapter(net, *arguments, progress=False, **options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'omega'"):
        inject_adapter(net, "lora", progress=False, omega=2)
    net["down"].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="down: weight: expected finite values"):
        inject_adapter(net, "spectral_rotational", progress=False)
    assert all(type(layer) is nn.Linear for layer in net.values())
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="weight: expected a floating-point matrix"):
        LoRALinear.from_linear(nn.Linear(0, 4))


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("merged", [False, True])
def test_a_saved_adapter_gives_the_same_outputs(tmp_path, method, options, merged):
    net = inject_adapter(model(), method, modules_to_save=["head"], progress=False, **options)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(3, 24)
    y = run(net, x)
    if merged:
        net["up"].merge()
    save_adapter(net, tmp_path)
    torch.manual_seed(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh = load_adapter(model(), tmp_path)
    assert torch.equal(run(fresh, x), y)
    assert fresh["up"].options == net["up"].options
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == trains
    # Again, from and onto what was loaded.
    save_adapter(fresh, tmp_path / "again")
    other = inject_adapter(model(), "lora", ["up", "down"], progress=False)
    assert torch.equal(run(load_adapter(other, tmp_path / "again"), x), y)


def test_the_checkpoint_of_a_method_is_bound_to_its_base_and_never_compact(tmp_path):
    net = inject_adapter(model(), "spectral_additive", ["up"], progress=False)
    with pytest.raises(ValueError, match="compact: up is a SpectralAdditiveLinear"):
        save_adapter(net, tmp_path, compact=True)
    net["up"].dU.data.normal_()
    save_adapter(net, tmp_path)
    other = model()
    other["up"].weight.data.normal_()
    with pytest.raises(ValueError, match="up: the base weight differs"):
        load_adapter(other, tmp_path)
    assert type(other["up"]) is nn.Linear
    narrow = model().bfloat16()
    with pytest.warns(BaseWeightWarning, match="up"):
        load_adapter(narrow, tmp_path)
    assert torch.equal(narrow["up"].delta_weight(), net["up"].delta_weight())


def peft_layer(linear: nn.Linear, config: object) -> nn.Module:
    import peft

    host = nn.Module()
    host.config = {"model_type": "custom"}
    host.linear = copy.deepcopy(linear)
    return peft.inject_adapter_in_model(config, host).linear


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_lora_is_pefts(shape):
    import peft

    linear = nn.Linear(*shape)
    theirs = peft_layer(linear, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["linear"]))
    nn.init.normal_(theirs.lora_B["default"].weight)
    ours = LoRALinear.from_linear(linear, rank=4, alpha=6)
    A, B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    ours.A.data.copy_(A.data)
    ours.B.data.copy_(B.data)
    compare(ours, theirs, {"A": A, "B": B})


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_randlora_is_pefts(shape):
    import peft

    linear = nn.Linear(*shape)
    config = peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["linear"])
    theirs = peft_layer(linear, config)
    gamma, lam = theirs.randlora_gamma["default"], theirs.randlora_lambda["default"]
    nn.init.normal_(gamma)
    nn.init.normal_(lam)
    bases = theirs.num_bases
    ours = RandLoRALinear.from_linear(linear, rank=3, num_bases=bases, scaling=6 / 3)
    ours.A.data.copy_(lam.data.T)
    ours.B.data.copy_(gamma.data)
    # PEFT flattens one factor by rank, then basis, and the other by basis, then rank; the pairs that meet are these.
    small, large = sorted(shape)
    flat = theirs.randlora_B["default"][:large, :bases].flatten(1)
    ours.basis_a.copy_(flat.view(large, 3, bases).permute(2, 0, 1))
    ours.basis_b.copy_(theirs.randlora_A["default"][:, 0, :small])
    compare(ours, theirs, {"A": lam, "B": gamma}, transposed=("A",))


def compare(ours: AdapterLinear, theirs: nn.Module, pairs: dict[str, Tensor], transposed: tuple[str, ...] = ()) -> None:
    x = torch.randn(5, ours.in_features, requires_grad=True)
    y, y_theirs = ours(x), theirs(x)
    torch.testing.assert_close(y, y_theirs, rtol=1e-5, atol=1e-5)
    dy = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, *(ours.get_parameter(name) for name in pairs)), dy)
    want = torch.autograd.grad(y_theirs, (x, *pairs.values()), dy)
    for name, a, b in zip(("x", *pairs), got, want, strict=True):
        b = b.T if name in transposed else b
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")

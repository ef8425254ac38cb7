"""AdaMSS over linear layers of other libraries: Conv1D of transformers, bitsandbytes' and torchao's quantised ones."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import warnings
import weakref

import pytest
import torch
from accuracy import naive, relative_error
from adapter_variants import IDS, VARIANTS, move, naive_update, update_parameters
from conftest import Problem, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adamss_kernels import (
    AdaMSSConfig,
    AdapterBank,
    BaseWeightWarning,
    FusedAdaMSSLinear,
    SubspaceAllocator,
    added_update,
    apply_adamss_kernels,
    export_lora,
    export_peft,
    inject_adamss,
    load_adapter,
    merge_and_unload,
    save_adapter,
)
from adamss_kernels.adapters import METHODS, inject_adapter
from adamss_kernels.adapters.spectrum import singular_window
from adamss_kernels.bases import dense, require_base
from adamss_kernels.formats import import_peft
from adamss_kernels.model import adamss_layers
from adamss_kernels.over_base import AdaMSSOverBase

D, N = 64, 96
QUANTISED = ["nf4", "nf4-plain", "fp4", "bnb-int8", "ao-int8", "ao-float8", "ao-dynamic"]
BASES = ["conv1d", *QUANTISED]
ROUNDS_X = {"ao-dynamic"}
"""Bases that quantise x, too, so that y is not x W^T."""

logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def make_base(which: str, dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0) -> nn.Module:
    """A base of the kind, made of the same plain layer each time."""
    torch.manual_seed(seed)
    linear = nn.Linear(D, N, bias=bias).to(dtype)
    if which == "linear":
        return linear
    if which == "conv1d":
        base = pytest.importorskip("transformers").pytorch_utils.Conv1D(N, D).to(dtype)
        base.weight.data.copy_(linear.weight.T)
        base.bias.data.copy_(linear.bias if bias else torch.zeros(N))
        return base
    if which.startswith("ao-"):
        quantization = pytest.importorskip("torchao.quantization")
        config = {
            "ao-int8": quantization.Int8WeightOnlyConfig,
            "ao-float8": quantization.Float8WeightOnlyConfig,
            "ao-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
        }[which]
        holder = nn.Sequential(linear)
        quantization.quantize_(holder, config(set_inductor_config=False))
        return holder[0]
    bnb = pytest.importorskip("bitsandbytes").nn
    if which == "bnb-int8":
        base = bnb.Linear8bitLt(D, N, bias=bias, has_fp16_weights=False)
    else:
        nested = not which.endswith("-plain")
        options = {"quant_type": which[:3], "compute_dtype": dtype, "compress_statistics": nested}
        base = bnb.Linear4bit(D, N, bias=bias, **options)
    base.to(dtype).load_state_dict(linear.state_dict())
    return base.to("cpu")


class Model(nn.Module):
    def __init__(self, which: str, dtype: torch.dtype = torch.float32, **options):
        super().__init__()
        self.block = nn.ModuleDict({"up": make_base(which, dtype, **options)})
        self.head = nn.Linear(N, 3).to(dtype)

    def forward(self, x):
        return self.head(torch.tanh(self.block["up"](x)))


class LiveBytes(TorchDispatchMode):
    """The bytes of what operators have made that is still alive, and the most that there were."""

    def __enter__(self):
        self.now = self.peak = 0
        self._known = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if type(tensor) in (torch.Tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, which, size):
        self._known.discard(which)
        self.now -= size


def config(**options) -> AdaMSSConfig:
    return AdaMSSConfig(**{"r": 12, "num_subspaces": 4, "subspace_rank": 2, "target_modules": ["up"]} | options)


def adapted(which: str, dtype: torch.dtype = torch.float32, *, bias: bool = True, **options) -> Model:
    return inject_adamss(Model(which, dtype, bias=bias), config(**options), progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", BASES)
def test_an_adapted_base_computes_at_first_what_the_base_does(which, dtype):
    model = Model(which, dtype)
    base = copy.deepcopy(model.block["up"])
    names, keys = [name for name, _ in base.named_parameters()], list(base.state_dict())
    inject_adamss(model, config(), progress=False)
    layer = model.block["up"]
    assert type(layer) is AdaMSSOverBase
    # With AVX-512's bfloat16 a 4-bit base packs its weight anew in eval mode and rounds it; an adapted one keeps it.
    base.support_avx512bf16_for_cpu = False
    for mode in (True, False):
        x = torch.randn(2, 5, D, dtype=dtype)
        assert torch.equal(layer.train(mode)(x), base.train(mode)(x))
    # The names are those of the base, and nothing is there twice.
    assert [name for name, _ in layer.named_parameters()] == [*names, "B", "C"]
    assert set(keys) <= set(layer.state_dict())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"block.up.B", "block.up.C"}
    for key, value in base.state_dict().items():
        found = layer.state_dict()[key]
        assert found is value or torch.equal(*(t.dequantize() if which.startswith("ao") else t for t in (found, value)))


@pytest.mark.parametrize("mode", ["projection", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", BASES)
def test_error_is_at_most_twice_plain_pytorchs_plus_one_rounding(which, dtype, mode):
    layer = randomise(adapted(which, dtype, save_for_backward=mode).block["up"])
    W, bias = layer.base_parameters()
    x = torch.randn(37, D).to(dtype).requires_grad_()
    dy = torch.randn(37, N).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dy)
    # The dequantised weight is exact; where it is wider than what the base computes in, it is rounded first.
    problem = Problem(x, W.to(dtype), bias, layer.basis, layer.basis_bias, layer.B, layer.C, layer.layout)
    exact, plain = problem.to(torch.float64), problem.to(dtype)
    exact.weight = W.double()
    y_exact, y_plain = naive(exact), naive(plain)
    if which in ROUNDS_X:
        of_base = layer.bare_base()(x.detach()).double() - x.detach().double() @ W.double().T - bias.double()
        y_exact, y_plain = y_exact + of_base, y_plain + of_base.to(dtype)
    y_exact.backward(dy.double())
    y_plain.backward(dy)
    unit = torch.finfo(dtype).eps / 2
    assert relative_error(y, y_exact) <= 2 * relative_error(y_plain, y_exact) + unit
    for name, got in (("x", x.grad), ("B", layer.B.grad), ("C", layer.C.grad)):
        want, base = (getattr(p, name).grad for p in (exact, plain))
        assert got.dtype == (dtype if name == "x" else torch.float32)
        assert relative_error(got, want) <= 2 * relative_error(base, want) + unit, name


@pytest.mark.parametrize("which", BASES)
def test_an_adapter_saved_over_a_base_loads_onto_it_and_onto_the_full_weight(which, tmp_path):
    model = adapted(which)
    randomise(model.block["up"])
    x = torch.randn(4, D)
    expected = model(x)
    save_adapter(model, tmp_path)
    fresh = Model(which)
    fresh.head.load_state_dict(model.head.state_dict())
    assert torch.equal(load_adapter(fresh, tmp_path)(x), expected)
    # Once more onto one that is adapted already, and onto the layer before it was quantised.
    assert torch.equal(load_adapter(fresh, tmp_path)(x), expected)
    plain = Model("linear")
    if which == "conv1d":
        load_adapter(plain, tmp_path)
    elif "4" in which:
        # Four bits are more than a rounding of 16.
        with pytest.raises(ValueError, match="block.up: the base weight differs from the one trained on by 0"):
            load_adapter(plain, tmp_path)
        with pytest.warns(BaseWeightWarning, match="block.up: the base weight differs"):
            load_adapter(plain, tmp_path, strict=False)
    else:
        with pytest.warns(BaseWeightWarning, match="block.up: the base weight differs .* as by rounding"):
            load_adapter(plain, tmp_path)
    assert type(plain.block["up"]) is FusedAdaMSSLinear
    assert torch.equal(plain.block["up"].delta_weight(), model.block["up"].delta_weight())


@pytest.mark.parametrize("which", BASES)
def test_a_state_dict_brings_base_and_update_back(which):
    model, other = adapted(which), adapted(which)
    randomise(model.block["up"])
    x = torch.randn(4, D)
    missing = other.load_state_dict(model.state_dict(), strict=which[:3] not in ("nf4", "fp4"))
    # bitsandbytes has no way back from these keys but transformers' own loading.
    assert all(key.startswith("block.up.weight.") for key in missing.unexpected_keys)
    torch.testing.assert_close(other(x), model(x))


@pytest.mark.parametrize("which", BASES)
def test_copies_are_independent(which):
    layer = randomise(adapted(which).block["up"]).eval()
    x = torch.randn(3, D)
    with torch.no_grad():
        expected = layer(x)
        copies = [copy.deepcopy(layer)]
        if which != "ao-float8":  # which torchao cannot pickle itself
            copies.append(pickle.loads(pickle.dumps(layer)))
        for copied in copies:
            assert torch.equal(copied(x), expected)
            assert copied.bare_base().weight is copied.weight is not layer.weight
            copied.C.mul_(2)
            copied.bias.data.add_(1)
            assert torch.equal(layer(x), expected)
            torch.testing.assert_close(copied(x) - 1 - layer.bare_base()(x), 2 * (expected - layer.bare_base()(x)))


@pytest.mark.parametrize("which", BASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_to_linear_is_the_dequantised_weight_plus_the_update(which, dtype):
    layer = randomise(adapted(which).block["up"])
    W, bias = layer.base_parameters()
    linear = layer.to_linear(dtype)
    assert type(linear) is nn.Linear and linear.weight.is_contiguous()
    assert torch.equal(linear.weight, (W + layer.delta_weight()).to(dtype or W.dtype))
    assert torch.equal(linear.bias, (bias + layer.delta_bias()).to(dtype or bias.dtype))


@pytest.mark.parametrize("which", QUANTISED)
def test_a_quantised_base_is_not_merged_and_says_what_can_be_done(which, tmp_path):
    model = adapted(which)
    layer = randomise(model.block["up"])
    x = torch.randn(5, D)
    with pytest.raises(TypeError, match=r"merge: .* quantised.*to_linear\(dtype\).*load_adapter.*export_lora"):
        layer.merge()
    assert not layer.merged
    exact = x.double() @ (layer.base_parameters()[0] + layer.delta_weight()).double().T
    expected = model.head(torch.tanh(exact.float() + layer.bias + layer.delta_bias()))
    export_lora(model, tmp_path)
    assert merge_and_unload(model, torch.float32) is model
    assert type(model.block["up"]) is nn.Linear
    torch.testing.assert_close(model(x), expected)


def test_a_conv1d_is_merged_and_stays_one():
    model = adapted("conv1d")
    layer, x = randomise(model.block["up"]), torch.randn(5, D)
    before, expected = layer.weight, layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert layer.weight.shape == (D, N)
    # The state dict is right for a plain model, and for an adapted one.
    plain, again = Model("conv1d"), adapted("conv1d")
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(plain.block["up"](x), expected)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.block["up"](x), expected)
    layer.unmerge()
    assert layer.weight is before
    merge_and_unload(model)
    assert type(model.block["up"]).__name__ == "Conv1D"
    torch.testing.assert_close(model.block["up"](x), expected)


@pytest.mark.parametrize("which", BASES)
def test_asa_prunes_over_a_base(which):
    options = {"use_asa": True, "asa_target_subspaces": 2, "init_warmup": 1, "final_warmup": 4, "mask_interval": 1}
    model = adapted(which, asa_mode="prune", **options)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    allocator = SubspaceAllocator(model, config(**options, asa_mode="prune"))
    allocator.attach(optimizer)
    x = torch.randn(8, D)
    for step in range(1, 6):
        model(x).square().sum().backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    layer = model.block["up"]
    assert int(layer.active.sum()) == 2
    torch.testing.assert_close(layer(x), layer.bare_base()(x) + x @ layer.delta_weight().T + layer.delta_bias())


@pytest.mark.parametrize("which", BASES)
def test_masks_hold_over_a_base(which):
    layer, x = randomise(adapted(which).block["up"]), torch.randn(6, D, requires_grad=True)
    layer.set_masks(trainable=torch.tensor([True, False, True, False]))
    layer(x).sum().backward()
    frozen = ~layer.trainable[layer.row_subspace.long()]
    assert layer.C.grad[frozen].abs().sum() == 0 < layer.C.grad[~frozen].abs().sum()
    layer.set_masks(active=torch.zeros(4, dtype=torch.bool))
    layer.B.grad = None
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, layer.bare_base()(x))
    assert torch.count_nonzero(layer.B.grad) == 0


# Conv1D always has a bias.
@pytest.mark.parametrize(
    ("which", "bias"),
    [("conv1d", True), *itertools.product(["nf4", "bnb-int8", "ao-int8", "ao-float8"], [True, False])],
)
def test_shapes_of_nn_linear_go_through(which, bias):
    layer = randomise(adapted(which, bias=bias).block["up"])
    W = layer.base_parameters()[0] + layer.delta_weight()
    b = layer.bias + layer.delta_bias() if bias else None
    for shape in ((D,), (1, D), (3, D), (2, 3, D), (2, 1, 3, D)):
        x = torch.randn(shape, requires_grad=True)
        # Not all bases take all shapes themselves.
        try:
            layer.bare_base()(x)
        except Exception:
            continue
        y = layer(x)
        torch.testing.assert_close(y, nn.functional.linear(x, W, b), rtol=1e-4, atol=1e-5)
        y.sum().backward()
        torch.testing.assert_close(x.grad, W.sum(0).expand(shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", BASES)
def test_autocast_gives_the_dtype_that_the_base_gives(which):
    layer, x = randomise(adapted(which).block["up"]), torch.randn(6, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == layer.bare_base()(x).dtype
    y.float().sum().backward()
    assert x.grad.dtype == layer.B.grad.dtype == torch.float32
    # What the base itself loses by autocast; it and the update are each rounded as often.
    exact, base = layer(x).double(), layer.bare_base()
    with torch.autocast("cpu", torch.bfloat16):
        of_base = base(x)
    lost = relative_error(of_base, base(x).double())
    assert relative_error(y, exact) <= 2 * lost + torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("which", ["nf4", "nf4-plain", "fp4"])
def test_four_bits_that_were_packed_for_inference_are_unpacked_for_training(which):
    functional = pytest.importorskip("bitsandbytes").functional
    model = Model(which)
    W, _ = dense(model.block["up"], require_base("up", model.block["up"]))
    # As a call in eval mode does on a CPU with AVX-512 for bfloat16. The scales are rounded to that.
    weight = model.block["up"].weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    inject_adamss(model, config(), progress=False)
    layer = model.eval().block["up"]
    x = torch.randn(3, D, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base_parameters()[0].float(), W, rtol=0.02, atol=0.002)
    torch.testing.assert_close(x.grad[0], layer.base_parameters()[0].sum(0))


def test_what_is_not_quantised_yet_or_anew_in_each_call_is_refused():
    bnb = pytest.importorskip("bitsandbytes").nn
    for base, message in (
        (bnb.Linear4bit(D, N), "the weight of 'up' is not quantised yet: move the model to its device first"),
        (bnb.Linear8bitLt(D, N, has_fp16_weights=False), "the weight of 'up' is not quantised yet"),
        (bnb.Linear8bitLt(D, N), "'up' is a Linear8bitLt that quantises its weight anew in each call"),
    ):
        model = nn.ModuleDict({"up": base})
        with pytest.raises(TypeError, match=message):
            inject_adamss(model, config(), progress=False)
        assert model["up"] is base


def test_a_backend_that_has_no_kernel_for_the_update_alone_is_refused():
    with pytest.raises(ValueError, match="backend: expected one of .*'cpu', .* over a transformers Conv1D.*'cuda'"):
        adapted("conv1d", backend="cuda")


@pytest.mark.parametrize("which", ["conv1d", "nf4", "bnb-int8", "ao-int8"])
def test_layers_of_a_model_that_names_none_are_found(which):
    model = Model(which)
    inject_adamss(model, config(target_modules=None), progress=False)
    assert set(adamss_layers(model)) == {"block.up", "head"}
    assert type(model.block["up"]) is AdaMSSOverBase


def test_a_failure_half_way_leaves_every_base_as_it_was():
    model = nn.ModuleDict({"up": make_base("nf4"), "other": nn.ModuleDict({"up": nn.Linear(4, 4)})})
    model["other"]["up"].weight.data[0, 0] = float("nan")
    base, keys = model["up"], list(model.state_dict())
    with pytest.raises(ValueError, match="other.up: expected finite values"):
        inject_adamss(model, config(), progress=False)
    assert model["up"] is base
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("which", QUANTISED)
def test_no_copy_of_the_weight_in_full_stays(which):
    layer = adapted(which).block["up"]
    held = (*layer.parameters(), *layer.buffers(), *layer.bare_base().parameters())
    plain = [t for t in held if type(t) in (nn.Parameter, torch.Tensor) and t.is_floating_point()]
    assert max(t.numel() for t in plain) < D * N
    assert layer.weight is layer.bare_base().weight
    W, _ = dense(layer.bare_base(), require_base("up", layer.bare_base()))
    assert W.shape == (N, D)


def test_gpt2_is_adapted_trained_saved_and_merged(tmp_path):
    transformers = pytest.importorskip("transformers")
    options = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    gpt2 = transformers.GPT2Config(**options, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(gpt2).eval()
    base, keys = copy.deepcopy(model), list(model.state_dict())
    inject_adamss(model, config(target_modules=["c_attn", "c_fc"]), progress=False)
    assert len(adamss_layers(model)) == 4
    ids = torch.randint(0, 64, (4, 12))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    with torch.no_grad():
        expected = model(ids).logits
        save_adapter(model, tmp_path / "adapter")
        assert torch.equal(load_adapter(base, tmp_path / "adapter")(ids).logits, expected)
        merge_and_unload(model).save_pretrained(tmp_path / "merged")
        assert list(model.state_dict()) == keys
        merged = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("which", BASES)
def test_a_compiled_model_computes_and_learns_the_same(which):
    layer = randomise(adapted(which).block["up"])
    x = torch.randn(5, D, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager")
    results = []
    for f in (layer, compiled):
        y = f(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.B, layer.C))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["conv1d", "nf4", "ao-float8"])
def test_gradients_of_gradients_go_through_base_and_update(which):
    layer = randomise(adapted(which, save_for_backward="input").block["up"])
    W, _ = layer.base_parameters()
    x = torch.randn(3, D, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    whole = W + layer.delta_weight()
    b = layer.bias + layer.delta_bias()
    exact = 2 * (x @ whole.T + b) @ whole
    torch.testing.assert_close(dx, exact, rtol=1e-3, atol=1e-3)
    (dB,) = torch.autograd.grad(dx.square().sum(), layer.B)
    B = layer.B.detach().clone().requires_grad_()
    subspaces = (layer.basis, layer.basis_bias, layer.row_subspace, layer.offsets)
    from adamss_kernels import differentiable
    from adamss_kernels.subspaces import Subspaces

    y = nn.functional.linear(x, W, layer.bias) + differentiable.update(x, B, layer.C.detach(), Subspaces(*subspaces))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(dx.square().sum(), B)
    torch.testing.assert_close(dB, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("which", BASES)
def test_rows_of_a_batch_take_their_own_adapters_over_a_base(which, tmp_path):
    alone = {}
    for seed, name in enumerate(("ann", "bob")):
        alone[name] = adapted(which)
        randomise(alone[name].block["up"], seed)
        save_adapter(alone[name], tmp_path / name)
    model = Model(which)
    keys, x = list(model.state_dict()), torch.randn(4, 3, D)
    expected = [alone["bob"](x), model(x), alone["ann"](x), alone["bob"](x)]
    bank = AdapterBank(model, {name: tmp_path / name for name in alone})
    assert list(model.state_dict()) == keys
    with bank.select(["bob", None, "ann", "bob"]):
        y = model(x)
        for row, want in enumerate(expected):
            torch.testing.assert_close(y[row], want[row], rtol=1e-4, atol=1e-5)
        y[0].square().sum().backward()
    B, C = bank.parameters("bob")
    alone["bob"](x)[0].square().sum().backward()
    torch.testing.assert_close(C.grad, alone["bob"].block["up"].C.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(B.grad, alone["bob"].block["up"].B.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(x), expected[1])
    bank.add("new", config())
    bank.save("bob", tmp_path / "again")
    assert torch.equal(load_adapter(Model(which), tmp_path / "again").block["up"].C, alone["bob"].block["up"].C)


@pytest.mark.parametrize("which", ["conv1d", "ao-int8"])
def test_pefts_format_refuses_bases_of_other_libraries_by_name(which, tmp_path):
    model = inject_adamss(Model(which), AdaMSSConfig(r=8, num_subspaces=3, target_modules=["up"]), progress=False)
    with pytest.raises(ValueError, match=r"block\.up: adapts a .*; use export_lora"):
        export_peft(model, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("which", ["nf4", "bnb-int8", "ao-int8"])
def test_initialisation_holds_one_dequantised_weight_at_a_time(which):
    """What is alive at the worst moment: what finished layers keep, and what one of them needs meanwhile."""
    kept, peak = {}, {}
    for count in (1, 4):
        model = nn.Sequential(*(make_base(which, bias=False) for _ in range(count)))
        with LiveBytes() as alive:
            inject_adamss(model, config(target_modules=None), progress=False)
        kept[count], peak[count] = alive.now, alive.peak
    of_three = kept[4] - kept[1]
    assert of_three / 3 < D * N * 4 < peak[1]
    assert peak[4] <= of_three + peak[1]


@pytest.mark.parametrize("which", BASES)
def test_stock_peft_makes_no_adamss_layer_over_such_bases(which):
    """So there is none that `apply_adamss_kernels` could meet."""
    peft = pytest.importorskip("peft")
    with pytest.raises((TypeError, RuntimeError, NotImplementedError, AttributeError)):
        peft.get_peft_model(Model(which), peft.AdamssConfig(r=8, num_subspaces=3, target_modules=["up"]))


def test_a_peft_layer_whose_base_is_quantised_later_goes_on_as_peft_computes_it():
    peft = pytest.importorskip("peft")
    quantization = pytest.importorskip("torchao.quantization")
    model = peft.get_peft_model(
        Model("linear"), peft.AdamssConfig(r=8, num_subspaces=3, init_weights=None, target_modules=["up"])
    )
    layer = model.base_model.model.block["up"]
    quantization.quantize_(
        layer, quantization.Int8WeightOnlyConfig(set_inductor_config=False), lambda _, name: name == "base_layer"
    )
    x = torch.randn(5, D)
    expected = layer(x)
    apply_adamss_kernels(model)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("which", ["conv1d", "nf4", "bnb-int8", "ao-int8"])
def test_an_adapter_of_peft_comes_onto_a_base_by_way_of_the_plain_one(which, tmp_path):
    of_peft = AdaMSSConfig(r=8, num_subspaces=3, target_modules=["up"])
    trained = inject_adamss(Model("linear"), of_peft, progress=False)
    delta = randomise(trained.block["up"]).delta_weight()
    export_peft(trained, tmp_path / "peft", progress=False)
    quantised = Model(which)
    before = quantised.block["up"]
    with pytest.raises(TypeError, match=r"block\.up: is a .*; the rows.*save_adapter, and load_adapter"):
        import_peft(quantised, tmp_path / "peft", progress=False)
    assert quantised.block["up"] is before
    save_adapter(import_peft(Model("linear"), tmp_path / "peft", progress=False), tmp_path / "ours")
    if which == "conv1d":
        load_adapter(quantised, tmp_path / "ours")
    else:
        with pytest.warns(BaseWeightWarning):
            load_adapter(quantised, tmp_path / "ours", strict=False)
    layer, x = quantised.block["up"], torch.randn(5, D)
    torch.testing.assert_close(layer.delta_weight(), delta)
    torch.testing.assert_close(layer(x), before(x) + x @ delta.T + layer.delta_bias())


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False", "ignore:TorchaoLoraLinear was instantiated")
@pytest.mark.parametrize("which", BASES)
def test_stock_peft_serves_an_exported_lora_over_the_base(which, tmp_path):
    peft = pytest.importorskip("peft")
    # Over torchao's layers PEFT's LoRA takes no update of the bias.
    model = adapted(which, bias=not which.startswith("ao-"))
    randomise(model.block["up"])
    export_lora(model, tmp_path)
    fresh = Model(which, bias=not which.startswith("ao-"))
    fresh.head.load_state_dict(model.head.state_dict())
    x = torch.randn(5, D)
    # In eval mode bitsandbytes would round a 4-bit weight of its own once more.
    served = peft.PeftModel.from_pretrained(fresh, tmp_path).train()
    torch.testing.assert_close(served(x), model.train()(x))


def related(which: str, method: str, dtype: torch.dtype = torch.float32, **options) -> Model:
    torch.manual_seed(1)
    return inject_adapter(Model(which, dtype), method, ["up"], progress=False, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_related_method_starts_as_the_base(method, which, dtype):
    base = Model(which, dtype).block["up"]
    names = [name for name, _ in base.named_parameters()]
    model = related(which, method, dtype)
    layer = model.block["up"]
    assert isinstance(layer, METHODS[method])
    assert {type(p) for p in update_parameters(layer).values()} == {nn.Parameter}
    assert {p.dtype for p in update_parameters(layer).values()} == {torch.float32}
    assert [name for name, _ in layer.named_parameters()] == [*names, *update_parameters(layer)]
    trains = {f"block.up.{name}" for name in update_parameters(layer)}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    base.support_avx512bf16_for_cpu = False
    for mode in (True, False):
        x = torch.randn(2, 5, D, dtype=dtype)
        y, expected = layer.train(mode)(x), base.train(mode)(x)
        # The rotational core is diag(S1) - diag(S1) only up to the rounding of S1, which x V1 multiplies.
        slack = 0 if method != "spectral_rotational" else 4 * torch.finfo(dtype).eps * expected.abs().max().item()
        torch.testing.assert_close(y, expected, rtol=0, atol=slack)
    y.float().square().sum().backward()
    assert any(p.grad.any() for p in update_parameters(layer).values()), "training can leave the start"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("which", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_related_methods_error_is_at_most_twice_plain_pytorchs_plus_one_rounding(method, which, dtype):
    layer = move(related(which, method, dtype).block["up"])
    W, bias = layer.base_parameters()
    x, dy = torch.randn(37, D).to(dtype).requires_grad_(), torch.randn(37, N).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.backward(dy)
    of_base = 0
    if which in ROUNDS_X:
        of_base = layer.bare_base()(x.detach()).double() - x.detach().double() @ W.double().T - bias.double()

    def formula(of_x: torch.dtype, of_update: torch.dtype) -> dict[str, torch.Tensor]:
        p = {n: t.detach().to(of_update).requires_grad_() for n, t in update_parameters(layer).items()}
        z = x.detach().to(of_x).requires_grad_()
        # The dequantised weight is exact; where it is wider than what the base computes in, it is rounded first.
        out = nn.functional.linear(z, W.to(of_x), bias.to(of_x))
        out = out + of_base + nn.functional.linear(z, naive_update(layer, p).to(of_x))
        out = out.to(of_x)
        out.backward(dy.to(of_x))
        return {"y": out, "x": z.grad} | {name: t.grad for name, t in p.items()}

    exact, plain = formula(torch.float64, torch.float64), formula(dtype, torch.float32)
    got = {"y": y, "x": x.grad} | {name: p.grad for name, p in update_parameters(layer).items()}
    of_plain = {name: relative_error(plain[name], want) for name, want in exact.items()}
    # Of the few numbers of some parameters the plain error may be small by luck: the method's worst counts.
    of_update = max(error for name, error in of_plain.items() if name not in "xy")
    for name, want in exact.items():
        assert got[name].dtype == (dtype if name in "xy" else torch.float32)
        error = of_plain[name] if name in "xy" else of_update
        assert relative_error(got[name], want) <= 2 * error + torch.finfo(dtype).eps / 2, name


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=IDS)
def test_a_related_method_over_a_base_is_its_formula_with_any_options(method, options):
    layer = move(related("conv1d", method, torch.float64, **options).block["up"])
    W, bias = layer.base_parameters()
    p = {name: t.detach().clone().requires_grad_() for name, t in update_parameters(layer).items()}
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    update = naive_update(layer, p)
    y, expected = layer(x), nn.functional.linear(z, W + update, bias)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.delta_weight(), update.detach(), rtol=1e-11, atol=1e-11)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for got, want in ((x, z), *((layer.get_parameter(name), t) for name, t in p.items())):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", BASES)
@pytest.mark.parametrize("method", ["spectral_additive", "spectral_rotational"])
def test_spectral_adapters_tune_singular_columns_of_the_dequantised_weight(method, which):
    layer = related(which, method, rank=5, window="bottom").block["up"]
    expected = singular_window(layer.base_parameters()[0], 5, "bottom")
    assert all(torch.equal(got, t) for got, t in zip((layer.U1, layer.S1, layer.V1), expected, strict=True))


@pytest.mark.parametrize("which", QUANTISED)
@pytest.mark.parametrize("method", METHODS)
def test_a_related_method_keeps_no_copy_of_the_weight_in_full(method, which):
    layer = related(which, method, **({"rank": 4, "num_bases": 3} if method == "randlora" else {})).block["up"]
    held = (*layer.parameters(), *layer.buffers(), *layer.bare_base().parameters())
    plain = [t for t in held if type(t) in (nn.Parameter, torch.Tensor) and t.is_floating_point()]
    assert max(t.numel() for t in plain) < D * N
    assert layer.weight is layer.bare_base().weight


@pytest.mark.parametrize("which", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_a_related_method_loads_onto_the_base_and_onto_the_full_weight(method, which, tmp_path):
    model = related(which, method)
    delta, x = move(model.block["up"]).delta_weight(), torch.randn(4, D)
    expected = model(x)
    save_adapter(model, tmp_path)
    fresh = Model(which)
    fresh.head.load_state_dict(model.head.state_dict())
    # The second time onto one that is adapted already.
    for _ in range(2):
        assert torch.equal(load_adapter(fresh, tmp_path)(x), expected)
        assert type(fresh.block["up"]) is type(model.block["up"])
        assert all(p.requires_grad for p in update_parameters(fresh.block["up"]).values())
    plain = Model("linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseWeightWarning)
        load_adapter(plain, tmp_path, strict=False)
    assert type(plain.block["up"]) is METHODS[method]
    assert torch.equal(plain.block["up"].delta_weight(), delta)
    # And the other way, as a model is quantised for serving.
    save_adapter(plain, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BaseWeightWarning)
        assert torch.equal(load_adapter(Model(which), tmp_path, strict=False).block["up"].delta_weight(), delta)


@pytest.mark.parametrize("which", ["conv1d", "nf4", "bnb-int8", "ao-int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_related_method_becomes_a_plain_layer_of_the_dequantised_weight(method, which):
    model = related(which, method)
    layer, x = move(model.block["up"]), torch.randn(5, D)
    W, bias = layer.base_parameters()
    for dtype in (None, torch.bfloat16):
        linear = layer.to_linear(dtype)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, (W + layer.delta_weight()).to(dtype or W.dtype))
        assert torch.equal(linear.bias, bias.to(dtype or bias.dtype))
    expected = model(x)
    if which == "conv1d":
        layer.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        layer.unmerge()
        assert torch.equal(model(x), expected)
    else:
        with pytest.raises(TypeError, match=r"merge: .* quantised.*to_linear\(dtype\).*in full precision$"):
            layer.merge()
    merge_and_unload(model, torch.float32)
    assert type(model.block["up"]).__name__ == ("Conv1D" if which == "conv1d" else "Linear")
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("which", ["conv1d", "nf4", "bnb-int8", "ao-int8"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_of_a_related_method_are_copied_and_their_state_is_loaded(method, which):
    model, x = related(which, method), torch.randn(5, D)
    layer = move(model.block["up"])
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
        for p in update_parameters(copied).values():
            p.data.zero_()
        assert torch.equal(layer(x), expected)
    other = related(which, method)
    other.load_state_dict(model.state_dict(), strict=which != "nf4")
    torch.testing.assert_close(other.block["up"](x), expected)


@pytest.mark.parametrize("which", ["conv1d", "nf4", "bnb-int8", "ao-int8"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast_over_a_base_loses_no_more_of_a_related_method_than_of_the_base(method, which):
    layer, x = move(related(which, method).block["up"]), torch.randn(6, D, requires_grad=True)
    exact, base = layer(x).double(), layer.bare_base()
    with torch.autocast("cpu", torch.bfloat16):
        y, of_base = layer(x), base(x)
        assert y.dtype == of_base.dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in update_parameters(layer).values())
    # x, a factor or a tile, S and the sum are each rounded once to the base's dtype.
    lost = relative_error(of_base, base(x).double())
    delta = (x.double() @ layer.delta_weight().double().T).norm() / exact.norm()
    rounding = torch.finfo(of_base.dtype).eps / 2
    assert relative_error(y, exact) <= 2 * lost * (base(x).norm() / exact.norm()) + 4 * rounding * max(1, delta)


@pytest.mark.parametrize("which", ["nf4", "bnb-int8", "ao-int8"])
@pytest.mark.parametrize("method", METHODS)
def test_shapes_of_nn_linear_go_through_a_related_method_over_a_base_without_bias(method, which):
    model = inject_adapter(Model(which, bias=False), method, ["up"], progress=False)
    layer = move(model.block["up"])
    whole = layer.base_parameters()[0] + layer.delta_weight()
    for shape in ((1, D), (3, D), (2, 3, D), (2, 1, 3, D)):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, x @ whole.T, rtol=1e-4, atol=1e-4)
        y.sum().backward()
        torch.testing.assert_close(x.grad, whole.sum(0).expand(shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["conv1d", "nf4", "ao-float8"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_gradients_of_a_related_method_over_a_base_are_right_or_refused(method, which):
    layer = move(related(which, method).block["up"])
    W, bias = layer.base_parameters()
    x = torch.randn(3, D, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    parameters = update_parameters(layer)
    if method in ("sinlora", "randlora", "kronecker", "kradapter"):
        with pytest.raises(RuntimeError, match="once_differentiable|twice"):
            dx.square().sum().backward()
        return
    got = torch.autograd.grad(dx.square().sum(), list(parameters.values()))
    p = {name: t.detach().double().requires_grad_() for name, t in parameters.items()}
    z, whole = x.detach().double().requires_grad_(), W.double() + naive_update(layer, p)
    y = nn.functional.linear(z, whole, bias.double())
    (dz,) = torch.autograd.grad(y.square().sum(), z, create_graph=True)
    for found, want in zip(got, torch.autograd.grad(dz.square().sum(), list(p.values())), strict=True):
        assert relative_error(found, want) < 1e-4


def test_shapes_of_a_related_method_over_a_base_without_values_are_set_up(tmp_path):
    for method in METHODS:
        with torch.device("meta"):
            model, fresh = nn.ModuleDict({"up": make_base("conv1d")}), nn.ModuleDict({"up": make_base("conv1d")})
        source = related("conv1d", method).block
        move(source["up"])
        inject_adapter(model, method, ["up"], progress=False)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        model.to_empty(device="cpu").load_state_dict(source.state_dict())
        x = torch.randn(3, D)
        torch.testing.assert_close(model["up"](x), source["up"](x))
        save_adapter(source, tmp_path)
        with pytest.warns(UserWarning, match="only shapes are set up"):
            load_adapter(fresh, tmp_path)
        assert fresh["up"].weight.is_meta


@pytest.mark.slow
@pytest.mark.parametrize("which", ["conv1d", "nf4", "bnb-int8", "ao-int8"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_layer_of_a_related_method_computes_and_learns_the_same(method, which):
    torch._dynamo.reset()
    layer = move(related(which, method).block["up"])
    x = torch.randn(5, D, requires_grad=True)
    leaves, results = (x, *update_parameters(layer).values()), []
    for f in (layer, torch.compile(layer, backend="aot_eager")):
        y = f(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for got, want in zip(results[1], results[0], strict=True):
        assert relative_error(got, want.double()) < 1e-4


def test_a_related_method_names_the_base_that_cannot_be_adapted_and_the_option_that_is_wrong():
    bnb = pytest.importorskip("bitsandbytes").nn
    with pytest.raises(TypeError, match="the weight of 'up' is not quantised yet"):
        inject_adapter(nn.ModuleDict({"up": bnb.Linear4bit(D, N)}), "lora", ["up"], progress=False)
    model = Model("nf4")
    before = model.block["up"]
    with pytest.raises(ValueError, match=r"^block\.up: rank: expected an integer >= 1, got 0"):
        inject_adapter(model, "lora", ["up"], rank=0, progress=False)
    assert model.block["up"] is before


def test_a_bank_over_a_base_runs_the_backend_of_its_config(monkeypatch):
    model = Model("conv1d")
    bank = AdapterBank(model)
    bank.add("ann", config(backend="reference"))
    chosen = []
    monkeypatch.setattr(added_update, "choose_backend", lambda name, *_: chosen.append(name) or name)
    with bank.select(["ann"]):
        model(torch.randn(1, D))
    assert chosen == ["reference"]

"""A PEFT model runs through the fused kernels and stays a PEFT model in every other way."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from accuracy import relative_error
from torch import nn
from torch.nn.utils import parametrize, prune

from adamss_kernels import apply_adamss_kernels, revert_adamss_kernels

peft = pytest.importorskip("peft")
from peft.tuners.adamss.layer import Linear as PeftLinear  # noqa: E402
from peft.tuners.adamss.model import AdamssModel  # noqa: E402

from adamss_kernels.integrations.peft import FusedPeftLinear, FusedPeftModel, _require_known_peft  # noqa: E402

WIDTH = 24


class Model(nn.Module):
    """Two blocks and a head, with and without biases; `tied` shares the embedding's weight."""

    def __init__(self, base: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.embed = nn.Embedding(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"query": base(WIDTH, 32), "value": base(WIDTH, 32, bias=False), "dense": base(32, WIDTH)})
            for _ in range(2)
        )
        self.tied = base(WIDTH, WIDTH, bias=False)
        self.tied.weight = self.embed.weight
        self.classifier = nn.Linear(WIDTH, 4)
        self.checkpointing = False

    def block(self, x, block):
        return x + block["dense"](torch.tanh(block["query"](x)) * block["value"](x))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            if self.checkpointing:
                x = torch.utils.checkpoint.checkpoint(self.block, x, block, use_reentrant=False)
            else:
                x = self.block(x, block)
        return self.classifier(self.tied(x).mean(-2))


class Quantised(torch.Tensor):
    """A weight that computes in its own way, as quantisation libraries make it."""


def base(seed: int = 0, kind: type[nn.Linear] = nn.Linear) -> Model:
    torch.manual_seed(seed)
    return Model(kind)


def config(**options):
    defaults = {"r": 8, "num_subspaces": 4, "subspace_rank": 2, "target_modules": ["query", "value", "dense"]}
    return peft.AdamssConfig(**defaults | options)


def randomise(model: nn.Module, adapter: str = "default", seed: int = 0) -> nn.Module:
    """Give the adapter an effect, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"adamss_B.{adapter}" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def stock(kind: type[nn.Linear] = nn.Linear, **options):
    return randomise(peft.get_peft_model(base(kind=kind), config(**options)))


def pair(**options):
    """A stock model and an equal fused one."""
    model = stock(**options)
    return model, apply_adamss_kernels(copy.deepcopy(model))


def ids(seed: int = 0, batch: int = 8) -> torch.Tensor:
    return torch.randint(0, WIDTH, (batch, 7), generator=torch.Generator().manual_seed(seed))


def fused_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is FusedPeftLinear]


def assert_same_function(model: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    """Outputs and the gradients of all parameters agree."""
    losses = []
    for m in (model, other):
        m.zero_grad()
        losses.append(m(ids()))
        losses[-1].square().sum().backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    for (name, p), (other_name, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert (name, p.requires_grad) == (other_name, q.requires_grad)
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            # Relative to the whole gradient: single entries may cancel.
            assert (p.grad - q.grad).norm() <= 10 * tolerance * p.grad.norm() + tolerance**2, name


RANKS = [
    {"subspace_rank": 1},
    {"subspace_rank": 3},
    {"subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.7},
]


@pytest.mark.parametrize("options", [*RANKS, {"num_subspaces": 1}, {"modules_to_save": ["classifier"]}])
def test_outputs_gradients_names_and_parameters_are_those_of_stock_peft(options):
    model = stock(**options)
    expected = copy.deepcopy(model)
    before = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    assert apply_adamss_kernels(model) is model
    assert len(fused_layers(model)) == 6
    assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == before
    assert list(model.state_dict()) == list(expected.state_dict())
    assert_same_function(expected, model)


def test_dynamic_ranks_are_ragged_here():
    layer = stock(**RANKS[-1]).base_model.model.blocks[0]["query"]
    assert len({A.shape[0] for A in layer.adamss_A["default"]}) > 1


@pytest.mark.parametrize("options", RANKS)
def test_a_checkpoint_goes_either_way_with_difference_zero(options, tmp_path):
    plain, fused = pair(**options, modules_to_save=["classifier"])
    fused.save_pretrained(tmp_path / "ours")
    plain.save_pretrained(tmp_path / "theirs")
    in_stock = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    in_fused = apply_adamss_kernels(peft.get_peft_model(base(), config(**options, modules_to_save=["classifier"])))
    in_fused.load_adapter(tmp_path / "theirs", "default")
    reloaded = apply_adamss_kernels(peft.PeftModel.from_pretrained(base(), tmp_path / "theirs"))
    for model in (in_stock, in_fused, reloaded):
        assert model.state_dict().keys() == plain.state_dict().keys()
        for name, tensor in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name
    torch.testing.assert_close(in_stock(ids()), plain(ids()), rtol=0, atol=0)
    torch.testing.assert_close(in_fused(ids()), fused(ids()), rtol=0, atol=0)
    torch.testing.assert_close(reloaded(ids()), fused(ids()), rtol=0, atol=0)


ASA = {"use_asa": True, "asa_target_subspaces": 6, "init_warmup": 3, "final_warmup": 40, "mask_interval": 5}


def train(model: nn.Module, steps: range) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)
    losses = []
    for step in steps:
        x = ids(step)
        loss = nn.functional.cross_entropy(model(x), x[:, 0] % 4)
        loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def frozen(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("asa", [{}, ASA], ids=["plain", "asa"])
@pytest.mark.parametrize("rank", RANKS, ids=["1", "3", "dynamic"])
def test_sixty_steps_of_training_follow_stock_peft(asa, rank):
    plain, fused = pair(**rank, **asa, modules_to_save=["classifier"])
    expected, got = train(plain, range(1, 61)), train(fused, range(1, 61))
    assert expected[-1] < expected[0]
    assert max(abs(a - b) / a for a, b in zip(expected, got, strict=True)) <= 1e-4
    assert frozen(fused) == frozen(plain)
    if asa:
        active = sum(
            A.requires_grad for name in fused_layers(fused) for A in fused.get_submodule(name).adamss_A["default"]
        )
        assert active == 5  # PEFT keeps one fewer than the target.


def test_exact_budgets_are_there_for_the_asking():
    model = apply_adamss_kernels(stock(**ASA | {"final_warmup": 33}), asa_compat=None)
    train(model, range(1, 41))
    layers = [model.get_submodule(name) for name in fused_layers(model)]
    assert sum(A.requires_grad for layer in layers for A in layer.adamss_A["default"]) == 6


def test_averages_stay_in_pefts_lists_when_gradients_come_and_go():
    plain, fused = pair(**ASA)
    for model in (plain, fused):
        train(model, range(1, 10))
        # A subspace frozen between events keeps its averages, as in PEFT.
        layer = model.base_model.model.blocks[0]["query"]
        layer.adamss_A["default"][1].requires_grad_(False)
        layer.adamss_B["default"][1].requires_grad_(False)
        train(model, range(11, 15))
    assert frozen(fused) == frozen(plain)
    of_fused = dict(fused.named_modules())
    for name, a in plain.named_modules():
        b = of_fused[name]
        if isinstance(a, PeftLinear):
            for kind in ("exp_avg_ipt_A", "exp_avg_unc_A", "exp_avg_ipt_B", "exp_avg_unc_B"):
                for mine, theirs in zip(getattr(b, kind)["default"], getattr(a, kind)["default"], strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-9, msg=name)


def test_revert_gives_the_same_types_back_and_leaves_nothing():
    plain, fused = pair(**ASA)
    for model in (plain, fused):
        train(model, range(1, 19))
    assert type(fused.base_model) is FusedPeftModel
    assert revert_adamss_kernels(fused) is fused
    for (name, a), (other, b) in zip(plain.named_modules(), fused.named_modules(), strict=True):
        assert (name, type(a), list(a.__dict__)) == (other, type(b), list(b.__dict__))
        assert len(a._load_state_dict_post_hooks) == len(b._load_state_dict_post_hooks)
    # The run goes on from the same averages.
    for model in (plain, fused):
        train(model, range(19, 41))
    assert frozen(fused) == frozen(plain)
    assert_same_function(plain, fused, 1e-4)


def test_applying_twice_changes_nothing_more():
    _, model = pair()
    modules = [(name, type(module)) for name, module in model.named_modules()]
    apply_adamss_kernels(model, backend="reference")
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert {model.get_submodule(name).backend for name in fused_layers(model)} == {"reference"}


def test_disabling_merging_and_unmerging_are_as_before():
    plain, fused = pair()
    weight = fused.base_model.model.blocks[0]["query"].base_layer.weight.clone()
    expected = fused(ids())
    with plain.disable_adapter(), fused.disable_adapter():
        assert torch.equal(plain(ids()), fused(ids()))
    for model in (plain, fused):
        model.merge_adapter()
    assert torch.equal(plain(ids()), fused(ids()))
    assert not torch.equal(weight, fused.base_model.model.blocks[0]["query"].base_layer.weight)
    for model in (plain, fused):
        model.unmerge_adapter()
    torch.testing.assert_close(fused(ids()), expected, rtol=1e-5, atol=1e-5)
    merged = [copy.deepcopy(model).merge_and_unload() for model in (plain, fused)]
    assert torch.equal(merged[0](ids()), merged[1](ids()))
    assert [type(m) for m in merged[0].modules()] == [type(m) for m in merged[1].modules()]


@pytest.mark.parametrize(
    "other", [{}, {"r": 5, "num_subspaces": 3, "subspace_rank": 1}, {"target_modules": ["query", "tied"]}]
)
def test_several_adapters_add_up_and_switch_as_before(other):
    plain, fused = pair()
    for model in (plain, fused):
        torch.manual_seed(1)  # PEFT draws the initial directions from the global generator.
        model.add_adapter("second", config(**other))
        randomise(model, "second", seed=1)
    for name in fused_layers(fused):
        assert set(fused.get_submodule(name).adamss_index) == set(fused.get_submodule(name).adamss_A)
    assert not [name for name, m in fused.named_modules() if type(m) is PeftLinear]
    for active in ("second", "default", ["default", "second"], ["second", "default"]):
        for model in (plain, fused):
            model.base_model.set_adapter(active)
        assert_same_function(plain, fused)
    for model in (plain, fused):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.delete_adapter("default")
    assert_same_function(plain, fused)
    assert all("default" not in fused.get_submodule(name).adamss_index for name in fused_layers(fused))
    assert list(fused.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_equal(copied):
    _, model = pair(**ASA)
    train(model, range(1, 8))
    twin = copied(model)
    assert_same_function(model, twin, 1e-7)
    train(model, range(8, 12))
    unchanged = copied(twin)
    train(twin, range(8, 12))
    assert frozen(twin) == frozen(model)
    assert_same_function(model, twin, 1e-6)
    assert frozen(unchanged) != frozen(twin)


def test_it_follows_a_change_of_dtype():
    # Stock PEFT does not: it goes on casting its input to the dtype of the beginning.
    plain, fused = pair()
    expected = plain(ids()).double()
    assert fused.double()(ids()).dtype == torch.float64
    torch.testing.assert_close(fused(ids()), expected, rtol=1e-5, atol=1e-5)
    low = fused.to(torch.bfloat16)
    assert low(ids()).dtype == torch.bfloat16
    rounded = plain.merge_and_unload().to(torch.bfloat16)
    allowed = 2 * relative_error(rounded(ids()), expected) + torch.finfo(torch.bfloat16).eps
    assert relative_error(low(ids()), expected) <= allowed


def test_it_follows_a_change_of_device_with_its_index():
    _, fused = pair()
    meta = copy.deepcopy(fused).to("meta")
    layer = meta.base_model.model.blocks[0]["query"]
    assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}
    assert meta(ids().to("meta")).shape == (8, 4)


def test_autocast_gives_what_stock_peft_gives():
    plain, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = plain(ids()), fused(ids())
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, fused = pair()
    fused.base_model.model.checkpointing = True
    assert_same_function(plain, fused)


def test_it_compiles_in_one_graph_with_frozen_subspaces():
    plain, fused = pair()
    for model in (plain, fused):
        model.base_model.model.blocks[0]["query"].adamss_A["default"][0].requires_grad_(False)
        model.base_model.model.blocks[0]["query"].adamss_B["default"][0].requires_grad_(False)
    compiled = torch.compile(fused.base_model.model, fullgraph=True, backend="aot_eager")
    expected = plain(ids())
    got = compiled(ids())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    expected.square().sum().backward()
    got.square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_layer_whose_base_does_more_than_a_linear_computes_what_stock_peft_computes():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain = stock(Doubled)
    fused = apply_adamss_kernels(copy.deepcopy(plain))
    assert torch.equal(plain(ids()), fused(ids()))
    plain, fused = pair()
    for model in (plain, fused):
        model.base_model.model.blocks[0]["query"].base_layer.register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(fused(ids()), plain(ids()), rtol=1e-5, atol=1e-5)
    plain, fused = pair()
    for model in (plain, fused):
        layer = model.base_model.model.blocks[0]["query"].base_layer
        layer.weight = nn.Parameter(layer.weight.data.as_subclass(Quantised))
    assert torch.equal(
        fused.base_model.model.blocks[0]["query"](x := torch.randn(3, WIDTH)),
        plain.base_model.model.blocks[0]["query"](x),
    )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "compute",
    [
        lambda base: prune.l1_unstructured(base, "weight", 0.5),
        lambda base: prune.l1_unstructured(base, "bias", 0.5),
        lambda base: parametrize.register_parametrization(base, "weight", nn.Tanh()),
    ],
    ids=["pruned weight", "pruned bias", "parametrised weight"],
)
def test_a_layer_whose_base_computes_its_weight_computes_what_stock_peft_computes(compute, when):
    plain = randomise(stock())
    fused = copy.deepcopy(plain)
    if when == "after":
        apply_adamss_kernels(fused)
    for model in (plain, fused):
        compute(model.base_model.model.blocks[0]["query"].base_layer)
    apply_adamss_kernels(fused)
    torch.testing.assert_close(fused(ids()), plain(ids()), rtol=1e-5, atol=1e-5)
    for model in (plain, fused):
        model(ids()).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "edit",
    [
        lambda layer: layer.adamss_newB["default"].mul_(2),
        lambda layer: layer.adamss_newB["default"][:, -1].fill_(3),
        lambda layer: layer.adamss_newB.update({"default": layer.adamss_newB["default"] * 2}),
        lambda layer: layer.double().float().adamss_newB["default"].mul_(2),
    ],
    ids=["in place", "its last column", "replaced", "after a cast"],
)
def test_a_basis_that_is_changed_is_the_one_of_the_next_call(edit):
    plain, fused = (model.base_model.model.blocks[0]["query"] for model in map(randomise, pair()))
    x = torch.randn(3, WIDTH)
    y = fused(x)
    edit(fused)
    # A copy counts its versions anew, and may arrive at the number that was remembered.
    copied = copy.deepcopy(fused)
    edit(plain)
    assert not torch.allclose(plain(x), y)
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(copied(x), plain(x))


@pytest.mark.parametrize(
    ("name", "target"),
    [("conv", nn.Conv1d(4, 4, 1)), ("table", nn.ModuleDict({"a": nn.Linear(4, 4)}))],
)
def test_peft_itself_refuses_targets_that_are_no_linear_layer(name, target):
    with pytest.raises((TypeError, ValueError), match=f"(?i)target module.*{type(target).__name__}"):
        peft.get_peft_model(nn.ModuleDict({name: target}), config(target_modules=[name]))


def test_a_tied_weight_stays_tied():
    plain, fused = pair(target_modules=["tied"])
    assert fused.base_model.model.tied.weight is fused.base_model.model.embed.weight
    assert_same_function(plain, fused)


def save_with_rows_exchanged_between_bases(folder):
    """A checkpoint, and a rounding of its base on which PEFT rebuilds another row assignment."""
    torch.manual_seed(3)
    linears = [nn.Linear(96, 128) for _ in range(2)]
    options = {"r": 32, "num_subspaces": 10, "subspace_rank": 1, "target_modules": ["0", "1"]}
    make = lambda: nn.Sequential(*[copy.deepcopy(linear) for linear in linears])[:1]  # noqa: E731
    trained = randomise(peft.get_peft_model(make(), peft.AdamssConfig(**options)))
    trained.save_pretrained(folder)
    rounded = make().to(torch.bfloat16).float()
    return trained, rounded, options


def test_an_adapter_on_a_rounded_base_is_an_error_that_names_the_layer(tmp_path):
    trained, rounded, options = save_with_rows_exchanged_between_bases(tmp_path)
    silent = peft.PeftModel.from_pretrained(copy.deepcopy(rounded), tmp_path)
    deltas = [model.base_model.model[0].get_delta_weight("default") for model in (trained, silent)]
    assert (deltas[0] - deltas[1]).norm() > 0.3 * deltas[0].norm()  # What PEFT does, without a word.

    message = re.escape("base_model.model.0: subspace ") + r"\d of adapter 'default' was trained on \d+ rows, but PEFT"
    with pytest.raises(ValueError, match=message):
        apply_adamss_kernels(silent)
    assert type(silent.base_model.model[0]) is PeftLinear
    fused = apply_adamss_kernels(peft.get_peft_model(copy.deepcopy(rounded), peft.AdamssConfig(**options)))
    with pytest.raises(ValueError, match=message):
        fused.load_adapter(tmp_path, "default")


def test_what_is_not_pefts_adamss_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="model: has no AdaMSS layer of PEFT"):
        apply_adamss_kernels(base())
    with pytest.raises(ValueError, match="asa_compat: expected 'peft' or None, got 'exact'"):
        apply_adamss_kernels(stock(), asa_compat="exact")
    with pytest.raises(ValueError, match="backend: expected 'auto' or one of .*, got 'fast'"):
        apply_adamss_kernels(stock(), backend="fast")

    class Other(PeftLinear):
        pass

    model = stock()
    model.base_model.model.blocks[1]["value"].__class__ = Other
    with pytest.raises(TypeError, match=r"blocks\.1\.value: expected an AdaMSS layer of PEFT itself, got its subclass"):
        apply_adamss_kernels(model)
    assert type(model.base_model) is AdamssModel
    assert not fused_layers(model)


def test_an_unknown_release_is_accepted_while_its_layers_look_the_same(monkeypatch, caplog):
    monkeypatch.setattr(peft, "__version__", "0.99.0.dev0")
    _require_known_peft()
    assert "0.99.0.dev0" in caplog.text
    monkeypatch.setattr(PeftLinear, "other_param_names", ("num_subspaces",))
    with pytest.raises(
        ImportError, match=r"peft 0\.99\.0\.dev0: its AdaMSS layer differs \(exp_avg_ipt_A.*expected peft 0\.19"
    ):
        apply_adamss_kernels(stock())

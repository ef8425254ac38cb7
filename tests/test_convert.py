"""`adamss-kernels convert`: every allowed way between formats keeps the outputs; every other one says why not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import randomise
from safetensors.torch import load_file

from adamss_kernels import AdaMSSConfig, inject_adamss, save_adapter
from adamss_kernels.adapters import inject_adapter
from adamss_kernels.cli import main
from adamss_kernels.model import adamss_layers, adapted_layers

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

CONFIG = AdaMSSConfig(
    r=8, num_subspaces=3, subspace_rank=2, target_modules=["query", "value"], modules_to_save=["classifier"]
)
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a tiny BERT classifier."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=16, num_labels=3)
    folder = tmp_path_factory.mktemp("base")
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """The folder of a trained-looking adapter in our format."""
    model = inject_adamss(load(base), CONFIG, progress=False)
    for seed, layer in enumerate(adamss_layers(model).values()):
        randomise(layer, seed).C.data.mul_(20)
    model.classifier.weight.data.add_(torch.randn(3, 24))
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder)
    (folder / "logits.txt").write_text(" ".join(map(str, logits(model).flatten().tolist())))
    return folder


def load(folder):
    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=torch.arange(32).reshape(2, 16) % 40).logits


def convert(base, adapter, to, out, *options):
    return main(["convert", "--base", str(base), "--adapter", str(adapter), "--to", to, "--out", str(out), *options])


def expected(adapter):
    return torch.tensor([float(word) for word in (adapter / "logits.txt").read_text().split()]).reshape(2, 3)


@pytest.mark.parametrize(
    "route", [("lora",), ("peft",), ("merged",), ("peft", "adamss", "lora"), ("lora", "merged")], ids=">".join
)
def test_a_route_through_formats_keeps_the_outputs(route, base, adapter, tmp_path):
    source = adapter
    for number, to in enumerate(route):
        assert convert(base, source, to, tmp_path / str(number)) == 0
        source = tmp_path / str(number)
    model = load(source) if route[-1] == "merged" else peft.PeftModel.from_pretrained(load(base), source)
    assert (logits(model) - expected(adapter)).abs().max() <= TOLERANCE
    assert (logits(load(base)) - expected(adapter)).abs().max() > 0.1


def test_an_adapter_of_a_related_method_is_merged(base, tmp_path):
    model = inject_adapter(load(base), "kradapter", ["query", "value"], progress=False)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.u, std=10)
    save_adapter(model, tmp_path / "ours")
    assert convert(base, tmp_path / "ours", "merged", tmp_path / "merged") == 0
    torch.testing.assert_close(logits(load(tmp_path / "merged")), logits(model), atol=TOLERANCE, rtol=TOLERANCE)
    assert (logits(model) - logits(load(base))).abs().max() > 100 * TOLERANCE


def test_ours_through_peft_and_back_is_the_same_file_but_for_what_peft_does_not_store(base, adapter, tmp_path):
    assert convert(base, adapter, "peft", tmp_path / "peft") == 0
    assert convert(base, tmp_path / "peft", "adamss", tmp_path / "back") == 0
    before, after = (load_file(path / "adapter.safetensors") for path in (adapter, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("to", ["adamss", "peft", "lora", "merged"])
def test_a_dry_run_lists_exactly_what_is_then_written(to, base, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(base, adapter, to, out, "--dry-run") == 0
    assert not out.exists()
    dry = capsys.readouterr().out.splitlines()
    assert dry.pop() == "nothing was written"
    assert convert(base, adapter, to, out) == 0
    for path in out.iterdir():
        assert f"{path.name}  {path.stat().st_size:,} bytes" in dry
        dry.remove(f"{path.name}  {path.stat().st_size:,} bytes")
        for name, tensor in load_file(path).items() if path.suffix == ".safetensors" else ():
            dtype = str(tensor.dtype).removeprefix("torch.")
            dry.remove(f"  {name}  {dtype} {tuple(tensor.shape)}  {tensor.nbytes:,} bytes")
    assert not dry
    assert [path for path in tmp_path.iterdir() if path != out] == []
    assert (out / "vocab.txt").exists() == (to == "merged")


def test_an_output_is_replaced_only_by_force_and_only_if_it_is_one(base, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    assert convert(base, adapter, "lora", out) == 0
    assert convert(base, adapter, "peft", out) == 1
    assert "exists already; --force replaces it" in capsys.readouterr().err
    assert convert(base, adapter, "peft", out, "--force") == 0
    assert "adamss_A" in next(iter(k for k in load_file(out / "adapter_model.safetensors") if "adamss" in k))
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("dear")
    assert convert(base, adapter, "lora", tmp_path / "thesis", "--force") == 1
    assert "is not an earlier output" in capsys.readouterr().err
    assert convert(base, adapter, "lora", adapter, "--force") == 1
    assert "holds what is to be converted" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "thesis"]


def test_a_failure_while_writing_leaves_the_earlier_output_whole(base, adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert convert(base, adapter, "lora", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert convert(base, adapter, "peft", out, "--force") == 1
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


def test_what_cannot_be_converted_is_refused_with_the_reason(base, adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(base, adapter, "lora", tmp_path / "lora") == 0
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    capsys.readouterr()
    for source, to, options, message in (
        (tmp_path / "lora", "adamss", (), "--to adamss: a lora adapter can only become merged"),
        (tmp_path / "empty", "peft", (), "has neither adapter.safetensors nor adapter_config.json"),
        (tmp_path / "other", "peft", (), "holds a PEFT adapter of type 'IA3'"),
        (adapter, "peft", ("--no-bias",), "--no-bias: has a meaning for --to lora only"),
        (adapter, "peft", ("--model-class", "Nonsense"), "transformers has no model class 'Nonsense'"),
        (adapter, "peft", ("--model-class", "BertModel"), "which this model does not have"),
    ):
        assert convert(base, source, to, out, *options) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_without_transformers_the_error_says_what_to_install(base, adapter, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert convert(base, adapter, "lora", tmp_path / "out") == 1
    assert "pip install 'adamss-kernels[hf]'" in capsys.readouterr().err


def test_a_merged_head_is_not_tied_to_the_embedding_again(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "n_positions": 16, "n_embd": 24, "n_layer": 1, "n_head": 2}
    folder, out = tmp_path / "base", tmp_path / "out"
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(
        folder
    )
    model = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    inject_adamss(model, dataclasses.replace(CONFIG, target_modules=["lm_head"], modules_to_save=None), progress=False)
    randomise(model.lm_head).C.data.mul_(20)
    save_adapter(model, tmp_path / "adapter")
    assert convert(folder, tmp_path / "adapter", "merged", out) == 0
    merged = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
    assert (logits(merged) - logits(model)).abs().max() <= TOLERANCE
    assert (logits(merged) - logits(transformers.GPT2LMHeadModel.from_pretrained(folder).eval())).abs().max() > 0.01


def test_a_checkpoint_of_a_peft_classifier_converts_though_peft_lists_heads_that_the_model_lacks(base, tmp_path):
    # With task_type="SEQ_CLS" PEFT lists both "classifier" and "score", whatever the model has.
    options = {"r": 8, "num_subspaces": 3, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    theirs = peft.get_peft_model(load(base), peft.AdamssConfig(**options))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    theirs.save_pretrained(tmp_path / "peft")
    assert convert(base, tmp_path / "peft", "merged", tmp_path / "merged") == 0
    assert (logits(load(tmp_path / "merged")) - logits(theirs.eval())).abs().max() <= TOLERANCE

"""In a batch with `adapter_names` each row of a fused PEFT model takes its own adapter, as PEFT's LoRA has it."""

from __future__ import annotations

import concurrent.futures
import copy

import pytest
import torch
from torch import nn

from adamss_kernels import apply_adamss_kernels, revert_adamss_kernels

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

NAMES = ("default", "other", "third")


def config(**options):
    defaults = {"r": 8, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["q_proj", "v_proj"]}
    return peft.AdamssConfig(**defaults | options)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=60, **sizes, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def model():
    """A fused model with three adapters, of which the last one adapts fewer layers."""
    wrapped = peft.get_peft_model(llama(), config())
    wrapped.add_adapter("other", config(random_seed=1))
    wrapped.add_adapter("third", config(target_modules=["q_proj"], num_subspaces=2))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "adamss_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return apply_adamss_kernels(wrapped).eval()


def ids(batch: int) -> torch.Tensor:
    return torch.randint(1, 60, (batch, 5), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model, name: str, x: torch.Tensor) -> torch.Tensor:
    """The logits when every row takes `name`."""
    if name == "__base__":
        with model.disable_adapter():
            return model(input_ids=x).logits
    model.set_adapter(name)
    try:
        return model(input_ids=x).logits
    finally:
        model.set_adapter("default")


@pytest.mark.parametrize(
    "names",
    [
        ["default", "other", "__base__", "third", "other", "default"],
        ["__base__"] * 3,
        ["third"],
        ["other", "other", "other", "default"],
    ],
    ids=["mixed", "base alone", "one row", "two groups"],
)
def test_each_row_is_what_its_adapter_alone_gives(model, names):
    x = ids(len(names))
    with torch.no_grad():
        got = model(input_ids=x, adapter_names=names).logits
    for i, name in enumerate(names):
        expected = logits_of(model, name, x)[i]
        assert (got[i] - expected).norm() <= 1e-5 * expected.norm(), (i, name)
    different = logits_of(model, "other", x)
    assert (different - logits_of(model, "default", x)).norm() > 0.01 * different.norm(), "the adapters do something"


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_follows_each_row_through_cache_and_beams(model, beams):
    names = ["default", "__base__", "other"]
    x = ids(3)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "attention_mask": torch.ones_like(x)}
    got = model.generate(input_ids=x, adapter_names=names, **options)
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=x, **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=x, **options)
            model.set_adapter("default")
        length = min(got.shape[1], alone.shape[1])
        assert torch.equal(got[i, :length], alone[i, :length]), name


def test_what_cannot_be_mixed_is_refused_by_name(model):
    x = ids(2)
    with pytest.raises(ValueError, match=r"adapter_names: expected names of .*'third'.* got \['fourth'\]"):
        model(input_ids=x, adapter_names=["default", "fourth"])
    with pytest.raises(ValueError, match="expected a name for each of the 2 inputs, got 3"):
        model(input_ids=x, adapter_names=["default"] * 3)
    model.train()
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        model(input_ids=x, adapter_names=["default"] * 2)
    model.eval()
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="has merged adapters"):
        merged(input_ids=x, adapter_names=["default"] * 2)


def with_heads() -> nn.Module:
    """A fused model with two adapters, each with a head of its own."""
    torch.manual_seed(0)
    net = nn.ModuleDict({"q_proj": nn.Linear(12, 12), "head": nn.Linear(12, 3)})
    net.forward = lambda x: net["head"](net["q_proj"](x))
    wrapped = peft.get_peft_model(net, config(target_modules=["q_proj"], modules_to_save=["head"]))
    wrapped.add_adapter("other", config(target_modules=["q_proj"], modules_to_save=["head"]))
    for name, parameter in wrapped.named_parameters():
        if "adamss_B" in name or "modules_to_save" in name:
            parameter.data.normal_()
    return apply_adamss_kernels(wrapped).eval()


def test_modules_that_are_saved_whole_follow_their_rows():
    model, x, names = with_heads(), torch.randn(4, 12), ["other", "default", "__base__", "other"]
    with torch.no_grad():
        got = model(x, adapter_names=names)
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x)[i]
            else:
                model.set_adapter(name)
                expected = model(x)[i]
            torch.testing.assert_close(got[i], expected, rtol=1e-5, atol=1e-5)


def test_threads_that_choose_at_once_do_not_see_each_other():
    model, x = with_heads(), torch.randn(2, 12)
    choices = [["default", "other"], ["other", "__base__"], ["__base__", "default"], ["other", "default"]]
    with torch.no_grad():
        expected = [model(x, adapter_names=names) for names in choices]

    @torch.no_grad()
    def serve(i: int) -> bool:
        got = model(x, adapter_names=choices[i % 4])
        return torch.allclose(got, expected[i % 4], rtol=1e-4, atol=1e-5)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(serve, range(2000)))


def test_nothing_is_left_after_the_kernels_are_taken_away():
    model = with_heads()
    with torch.no_grad():
        model(torch.randn(2, 12), adapter_names=["default", "other"])
    hooked = [m for m in model.modules() if m._forward_pre_hooks]
    assert hooked
    revert_adamss_kernels(model)
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_a_compiled_model_mixes_too():
    model, x = with_heads(), torch.randn(4, 12)
    names = ["other", "default", "__base__", "other"]
    with torch.no_grad():
        alone, mixed = model(x), model(x, adapter_names=names)
        torch._dynamo.reset()
        model.base_model.model["q_proj"].compile(backend="aot_eager")
        for _ in range(2):
            torch.testing.assert_close(model(x), alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(x, adapter_names=names), mixed, rtol=1e-5, atol=1e-5)

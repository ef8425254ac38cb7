"""Layers do not care what goes on around them: threads, defaults of torch, Python's switches, other people's hooks."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from conftest import make_layer
from torch import nn
from torch.nn.utils import parametrize, prune

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, inject_adamss, load_adapter, save_adapter
from adamss_kernels.adapters import METHODS, inject_adapter
from adamss_kernels.merge import merge_and_unload
from adamss_kernels.model import adapted_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threads_that_share_a_layer_get_the_bits_that_each_would_get_alone(dtype):
    layer = make_layer(D=160, N=96, r=32).to(dtype)
    xs = [torch.randn(70 + i, 160, dtype=dtype, requires_grad=True) for i in range(6)]

    def step(x):
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, layer.B, layer.C])]

    alone = [step(x) for x in xs]
    together = [[] for _ in xs]
    threads = [
        threading.Thread(target=lambda i=i: together[i].extend(step(xs[i]) for _ in range(5))) for i in range(len(xs))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, runs in zip(alone, together, strict=True):
        assert len(runs) == 5
        assert all(torch.equal(a, b) for run in runs for a, b in zip(run, want, strict=True))


@pytest.fixture(params=["meta", "float64"])
def other_default(request):
    """A default device or dtype that is not the model's; "meta" stands for a GPU, on which the model is not."""
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def test_adaptation_pruning_and_checkpoints_follow_the_model_and_not_the_defaults(other_default, tmp_path):
    def base():
        weight = torch.arange(24.0 * 20, device="cpu", dtype=torch.float32).cos().reshape(20, 24)
        linear = nn.Linear(24, 20, device="cpu", dtype=torch.float32)
        linear.load_state_dict({"weight": weight, "bias": weight[:, 0]})
        return nn.Sequential(linear, nn.GELU())

    for scope, init_weights in (("global", "orthogonal"), ("layer", None)):
        events = {"init_warmup": 1, "final_warmup": 4, "mask_interval": 2, "asa_target_subspaces": 2}
        config = AdaMSSConfig(num_subspaces=4, use_asa=True, asa_scope=scope, init_weights=init_weights, **events)
        model = inject_adamss(base(), config, progress=False)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        allocator = SubspaceAllocator(model, config)
        allocator.attach(optimizer)
        x = torch.linspace(-1, 1, 24 * 8, device="cpu", dtype=torch.float32).reshape(8, 24)
        for step in range(1, 5):
            model(x).square().mean().backward()
            optimizer.step()
            allocator.update_and_allocate(step)
            optimizer.zero_grad()
        assert allocator.active_counts() == {"0": 2}
        save_adapter(model, tmp_path)
        assert torch.equal(load_adapter(base(), tmp_path)(x), model(x))
    for method in METHODS:
        y = inject_adapter(base(), method, progress=False)(x)
        assert (y.device.type, y.dtype) == ("cpu", torch.float32)


class Doubled(nn.Module):
    """A parametrisation."""

    def forward(self, parameter):
        return parameter * 2


@pytest.mark.parametrize("name", ["weight", "bias", "B", "C"])
def test_what_pruning_and_parametrisations_make_of_a_parameter_takes_part(name):
    layer = make_layer()
    x = torch.randn(5, 24)
    for change in (
        lambda target: prune.l1_unstructured(target, name, 0.5),
        lambda target: parametrize.register_parametrization(target, name, Doubled()),
    ):
        changed, expected = copy.deepcopy(layer), copy.deepcopy(layer)
        change(changed)
        getattr(expected, name).data.copy_(getattr(changed, name))
        assert torch.equal(changed(x), expected(x))
        assert not torch.equal(changed(x), layer(x))


@pytest.mark.parametrize("kind", ["adamss", "lora"])
def test_a_layer_whose_memory_is_not_filled_yet_reads_no_memory_of_others(kind):
    layer = make_layer()
    if kind == "lora":
        layer = adapted_layers(inject_adapter(nn.Sequential(nn.Linear(24, 20)), "lora", progress=False))["0"]
    filled = copy.deepcopy(layer)

    def garbage(t):
        new = torch.empty_like(t)
        return new.fill_(-1431655766) if t.dtype == torch.int32 else new  # what `to_empty` may find there

    layer._apply(garbage)
    for index, end in ((layer.row_subspace, len(layer.offsets) - 1), (layer.offsets, layer.offsets[-1] + 1)):
        assert index.min() >= 0
        assert index.max() < end
    assert torch.equal(layer.offsets, filled.offsets)
    layer(torch.randn(5, 24)).sum().backward()
    layer.load_state_dict(filled.state_dict())
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), filled(x))


def test_nested_tensors_are_refused_by_name():
    with pytest.raises(TypeError, match=r"x: expected a tensor \(\.\.\., D\), got a nested one"):
        make_layer()(torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)], layout=torch.jagged))


def test_merged_models_script_and_trace_and_adapted_ones_trace_without_gradients():
    model = nn.Sequential(make_layer(), nn.GELU()).eval()
    x, other = torch.randn(3, 24), torch.randn(7, 24)
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(model, x)(other), model(other))
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))
    y = model(other)
    merge_and_unload(model)
    # One rounding of W' instead of two sums.
    torch.testing.assert_close(torch.jit.script(model)(other), y, atol=1e-5, rtol=1e-5)

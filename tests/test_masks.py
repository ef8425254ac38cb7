"""Masks: however they are edited, the next call obeys them, whatever `set_masks` has made the layer leave out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import make_layer
from torch.nn import functional as F

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, SubspaceAllocator, inject_adamss

NONE, ALL = torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)


def plain(layer: FusedAdaMSSLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's output from its tensors as they are now."""
    return F.linear(x, layer.weight + layer.delta_weight(), layer.bias + layer.delta_bias())


def load(layer: FusedAdaMSSLinear, name: str, **options: bool) -> None:
    layer.load_state_dict(copy.deepcopy(layer.state_dict()) | {name: ALL.clone()}, **options)


EDITS = {
    "in place": lambda layer, name: getattr(layer, name).fill_(True),
    "by item": lambda layer, name: getattr(layer, name).__setitem__(1, True),
    "through a view": lambda layer, name: getattr(layer, name)[1:].fill_(True),
    "in inference mode": torch.inference_mode()(lambda layer, name: getattr(layer, name).fill_(True)),
    "by assignment": lambda layer, name: setattr(layer, name, ALL.clone()),
    "in the module's dictionary": lambda layer, name: layer._buffers.update({name: ALL.clone()}),
    "by a state dict": load,
    "by a state dict that is assigned": lambda layer, name: load(layer, name, assign=True),
    "by set_masks": lambda layer, name: layer.set_masks(**{name: ALL}),
    "after a cast": lambda layer, name: layer.double().float()._buffers[name].fill_(True),
}
"""Ways to let a subspace contribute, or train, again."""
UNCOUNTED = {
    "through data": lambda layer, name: getattr(layer, name).data.fill_(True),
    "through a memory that is shared": lambda layer, name: getattr(layer, name).numpy().fill(True),
}
"""And those that no version counts: DDP's copy of rank 0's buffers is one of them, too."""


CASES = [("cpu", edit) for edit in EDITS | UNCOUNTED] + [("elsewhere", edit) for edit in EDITS]


@pytest.fixture(params=["cpu", "elsewhere"])
def device(request, monkeypatch) -> None:
    """Masks whose values are at hand, or are only to be had by waiting for a device."""
    if request.param == "elsewhere":
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)


@pytest.mark.parametrize(("device", "edit"), CASES, indirect=["device"])
def test_a_layer_that_was_switched_off_obeys_an_edit_of_active(device, edit):
    layer, x = make_layer(), torch.randn(5, 24)
    layer.set_masks(active=NONE)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    (EDITS | UNCOUNTED)[edit](layer, "active")
    assert layer.active.any()
    torch.testing.assert_close(layer(x), plain(layer, x))
    assert not torch.allclose(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("device", "edit"), CASES, indirect=["device"])
def test_a_layer_that_was_frozen_obeys_an_edit_of_trainable(device, edit):
    layer, x = make_layer(), torch.randn(5, 24)
    layer.set_masks(trainable=NONE)
    layer(x).sum().backward()
    assert not layer.C.grad.any()
    (EDITS | UNCOUNTED)[edit](layer, "trainable")
    layer(x).sum().backward()
    has_gradient = [bool(layer.C.grad[layer.row_subspace == k].any()) for k in range(3)]
    assert has_gradient == layer.trainable.tolist()


@pytest.mark.parametrize("name", ["active", "trainable"])
def test_switching_everything_off_by_hand_is_obeyed_too(device, name):
    layer, x = make_layer(), torch.randn(5, 24)
    getattr(layer, name).zero_()
    y = layer(x)
    torch.testing.assert_close(y, plain(layer, x))
    y.sum().backward()
    assert not layer.B.grad.any()
    assert not layer.C.grad.any()


def is_bare(layer: FusedAdaMSSLinear) -> bool:
    """Whether a call with gradients is the frozen layer's, so that no S is kept for that of C."""
    shapes: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(torch.randn(7, 24, dtype=layer.weight.dtype))
    return (7, layer.layout.rho) not in shapes


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), lambda layer: layer.double()]
)
def test_a_copy_leaves_out_what_its_own_masks_make_superfluous(device, copied):
    layer = make_layer()
    layer.set_masks(active=NONE)
    assert is_bare(copied(layer))
    # A copy counts its versions anew, and may arrive at the number that was remembered.
    layer = make_layer()
    layer.set_masks(active=NONE)
    layer.active[0] = True
    assert not is_bare(copied(layer))


def test_masks_that_are_exchanged_for_one_call_count_in_that_call(device):
    layer, x = make_layer(), torch.randn(5, 24)
    expected = plain(layer, x)
    layer.set_masks(active=NONE)
    torch.testing.assert_close(torch.func.functional_call(layer, {"active": ALL}, (x,)), expected)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_masks_may_differ_within_a_batch_of_calls():
    layer, x = make_layer().requires_grad_(False), torch.randn(5, 24)
    expected = torch.stack([F.linear(x, layer.weight, layer.bias), plain(layer, x)])
    layer.set_masks(active=NONE)
    got = torch.vmap(lambda active: torch.func.functional_call(layer, {"active": active}, (x,)))(
        torch.stack([NONE, ALL])
    )
    torch.testing.assert_close(got, expected)


def test_both_masks_are_set_or_none():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"trainable: expected a bool tensor of shape \(3,\), got torch.float32"):
        layer.set_masks(active=NONE, trainable=torch.ones(3))
    with pytest.raises(ValueError, match=r"active: expected a bool tensor of shape \(3,\), got list"):
        layer.set_masks(active=[True, True, False])
    assert layer.active.all()
    assert layer.trainable.all()
    layer.set_masks(torch.tensor([True, True, False]), torch.tensor([False, False, True]))
    assert layer.active.tolist() == [True, True, False]
    assert layer.trainable.tolist() == [False, False, True]
    assert is_bare(layer), "none of the active subspaces trains"


def test_set_masks_without_arguments_looks_at_what_was_edited(device):
    layer = make_layer()
    layer.active.zero_()
    assert not is_bare(layer)
    layer.set_masks()
    assert is_bare(layer)


def test_on_meta_masks_are_set_and_nothing_is_read():
    layer = make_layer().to("meta")
    layer.set_masks(active=torch.zeros(3, dtype=torch.bool, device="meta"))
    assert layer(torch.empty(2, 24, device="meta")).shape == (2, 20)


def test_a_compiled_layer_takes_every_mask_as_data():
    torch._dynamo.reset()
    layer, x = make_layer(), torch.randn(6, 24)
    graphs = []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    for edit in (lambda: None, lambda: layer.set_masks(active=NONE), lambda: layer.active.data.fill_(True)):
        edit()
        torch.testing.assert_close(compiled(x), plain(layer, x))
    layer.set_masks(trainable=NONE)
    compiled(x).sum().backward()
    assert not layer.C.grad.any()
    layer.trainable[0] = True
    compiled(x).sum().backward()
    assert layer.C.grad.any()
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_layer_takes_every_mask_as_data(strict):
    layer, x = make_layer(), torch.randn(6, 24)
    expected = plain(layer, x)
    layer.set_masks(active=NONE)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=strict).module()
        traced = torch.jit.trace(layer, (x,), check_trace=False)
        for module in (exported, traced):
            for is_on, y in ((False, F.linear(x, layer.weight, layer.bias)), (True, expected)):
                module.active.fill_(is_on)
                torch.testing.assert_close(module(x), y)


def test_a_graph_that_is_captured_takes_every_mask_as_data(monkeypatch):
    layer = make_layer()
    layer.set_masks(active=NONE)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert is_bare(layer)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not is_bare(layer)


def test_the_optimizer_leaves_alone_what_was_frozen_in_a_way_that_no_version_counts():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Linear(20, 24))
    config = AdaMSSConfig(r=8, num_subspaces=3, use_asa=True)
    inject_adamss(model, config, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    SubspaceAllocator(model, config).attach(optimizer)
    for frozen in ([], [1], [1, 2], []):
        model[0].trainable.data.fill_(True)
        model[0].trainable.data[frozen] = False
        before = model[0].B.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(5, 24)).square().sum().backward()
        optimizer.step()
        unchanged = [k for k in range(3) if torch.equal(model[0].B[k], before[k])]
        assert unchanged == frozen

"""`FusedAdaMSSLinear` behaves as an `nn.Linear` does, and keeps its promises about merging and memory."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import CPU_BACKENDS, make_layer, randomise
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear


def same_state(a: nn.Module, b: nn.Module) -> bool:
    state_a, state_b = a.state_dict(), b.state_dict()
    return state_a.keys() == state_b.keys() and all(torch.equal(state_a[key], state_b[key]) for key in state_a)


def test_starts_as_the_layer_it_replaces():
    linear = nn.Linear(24, 20)
    layer = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(r=8))
    x = torch.randn(5, 24)
    # C = 0; only the order of the base GEMM's sums may differ.
    torch.testing.assert_close(layer(x), linear(x), rtol=1e-6, atol=1e-6)
    assert layer.weight is linear.weight
    assert not layer.weight.requires_grad
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"B", "C"}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_delta_weight_is_the_update(bias):
    layer = make_layer(bias=bias)
    x = torch.randn(5, 24)
    delta_bias = layer.delta_bias()
    assert (delta_bias is None) == (not bias)
    merged_bias = layer.bias + delta_bias if bias else None
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.delta_weight(), merged_bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_unmerge_restores_every_bit(dtype, bias):
    layer = make_layer(bias=bias).to(dtype)
    before = copy.deepcopy(layer)
    x = torch.randn(5, 24, dtype=dtype)
    y = layer(x)
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.weight, before.weight)
    torch.testing.assert_close(layer(x), y, **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}))
    layer.merge()
    layer.unmerge()
    assert not layer.merged
    assert same_state(layer, before)
    assert torch.equal(layer(x), y)
    layer.unmerge()
    assert same_state(layer, before)


def test_merging_in_inference_mode_leaves_a_layer_that_can_train():
    layer, x = make_layer(), torch.randn(3, 24)
    with torch.inference_mode():
        layer.merge()
        assert not layer.weight.is_inference()
        layer.unmerge()
    layer(x).sum().backward()
    assert layer.B.grad.abs().sum() > 0


def test_merge_leaves_a_tied_weight_alone():
    embedding = nn.Embedding(20, 24)
    head = nn.Linear(24, 20, bias=False)
    head.weight = embedding.weight
    layer = randomise(FusedAdaMSSLinear.from_linear(head, AdaMSSConfig(r=8)))
    before = embedding.weight.detach().clone()
    layer.merge()
    assert torch.equal(embedding.weight, before)


def test_merge_refuses_what_is_not_finite_and_changes_nothing():
    layer = make_layer()
    layer.C.data[3, 0] = float("inf")
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_state_dict_survives_merging_and_loads_into_a_merged_layer():
    layer = make_layer()
    y = layer(torch.ones(1, 24))
    layer.merge()
    state = copy.deepcopy(layer.state_dict())
    other = make_layer()
    other.merge()
    other.load_state_dict(state)
    assert not other.merged
    assert torch.equal(other(torch.ones(1, 24)), y)


def test_to_linear_is_plain_independent_and_equal():
    layer = make_layer()
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    x = torch.randn(5, 24)
    torch.testing.assert_close(linear(x), layer(x))
    linear.weight.data.zero_()
    assert layer.weight.abs().sum() > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies_are_whole_and_independent(duplicate, merged):
    layer = make_layer()
    if merged:
        layer.merge()
    layer.trainable[1] = False
    other = duplicate(layer)
    assert same_state(layer, other)
    assert other.layout.row_subspace is other.row_subspace
    x = torch.randn(5, 24)
    assert torch.equal(layer(x), other(x))
    other.unmerge()
    other.C.data.zero_()
    assert not torch.equal(layer(x), other(x))


def test_a_layer_that_is_cast_trains_in_its_new_dtype():
    layer = make_layer().to(torch.bfloat16)
    assert layer.row_subspace.dtype == torch.int32
    assert layer.active.dtype == torch.bool
    x = torch.randn(5, 24, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.B.grad.dtype == torch.bfloat16


def test_parameters_over_a_16_bit_layer_are_float32():
    layer = FusedAdaMSSLinear.from_linear(nn.Linear(24, 20, dtype=torch.bfloat16), AdaMSSConfig(r=8))
    assert layer.B.dtype == layer.C.dtype == torch.float32
    assert layer.basis.dtype == torch.bfloat16
    y = layer(torch.randn(3, 24, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.C.grad.dtype == torch.float32


def test_is_built_on_meta_and_filled_from_a_state_dict():
    source = make_layer(bias=True)
    with torch.device("meta"):
        linear = nn.Linear(24, 20)
    layer = FusedAdaMSSLinear.from_linear(linear, source.config)
    assert layer(torch.empty(2, 24, device="meta")).shape == (2, 20)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), source(x))
    assert layer.layout.row_subspace is layer.row_subspace


def test_state_dict_of_other_ranks_is_refused():
    layer, other = make_layer(), make_layer()
    state = other.state_dict()
    state["ranks"] = state["ranks"].flip(0) + 1
    with pytest.raises(RuntimeError, match="ranks: expected the ranks of this layer"):
        layer.load_state_dict(state)


def test_masks_survive_state_dict_copy_and_mode_changes():
    layer = make_layer()
    layer.active[1] = layer.trainable[2] = False
    other = make_layer()
    other.load_state_dict(layer.state_dict())
    for candidate in (other, copy.deepcopy(layer).eval().train(), copy.deepcopy(layer).double()):
        assert candidate.active.tolist() == [True, False, True]
        assert candidate.trainable.tolist() == [True, True, False]


@pytest.mark.parametrize("name", ["active", "trainable"])
@pytest.mark.parametrize("mask", [torch.ones(2, dtype=torch.bool), torch.ones(3), [True, False, True]])
def test_a_mask_that_does_not_fit_is_refused_when_it_is_assigned(name, mask):
    layer = make_layer()
    with pytest.raises(ValueError, match=rf"{name}: expected a bool tensor of shape \(3,\), got"):
        setattr(layer, name, mask)
    setattr(layer, name, torch.tensor([True, False, True]))
    assert getattr(layer, name).tolist() == [True, False, True]
    assert name in dict(layer.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_gives_the_dtype_of_nn_linear(dtype):
    layer = make_layer().to(dtype)
    linear = nn.Linear(24, 20, dtype=dtype)
    x = torch.randn(3, 24, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == linear(x).dtype
        y.sum().backward()
    assert layer.B.grad.dtype == dtype
    exact = make_layer().double()(x.double())
    assert (y - exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_into_one_graph_for_every_number_of_tokens(backend):
    torch._dynamo.reset()
    layer = make_layer(backend=backend)
    graphs = []

    def count(graph_module, _):
        graphs.append(graph_module)
        return graph_module.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for M in (5, 9, 33):
        x = torch.randn(M, 24, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, layer(x))
        y.sum().backward()
    assert len(graphs) == 1
    # Masks are data: changing them does not recompile.
    layer.active[0] = False
    layer.trainable[1] = False
    x = torch.randn(7, 24, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_inductor_gives_the_eager_result_and_gradients(backend):
    torch._dynamo.reset()
    model = nn.Sequential(make_layer(24, 20, backend=backend), nn.GELU(), make_layer(20, 24, backend=backend))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for M in (4, 9):
        x = torch.randn(M, 24, requires_grad=True)
        y = model(x)
        expected = torch.autograd.grad(y.square().sum(), (x, *(p for p in model.parameters() if p.requires_grad)))
        y_compiled = compiled(x)
        got = torch.autograd.grad(y_compiled.square().sum(), (x, *(p for p in model.parameters() if p.requires_grad)))
        torch.testing.assert_close(y_compiled, y)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(use_reentrant):
    layer = make_layer()
    x = torch.randn(5, 24, requires_grad=True)
    layer(x).square().sum().backward()
    expected = [x.grad.clone(), layer.B.grad.clone(), layer.C.grad.clone()]
    x.grad = layer.B.grad = layer.C.grad = None
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    for got, want in zip((x.grad, layer.B.grad, layer.C.grad), expected, strict=True):
        assert torch.equal(got, want)


def test_double_backward_without_the_input_is_refused_rather_than_wrong():
    layer = make_layer(save_for_backward="projection")
    x = torch.randn(5, 24, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dx.sum().backward(retain_graph=True)
    # On the path of a derivative, not only beside it.
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(dx.sum(), x, allow_unused=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.functional.hessian(lambda x: layer(x).square().sum(), x)
    # dy depends on nothing here, but dx does, on B and C.
    (dx,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        (layer(x).sum() + dx.square().sum()).backward()


def test_gradients_of_a_graph_that_is_kept_are_those_of_one_that_is_not():
    layer = make_layer()
    x = torch.randn(5, 24, requires_grad=True)
    inputs = (x, layer.B, layer.C)
    once = torch.autograd.grad(layer(x).square().sum(), inputs)
    kept = torch.autograd.grad(layer(x).square().sum(), inputs, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(once, kept, strict=True))


def saved_bytes(layer: FusedAdaMSSLinear, x: torch.Tensor) -> tuple[int, bool]:
    """Bytes saved for backward beyond the layer's own tensors and x, and whether x is among them."""
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    total, has_x = 0, False

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal total, has_x
        if t.data_ptr() == x.data_ptr():
            has_x = True
        elif t.data_ptr() not in own:
            total += t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return total, has_x


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_backward_keeps_the_projection_or_the_input_and_nothing_larger(backend):
    linear = nn.Linear(768, 768)
    x = torch.randn(512, 768, requires_grad=True)

    def layer(mode):
        config = AdaMSSConfig(r=100, num_subspaces=10, save_for_backward=mode, backend=backend)
        return FusedAdaMSSLinear.from_linear(linear, config)

    total, has_x = saved_bytes(layer("projection"), x)
    assert total <= 512 * 110 * 4
    assert not has_x
    total, has_x = saved_bytes(layer("input"), x)
    assert total <= 512 * 10 * 4
    assert has_x
    assert saved_bytes(layer("auto"), x)[1], "R = 100 > 768 / 16: the input"
    with torch.no_grad():
        assert saved_bytes(layer("auto"), x) == (0, False)
    frozen = layer("auto").requires_grad_(False)
    assert saved_bytes(frozen, x) == (0, False)


def test_auto_keeps_the_projection_of_a_wide_layer():
    with torch.device("meta"):
        linear = nn.Linear(4096, 4096)
    layer = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(r=100, num_subspaces=10))
    x = torch.empty(8, 4096, device="meta", requires_grad=True)
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    assert (8, 100) in shapes
    assert (8, 4096) not in shapes


@pytest.mark.parametrize("mode", ["projection", "input"])
def test_a_layer_without_trainable_subspaces_saves_nothing_and_hands_out_zero_gradients(mode):
    layer, x = make_layer(save_for_backward=mode), torch.randn(6, 24, requires_grad=True)
    assert saved_bytes(layer, x)[0] > 0
    expected = layer(x)
    (expected_dx,) = torch.autograd.grad(expected.sum(), x)
    layer.set_masks(trainable=torch.zeros(3, dtype=torch.bool))
    assert saved_bytes(layer, x) == (0, False)
    # Without P to keep, S is rounded in another order.
    y = layer(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, expected_dx)
    for parameter in (layer.B, layer.C):
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_a_layer_without_active_subspaces_is_the_bare_linear():
    layer, x = make_layer(), torch.randn(2, 3, 24, requires_grad=True)
    layer.set_masks(active=torch.zeros(3, dtype=torch.bool))
    assert saved_bytes(layer, x) == (0, False)
    expected = F.linear(x, layer.weight, layer.bias)
    assert torch.equal(F.relu(layer(x), inplace=True), expected.relu())
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(expected.sum(), x)[0])
    assert not layer.B.grad.any()
    assert not layer.C.grad.any()


def test_masks_that_return_with_a_state_dict_are_learned_again():
    layer = make_layer()
    state = copy.deepcopy(layer.state_dict())
    layer.set_masks(trainable=torch.zeros(3, dtype=torch.bool))
    layer.load_state_dict(state)
    layer(torch.randn(5, 24)).sum().backward()
    assert layer.C.grad.any()


def test_a_compiled_layer_follows_its_masks():
    layer, x = make_layer(), torch.randn(6, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for learns in (True, False):
        layer.trainable.fill_(learns)
        layer.B.grad = None
        compiled(x).sum().backward()
        assert layer.B.grad.any() == learns

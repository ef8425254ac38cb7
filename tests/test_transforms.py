"""An adapted layer goes through what `nn.Linear` does: the transforms of `torch.func` and higher derivatives."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from conftest import make_layer
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear
from adamss_kernels.layout import block_diagonal, column_mask
from adamss_kernels.over_base import adapt

MASKS = {
    "unmasked": (None, None),
    "pruned": (torch.tensor([True, False, True]), None),
    "frozen": (None, torch.tensor([False, True, True])),
}


def make_layer_over_conv1d() -> FusedAdaMSSLinear:
    """A layer over a base that goes on computing its own product."""
    torch.manual_seed(0)
    base = pytest.importorskip("transformers").pytorch_utils.Conv1D(5, 6)
    nn.init.normal_(base.bias)
    return adapt("layer", base, AdaMSSConfig(r=4, num_subspaces=3, subspace_rank=2))


@pytest.fixture(params=itertools.product(("linear", "conv1d"), MASKS), ids="-".join)
def layer(request):
    kind, masks = request.param
    layer = (make_layer_over_conv1d() if kind == "conv1d" else make_layer(D=6, N=5, r=4)).double()
    nn.init.normal_(layer.B)
    nn.init.normal_(layer.C)
    layer.set_masks(*MASKS[masks])
    return layer


def plain(layer, x: Tensor, B: Tensor | None = None, C: Tensor | None = None) -> Tensor:
    """The layer written in plain PyTorch."""
    B, C = layer.B if B is None else B, layer.C if C is None else C
    rho, K = B.shape[0], len(layer.active)
    trains = column_mask(layer.trainable, layer.offsets, rho)[:, None]
    B = torch.where(trains, B, B.detach())
    C = torch.where(layer.trainable[layer.row_subspace.long()][:, None], C, C.detach())
    S = (x @ layer.basis.T + layer.basis_bias) @ B.T * column_mask(layer.active, layer.offsets, rho)
    assert K == 3
    # `block_diagonal` writes in place: one row of C at a time here, as an independent check.
    rows = []
    for i, k in enumerate(layer.row_subspace.tolist()):
        first, last = layer.offsets[k], layer.offsets[k + 1]
        rows.append((S[..., first:last] * C[i, : last - first]).sum(-1))
    weight, bias = layer.base_parameters()
    return x @ weight.T + bias + torch.stack(rows, dim=-1)


def loss(y: Tensor) -> Tensor:
    return (y.tanh() + y.square()).sum()


def same(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def parameters(layer) -> dict[str, Tensor]:
    return {"B": layer.B.detach(), "C": layer.C.detach()}


def with_parameters(layer, x):
    return lambda p: loss(functional_call(layer, p, (x,)))


def test_grad_of_the_input_and_of_the_parameters(layer):
    same(grad(lambda x: loss(layer(x)))(X), grad(lambda x: loss(plain(layer, x)))(X))
    got = grad(with_parameters(layer, X))(parameters(layer))
    same(got, grad(lambda p: loss(plain(layer, X, **p)))(parameters(layer)))


def test_vmap_over_inputs_and_over_parameters(layer):
    x = torch.stack((X, 2 * X))
    with torch.no_grad():
        same(vmap(layer)(x), layer(x))
        stacked = {name: torch.stack((p, 3 * p)) for name, p in parameters(layer).items()}
        got = vmap(lambda p: functional_call(layer, p, (X,)))(stacked)
        same(got, torch.stack([plain(layer, X, **{n: p[i] for n, p in stacked.items()}) for i in range(2)]))


def test_gradients_of_single_samples(layer):
    got = vmap(grad(lambda p, x: loss(functional_call(layer, p, (x,)))), in_dims=(None, 0))(parameters(layer), X)
    for i in range(len(X)):
        expected = grad(lambda p, i=i: loss(plain(layer, X[i], **p)))(parameters(layer))
        same({name: g[i] for name, g in got.items()}, expected)


def test_forward_mode(layer):
    direction = torch.cos(X)
    same(jvp(layer, (X,), (direction,)), jvp(lambda x: plain(layer, x), (X,), (direction,)))
    same(jacfwd(layer)(X), jacfwd(lambda x: plain(layer, x))(X))
    _, expected = jvp(lambda x: plain(layer, x), (X,), (direction,))
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(X, direction))
        same(forward_ad.unpack_dual(y).tangent, expected)


def test_reverse_mode_and_hessians(layer):
    same(jacrev(layer)(X), jacrev(lambda x: plain(layer, x))(X))
    y, pull = vjp(layer, X)
    same(pull(torch.cos(y)), vjp(lambda x: plain(layer, x), X)[1](torch.cos(y)))
    same(hessian(lambda x: loss(layer(x)))(X[0]), hessian(lambda x: loss(plain(layer, x)))(X[0]))
    same(
        torch.autograd.functional.hessian(lambda x: loss(layer(x)), X[0]),
        hessian(lambda x: loss(plain(layer, x)))(X[0]),
    )


@pytest.mark.parametrize("order", [2, 3])
def test_a_gradient_penalty_of_any_order(layer, order):
    layer = make_higher(layer)
    results = []
    for function in (layer, lambda x: plain(layer, x)):
        x = X.clone().requires_grad_()
        value = loss(function(x))
        for _ in range(order - 1):
            gradients = torch.autograd.grad(value, (x, layer.B, layer.C), create_graph=True)
            value = sum(g.square().sum() for g in gradients)
        results.append(torch.autograd.grad(value, (x, layer.B, layer.C)))
    same(*results)


def make_higher(layer):
    """The same layer, keeping its input for backward."""
    layer.config = dataclasses.replace(layer.config, save_for_backward="input")
    return layer


def test_a_step_through_a_step(layer):
    """As in meta-learning: the loss after an update of B and C, differentiated by x of before."""
    layer = make_higher(layer)
    results = []
    for function in (lambda x, p: functional_call(layer, p, (x,)), lambda x, p: plain(layer, x, **p)):
        x = X.clone().requires_grad_()
        p = {name: value.clone().requires_grad_() for name, value in parameters(layer).items()}
        gradients = torch.autograd.grad(loss(function(x, p)), list(p.values()), create_graph=True)
        stepped = {name: value - 0.1 * g for (name, value), g in zip(p.items(), gradients, strict=True)}
        results.append(torch.autograd.grad(loss(function(X, stepped)), [x, *p.values()]))
    same(*results)


def test_second_derivatives_from_a_kept_projection_say_what_to_do_instead():
    layer = make_layer(save_for_backward="projection")
    x = torch.randn(5, 24, requires_grad=True)
    gradients = torch.autograd.grad(layer(x).square().sum(), (x, layer.B), create_graph=True)
    with pytest.raises(RuntimeError, match="save_for_backward='input' it has derivatives of every order"):
        gradients[0].sum().backward()


def test_gradients_of_x_alone_have_derivatives_whatever_is_kept():
    layer = make_layer(save_for_backward="projection").double().requires_grad_(False)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(dx.square().sum(), x)
    weight = layer.weight + layer.delta_weight()
    y = x @ weight.T + layer.bias + layer.delta_bias()
    (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    same(got, torch.autograd.grad(dx.square().sum(), x)[0])


def test_a_layer_without_an_active_subspace_is_transformed_as_the_bare_one():
    layer = make_layer(D=6, N=5, r=4).double()
    layer.set_masks(active=torch.zeros(3, dtype=torch.bool))
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss(layer(x)), x, create_graph=True)
    bare = x @ layer.weight.T + layer.bias
    (expected,) = torch.autograd.grad(loss(bare), x, create_graph=True)
    same(torch.autograd.grad(dx.sum(), x), torch.autograd.grad(expected.sum(), x))
    same(jacfwd(layer)(X), jacfwd(lambda x: x @ layer.weight.T + layer.bias)(X))


def test_the_structural_zeros_of_C_have_no_derivative():
    layer = make_layer(D=6, N=5, r=4, num_subspaces=2, subspace_rank=3, use_dynamic_rank=True, svd_threshold=0.9)
    dense = block_diagonal(layer.C, layer.row_subspace, layer.offsets, layer.layout.rho)
    assert torch.isfinite(dense).all()
    got = grad(lambda C: loss(functional_call(layer, {"C": C}, (X.float(),))))(layer.C.detach())
    ranks = layer.ranks[layer.row_subspace.long()]
    assert not got[torch.arange(got.shape[1]) >= ranks[:, None]].any()


@pytest.mark.parametrize("order", [2, 3])
def test_a_gradient_penalty_of_a_layer_with_nothing_left_to_train(order):
    layer = make_higher(make_layer(D=6, N=5, r=4).double())
    layer.set_masks(trainable=torch.zeros(3, dtype=torch.bool))
    results = []
    for function in (layer, lambda x: plain(layer, x)):
        x = X.clone().requires_grad_()
        value = loss(function(x))
        for _ in range(order - 1):
            (dx,) = torch.autograd.grad(value, x, create_graph=True)
            value = dx.square().sum()
        results.append(torch.autograd.grad(value, x))
    same(*results)
    # Zero gradients of B and C are among what is differentiated again.
    x = X.clone().requires_grad_()
    gradients = torch.autograd.grad(loss(layer(x)), (x, layer.B, layer.C), create_graph=True)
    assert not gradients[1].any() and not gradients[2].any()
    (again,) = torch.autograd.grad(sum(g.square().sum() for g in gradients), x)
    assert torch.isfinite(again).all()

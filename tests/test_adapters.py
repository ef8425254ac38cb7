"""Every related method is its formula, with its exact gradients, and behaves as `FusedAdaMSSLinear` does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from adapter_variants import IDS, VARIANTS, cayley, move, naive_update, update_parameters
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from adamss_kernels.adapters import METHODS, AdapterLinear
from adamss_kernels.adapters.tiles import TILE

# Square, wide and tall, even and odd, smaller than any default rank, and of more than one tile.
SHAPES = [(12, 12), (7, 13), (17, 6), (1, 5), (5, 1), (3, 2)]
LARGE = [(TILE + 44, TILE + 14), (TILE + 14, TILE + 44)]


def trained(method: str, linear: nn.Linear, seed: int = 0, **options) -> AdapterLinear:
    """A layer whose parameters all moved, as training would move them: at initialisation the update hides errors."""
    return move(METHODS[method].from_linear(linear, **options), seed)


def double(N: int, D: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(D, N, bias=bias, dtype=torch.float64)


def naive_weight(layer: AdapterLinear, p: dict[str, Tensor]) -> Tensor:
    """W + dW of the published formulas, one entry or one basis at a time; autograd gives the gradients."""
    W, o = layer.weight.detach(), layer.options
    if "spectral" not in layer.method:
        return W + naive_update(layer, p)
    # The Spectral Adapters put W together again from all its singular columns.
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    r = min(o["rank"], *W.shape)
    first = {"top": 0, "bottom": min(W.shape) - r}.get(o["window"], o["window"])
    window = slice(first, first + r)
    U1, S1, V1 = U[:, window], S[window], Vh[window].T
    rest = W - U1 @ torch.diag(S1) @ V1.T
    if layer.method == "spectral_additive":
        return (U1 + p["dU"]) @ torch.diag(S1) @ (V1 + p["dV"]).T + rest
    return U1 @ cayley(p["R_A"]) @ torch.diag(S1 * p["c"]) @ (V1 @ cayley(p["R_B"])).T + rest


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_output_update_and_gradients_are_the_formulas(method, options, bias):
    for N, D in SHAPES:
        if (method, options.get("rank_in")) == ("kronecker", 5) and min(N, D) < 2:
            continue
        layer = trained(method, double(N, D, bias), **options)
        x = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
        p = {name: t.detach().clone().requires_grad_() for name, t in update_parameters(layer).items()}
        x_naive = x.detach().clone().requires_grad_()
        weight = naive_weight(layer, p)
        y, y_naive = layer(x), F.linear(x_naive, weight, layer.bias)
        torch.testing.assert_close(y, y_naive, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.weight + layer.delta_weight(), weight.detach(), rtol=1e-12, atol=1e-12)
        dy = torch.randn_like(y)
        y.backward(dy)
        y_naive.backward(dy)
        torch.testing.assert_close(x.grad, x_naive.grad, rtol=1e-11, atol=1e-11)
        for name, got in update_parameters(layer).items():
            torch.testing.assert_close(
                got.grad, p[name].grad, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_updates_of_several_tiles_are_the_formulas(method):
    for N, D in LARGE:
        layer = trained(method, double(N, D))
        x = torch.randn(3, D, dtype=torch.float64)
        p = {name: t.detach().clone().requires_grad_() for name, t in update_parameters(layer).items()}
        y, y_naive = layer(x), F.linear(x, naive_weight(layer, p), layer.bias)
        torch.testing.assert_close(y, y_naive, rtol=1e-11, atol=1e-11)
        dy = torch.randn_like(y)
        y.backward(dy)
        y_naive.backward(dy)
        for name, got in update_parameters(layer).items():
            torch.testing.assert_close(got.grad, p[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_updates_of_several_tiles_alone_are_the_formulas(method):
    """What is added to a base of another library."""
    for N, D in LARGE:
        layer = trained(method, double(N, D))
        x = torch.randn(3, D, dtype=torch.float64, requires_grad=True)
        p = {name: t.detach().clone().requires_grad_() for name, t in update_parameters(layer).items()}
        x_naive, of_base = x.detach().clone().requires_grad_(), torch.randn(3, N, dtype=torch.float64)
        y_naive = of_base + F.linear(x_naive, naive_update(layer, p))
        y = layer.with_update(of_base.clone(), x)
        torch.testing.assert_close(y, y_naive, rtol=1e-11, atol=1e-11)
        dy = torch.randn_like(y)
        y.backward(dy)
        y_naive.backward(dy)
        torch.testing.assert_close(x.grad, x_naive.grad, rtol=1e-9, atol=1e-9)
        for name, got in update_parameters(layer).items():
            torch.testing.assert_close(got.grad, p[name].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=IDS)
def test_gradients_pass_gradcheck(method, options):
    layer = trained(method, double(4, 6), **options)
    layer.weight.requires_grad_()
    layer.bias.requires_grad_()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_gradients_asked_for_are_computed(method):
    layer = trained(method, double(4, 6))
    x = torch.randn(3, 6, dtype=torch.float64)
    parameters = update_parameters(layer)
    full = dict(zip(parameters, torch.autograd.grad(layer(x).sum(), list(parameters.values())), strict=True))
    for name, expected in full.items():
        for other, parameter in layer.named_parameters():
            parameter.requires_grad_(other == name)
        (got,) = torch.autograd.grad(layer(x).sum(), [layer.get_parameter(name)])
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        layer.train_update()
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize(("method", "options"), VARIANTS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_starts_as_the_layer_it_replaces(method, options, dtype):
    linear = nn.Linear(13, 7).to(dtype)
    layer = METHODS[method].from_linear(linear, **options)
    x = torch.randn(5, 13, dtype=dtype)
    # Only the order of the base GEMM's sums, and in 16 bits one rounding of them, may differ.
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(x), linear(x), rtol=4 * unit, atol=4 * unit)
    assert not layer.delta_weight().any() or method == "spectral_rotational"
    assert layer.delta_weight().abs().max() <= 1e-6
    assert layer.weight is linear.weight
    assert not layer.weight.requires_grad
    assert all(p.dtype == torch.float32 for p in update_parameters(layer).values())
    layer(x).float().square().sum().backward()
    gradients = [p.grad for p in update_parameters(layer).values()]
    assert any(g.any() for g in gradients), "training can leave the start"
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)


COUNTS = {
    "lora": lambda N, D: 8 * (N + D),
    "sinlora": lambda N, D: 8 * (N + D),
    "randlora": lambda N, D: (-(-min(N, D) // 32) + 1) * (32 + min(N, D)),
    # 24 x 40: p = 3, q = 5; 40 x 24 the other way round.
    "kronecker": lambda N, D: 8 * 8 + (N // 8) * (D // 8),
    "kradapter": lambda N, D: 24 * (4 + 10),
    "spectral_additive": lambda N, D: 8 * (N + D),
    "spectral_rotational": lambda N, D: 2 * 8**2 + 8,
}


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_documented_parameters_train(method):
    for N, D in ((24, 40), (40, 24)):
        layer = METHODS[method].from_linear(nn.Linear(D, N))
        assert sum(p.numel() for p in update_parameters(layer).values()) == COUNTS[method](N, D)
    if method == "sinlora":
        layer = METHODS[method].from_linear(nn.Linear(40, 24), learn_sine=True)
        assert sum(p.numel() for p in update_parameters(layer).values()) == COUNTS[method](24, 40) + 2


@pytest.mark.parametrize("window", [0, 2, 4])
def test_any_window_of_singular_columns_is_tuned(window):
    for method in ("spectral_additive", "spectral_rotational"):
        layer = trained(method, double(9, 7), rank=3, window=window)
        expected = naive_weight(layer, update_parameters(layer)).detach()
        torch.testing.assert_close(layer.weight + layer.delta_weight(), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"window: expected 'top', 'bottom' or an index in \[0, 4\], got 5"):
        METHODS["spectral_additive"].from_linear(double(9, 7), rank=3, window=5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unmerge_restores_every_bit(method, dtype):
    layer = trained(method, nn.Linear(13, 7).to(dtype))
    before = copy.deepcopy(layer)
    x = torch.randn(5, 13, dtype=dtype)
    y = layer(x)
    layer.merge()
    assert layer.merged
    assert not torch.equal(layer.weight, before.weight)
    # One rounding of the weights, of relative size eps, in sums of 13 products.
    slack = 16 * torch.finfo(dtype).eps * max(1.0, y.abs().max().item())
    torch.testing.assert_close(layer(x), y, rtol=0, atol=slack)
    torch.testing.assert_close(layer.to_linear()(x), y, rtol=0, atol=slack)
    layer.unmerge()
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[key]), key
    assert torch.equal(layer.weight, before.weight)
    assert torch.equal(layer(x), y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_and_moves_keep_the_layer(method, duplicate):
    layer = trained(method, nn.Linear(13, 7))
    x = torch.randn(5, 13)
    y = layer(x)
    other = duplicate(layer)
    assert torch.equal(other(x), y)
    for parameter in update_parameters(other).values():
        parameter.data.zero_()
    assert torch.equal(layer(x), y)
    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    z = narrow(x.bfloat16())
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in update_parameters(narrow).values())


@pytest.mark.parametrize("method", METHODS)
def test_is_built_on_meta_and_filled_from_a_state_dict(method):
    source = trained(method, nn.Linear(13, 7))
    layer = METHODS[method].from_linear(nn.Linear(13, 7, device="meta"))
    assert layer(torch.empty(2, 13, device="meta")).shape == (2, 7)
    layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    x = torch.randn(3, 13)
    assert torch.equal(layer(x), source(x))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_gives_the_dtype_of_nn_linear_and_the_accuracy_of_plain_pytorch(method):
    layer, x = trained(method, nn.Linear(13, 7)), torch.randn(64, 13)
    exact, plain = (copy.deepcopy(layer) for _ in range(2))
    expected = exact.double()(x.double())
    factors = plain_factors(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16
        update = x
        for factor in factors:
            update = F.linear(update, factor)
        y_plain = F.linear(x, layer.weight, layer.bias) + update
    for output in (y.float(), y_plain.float(), expected):
        output.square().sum().backward()
    assert_as_accurate_as(y_plain, y, expected)
    for name, parameter in update_parameters(layer).items():
        assert parameter.grad.dtype == torch.float32
        assert_as_accurate_as(plain.get_parameter(name).grad, parameter.grad, exact.get_parameter(name).grad, name)


def plain_factors(layer: AdapterLinear) -> list[Tensor]:
    """The matrices whose products with x, one after the other, are the update as its method is described."""
    if layer.method == "lora":
        return [layer.A, layer.B]
    if layer.method == "spectral_additive":
        U1, S1, V1 = layer.U1, layer.S1, layer.V1
        return [torch.cat((V1 + layer.dV, V1), 1).T, torch.cat(((U1 + layer.dU) * S1, -U1 * S1), 1)]
    if layer.method == "spectral_rotational":
        return [layer.V1.T, layer.core(), layer.U1]
    return [naive_weight(layer, update_parameters(layer)) - layer.weight.detach()]


def assert_as_accurate_as(plain: Tensor, got: Tensor, exact: Tensor, name: str = "y") -> None:
    """The error is at most twice that of plain PyTorch in bfloat16, plus one rounding."""
    error, plain_error = (((t - exact).norm() / exact.norm()).item() for t in (got, plain))
    assert error <= 2 * plain_error + torch.finfo(torch.bfloat16).eps / 2, (name, error, plain_error)


@pytest.mark.parametrize("method", METHODS)
def test_sixteen_bits_do_not_round_a_small_update_away(method):
    linear = nn.Linear(16, 16, dtype=torch.bfloat16)
    linear.weight.data.fill_(1.0)
    linear.weight.data.fill_diagonal_(2.0)
    layer = trained(method, linear, **({"rank": 4} if "spectral" in method else {}))
    for parameter in update_parameters(layer).values():
        if method != "spectral_rotational":
            parameter.data.mul_(0.02)
    delta = layer.delta_weight()
    # x cancels in W: what is left is the update, far below the rounding of W's entries, 2^-8.
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    x[0, 0], x[0, 1], x[1, 5], x[1, 9] = 1, -1, 1, -1
    got, base = layer(x).float(), F.linear(x, linear.weight, linear.bias).float()
    columns = [i for i in range(16) if i not in (0, 1)]
    want = (delta @ x.float().T).T[:1, columns]
    bias_rounding = 2**-8 * (want.abs() + linear.bias.float()[columns].abs())
    assert ((got - base)[:1, columns] - want).abs().le(2 * bias_rounding + 2**-8 * want.abs()).all()


@pytest.mark.parametrize("method", METHODS)
def test_compiles_into_one_graph(method):
    torch._dynamo.reset()
    layer = trained(method, nn.Linear(13, 7))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for M in (5, 9):
        x = torch.randn(M, 13, requires_grad=True)
        leaves = (x, *update_parameters(layer).values())
        y, y_compiled = layer(x), compiled(x)
        torch.testing.assert_close(y_compiled, y)
        expected = torch.autograd.grad(y.square().sum(), leaves)
        for got, want in zip(torch.autograd.grad(y_compiled.square().sum(), leaves), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "kradapter"])
def test_inductor_gives_the_eager_result(method):
    torch._dynamo.reset()
    layer = trained(method, nn.Linear(13, 7))
    x = torch.randn(5, 13)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("method", METHODS)
def test_activation_checkpointing_changes_no_gradient(method):
    layer = trained(method, nn.Linear(13, 7))
    x = torch.randn(5, 13, requires_grad=True)
    leaves = (x, *update_parameters(layer).values())
    expected = torch.autograd.grad(layer(x).square().sum(), leaves)
    got = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_x_may_have_any_number_of_tokens_and_any_strides(method):
    layer = trained(method, double(7, 13))
    weight = layer.weight + layer.delta_weight()
    for shape in ((13,), (0, 13), (2, 0, 13), (2, 3, 2, 13)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, F.linear(x, weight, layer.bias))
        y.sum().backward()
        assert x.grad.shape == x.shape
    x = torch.randn(13, 5, dtype=torch.float64).T
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias))
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 13\), got \(2, 12\)"):
        layer(torch.randn(2, 12, dtype=torch.float64))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_of_the_weights_size_is_kept_for_backward(method):
    N, D, M = 320, 288, 8
    layer = trained(method, nn.Linear(D, N))
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    x = torch.randn(M, D, requires_grad=True)
    kept = []

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own and t.data_ptr() != x.data_ptr():
            kept.append(t.untyped_storage().nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    # Small factors of low-rank updates and (M, r) projections; a tile would be 256 rows or columns of W.
    assert sum(kept) <= 4 * (6 * 8 * (N + D) + 4 * M * 16 + N)
    assert sum(kept) < layer.weight.nbytes / 4
    if method in ("sinlora", "randlora", "kronecker", "kradapter"):
        assert not kept, "only x and the layer's own tensors"


@pytest.mark.parametrize("method", ["sinlora", "randlora", "kronecker", "kradapter"])
def test_double_backward_through_tiles_is_refused_rather_than_wrong(method):
    layer = trained(method, nn.Linear(13, 7))
    x = torch.randn(5, 13, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        dx.sum().backward()

"""The layer computes what installed PEFT computes: same rows, same basis, same output, same gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, inject_adamss
from adamss_kernels.decompose import _truncated_svd, augmented

pytestmark = pytest.mark.slow

peft = pytest.importorskip("peft")

SHAPES = [(768, 768), (1024, 1024), (1536, 768), (384, 1536), (65, 33)]
RANKS = [1, 3, "dynamic"]


def peft_layer(linear: nn.Linear, **config):
    """The AdaMSS layer that PEFT makes of `linear`."""
    model = nn.ModuleDict({"linear": linear})
    adapted = peft.inject_adapter_in_model(peft.AdamssConfig(target_modules=["linear"], **config), model)
    return adapted["linear"]


def linear_that_peft_adapts(N: int, D: int, bias: bool, seed: int, **config):
    """A linear layer, and the AdaMSS layer that PEFT makes of it: for a dynamic rank PEFT decomposes the singular Gram
    matrix U U^T, which on some processors does not converge for some weights."""
    for attempt in range(5):
        torch.manual_seed(seed + attempt)
        linear = nn.Linear(D, N, bias=bias)
        try:
            return linear, peft_layer(copy.deepcopy(linear), **config)
        except torch.linalg.LinAlgError:
            continue
    raise AssertionError("PEFT adapts none of five weights")


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("K", [1, 5, 10])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize(("N", "D"), SHAPES)
def test_rows_basis_output_and_gradients_are_pefts(N, D, bias, K, rank):
    config = {"num_subspaces": K, "subspace_rank": rank}
    if rank == "dynamic":
        config |= {"subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.8}
    linear, theirs = linear_that_peft_adapts(N, D, bias, seed=N + D + K, **config)
    ours = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(**config))

    # The same rows per subspace and the same basis, exactly.
    assert theirs.num_subspaces["default"] == ours.layout.num_subspaces
    for k in range(ours.layout.num_subspaces):
        assert torch.equal(theirs.seg_result["default"][k], ours.layout.rows(k))
    assert ours.layout.ranks == tuple(A.shape[0] for A in theirs.adamss_A["default"])
    peft_basis = theirs.adamss_newB["default"]
    assert torch.equal(ours.basis, peft_basis[:, :D])
    assert not bias or torch.equal(ours.basis_bias, peft_basis[:, D])

    # PEFT's A and B copied in: the same function and gradients.
    for parameter in theirs.adamss_B["default"]:
        nn.init.normal_(parameter, std=0.3)
    A, B = theirs.adamss_A["default"], theirs.adamss_B["default"]
    packed_B, packed_C = ours.layout.pack([a.data for a in A], [b.data for b in B])
    ours.B.data.copy_(packed_B)
    ours.C.data.copy_(packed_C)
    x = torch.randn(2, 9, D, requires_grad=True)
    x_peft = x.detach().clone().requires_grad_()
    dy = torch.randn(2, 9, N)
    y, y_peft = ours(x), theirs(x_peft)
    y.backward(dy)
    y_peft.backward(dy)
    dB, dC = ours.layout.pack([a.grad for a in A], [b.grad for b in B])
    for name, got, expected in (
        ("y", y, y_peft),
        ("dx", x.grad, x_peft.grad),
        ("dB", ours.B.grad, dB),
        ("dC", ours.C.grad, dC),
    ):
        assert (got - expected).norm() <= 1e-5 * expected.norm(), name
    assert torch.allclose(ours.delta_weight(), theirs.get_delta_weight("default"), atol=1e-5)


def test_initial_directions_are_orthonormal_and_capture_at_least_what_pefts_do():
    linear = nn.Linear(96, 80)
    config = {"r": 20, "num_subspaces": 4, "subspace_rank": 2}
    theirs = peft_layer(copy.deepcopy(linear), **config)
    ours = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(**config))
    torch.manual_seed(0)
    U, _ = _truncated_svd(augmented(linear.weight, linear.bias), 20)
    B, _ = ours.layout.unpack(ours.B, ours.C)
    for k, (B_k, A_k) in enumerate(zip(B, theirs.adamss_A["default"], strict=True)):
        assert torch.allclose(B_k @ B_k.T, torch.eye(len(B_k)), atol=1e-5)
        U_k = U[ours.layout.rows(k)]
        assert (U_k @ B_k.T).norm() >= (U_k @ A_k.T).norm() * (1 - 1e-5)


@pytest.mark.parametrize(("layers", "width", "expected"), [(24, 768, 42_432), (48, 1024, 97_152)])
def test_roberta_trains_the_published_number_of_parameters(layers, width, expected):
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])
    inject_adamss(model, AdaMSSConfig(r=100, num_subspaces=10, subspace_rank=1), progress=False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected

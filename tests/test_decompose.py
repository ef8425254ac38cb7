"""Whatever the weight and the config, initialisation gives a layer that trains, or says by name why not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear


@settings(max_examples=40, deadline=None)
@given(
    N=st.integers(1, 30),
    D=st.integers(1, 30),
    bias=st.booleans(),
    r=st.integers(1, 40),
    K=st.integers(1, 12),
    rank=st.integers(1, 5),
    dynamic=st.booleans(),
    M=st.integers(0, 6),
    mode=st.sampled_from(["auto", "projection", "input"]),
)
@pytest.mark.filterwarnings("ignore:.*exceeds the rank of the basis")
def test_any_layer_and_config_train(N, D, bias, r, K, rank, dynamic, M, mode):
    config = AdaMSSConfig(
        r=r, num_subspaces=K, subspace_rank=rank, use_dynamic_rank=dynamic, save_for_backward=mode, init_weights=None
    )
    layer = FusedAdaMSSLinear.from_linear(nn.Linear(D, N, bias=bias), config)
    layout = layer.layout
    assert layer.basis.shape == (min(r, N, D + bias), D)
    assert layout.num_subspaces <= min(K, N)
    assert max(layout.ranks) <= rank
    x = torch.randn(M, D, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (M, N)
    merged = layer.to_linear()(x)
    torch.testing.assert_close(y, merged, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(layer.B.grad).all()


def test_a_rank_above_the_basis_is_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="linear: subspace_rank=9 exceeds the rank of the basis and is clamped to 4"):
        layer = FusedAdaMSSLinear.from_linear(nn.Linear(6, 40), AdaMSSConfig(r=4, subspace_rank=9, num_subspaces=2))
    assert max(layer.layout.ranks) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(value):
    linear = nn.Linear(6, 5)
    linear.weight.data[2, 3] = value
    with pytest.raises(ValueError, match=r"encoder.query: expected finite values"):
        FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(), name="encoder.query")


def test_a_weight_of_equal_rows_makes_a_layer_that_runs():
    linear = nn.Linear(6, 5, bias=False)
    linear.weight.data.copy_(linear.weight.data[:1].expand(5, 6).clone())
    layer = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(r=1, num_subspaces=3))
    assert layer.layout.num_subspaces <= 3
    assert layer(torch.randn(2, 6)).shape == (2, 5)


def test_initialisation_ignores_and_keeps_the_global_random_state():
    linear = nn.Linear(40, 30)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(r=10, init_weights=None))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(r=10, init_weights=None))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    assert first.C.abs().sum() > 0

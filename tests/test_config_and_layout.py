"""Configurations and layouts are valid or refused, and packing is lossless."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from conftest import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, SubspaceLayout, adamss_linear
from adamss_kernels.layout import block_diagonal, column_mask


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    theirs = {f.name: f.default for f in dataclasses.fields(peft.AdamssConfig)}
    for field in dataclasses.fields(AdaMSSConfig):
        if field.name in theirs:
            assert field.default == theirs[field.name], field.name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("num_subspaces", -1),
        ("subspace_rank", "3"),
        ("target_modules", []),
        ("target_modules", "q("),
        ("target_modules", [3]),
        ("target_modules", 3),
        ("target_modules", {"q", 3}),
        ("modules_to_save", [""]),
        ("modules_to_save", 5),
        ("layers_pattern", ("h(",)),
        ("init_weights", "gaussian"),
        ("layers_to_transform", -1),
        ("layers_to_transform", [1, "2"]),
        ("use_asa", 1),
        ("asa_target_subspaces", 0),
        ("init_warmup", -1),
        ("mask_interval", 0),
        ("asa_importance_beta", 1.0),
        ("asa_uncertainty_beta", float("nan")),
        ("asa_schedule_exponent", 0.0),
        ("svd_threshold", -0.1),
        ("random_seed", -1),
        ("asa_scope", "model"),
        ("asa_mode", "drop"),
        ("asa_compat", "original"),
        ("save_for_backward", "all"),
        ("backend", "abacus"),
    ],
)
def test_a_bad_value_is_refused_by_field_and_value(field, value):
    with pytest.raises(ValueError) as error:
        AdaMSSConfig(**{field: value})
    assert f"AdaMSSConfig.{field} = {value!r}" in str(error.value)


def test_asa_needs_a_pruning_ramp():
    AdaMSSConfig(init_warmup=50, final_warmup=50)
    with pytest.raises(ValueError, match="init_warmup = 50: expected less than final_warmup=50"):
        AdaMSSConfig(init_warmup=50, final_warmup=50, use_asa=True)


def test_a_config_is_immutable_hashable_and_survives_json():
    config = AdaMSSConfig(target_modules=["query", "value"], layers_to_transform=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 1
    restored = AdaMSSConfig(**json.loads(json.dumps(config.to_dict())))
    assert restored == config
    assert hash(restored) == hash(config)


@pytest.mark.parametrize(
    ("rows", "ranks", "error", "message"),
    [
        (torch.tensor([0, 1]), (1, 1), TypeError, "row_subspace: expected an int32 tensor, got torch.int64"),
        (int32(0, 2), (1, 1), ValueError, r"row_subspace: expected values in \[0, 2\)"),
        (int32(0, -1), (1, 1), ValueError, r"row_subspace: expected values in \[0, 2\)"),
        (int32(0, 0), (1, 1), ValueError, "subspace 1 owns no row"),
        (int32(0, 1), (1, 0), ValueError, "ranks: expected at least one rank, each >= 1"),
        (int32(0, 1), (1, 1.5), TypeError, r"ranks: expected integers, got \(1, 1.5\)"),
        (int32(0, 0), 2, TypeError, "ranks: expected integers, got 2"),
        (int32(), (1,), ValueError, r"row_subspace: expected shape \(N,\)"),
    ],
)
def test_a_bad_layout_is_refused(rows, ranks, error, message):
    with pytest.raises(error, match=message):
        SubspaceLayout(rows, ranks)


@st.composite
def layouts(draw):
    ranks = tuple(draw(st.lists(st.integers(1, 16), min_size=1, max_size=6)))
    K = len(ranks)
    extra = draw(st.lists(st.integers(0, K - 1), max_size=12))
    rows = draw(st.permutations(list(range(K)) + extra))
    return SubspaceLayout(int32(*rows), ranks)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_packing_is_lossless(layout):
    R = 4
    B = [torch.randn(r, R) for r in layout.ranks]
    C = [torch.randn(len(layout.rows(k)), r) for k, r in enumerate(layout.ranks)]
    packed = layout.pack(B, C)
    for before, after in zip((B, C), layout.unpack(*packed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert layout.num_parameters(R) == sum(t.numel() for t in (*B, *C))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_block_diagonal_holds_each_coefficient_once(layout):
    C = torch.rand(layout.num_rows, layout.r_max) + 1
    dense = block_diagonal(C, layout.row_subspace, layout.offsets, layout.rho)
    assert dense.shape == (layout.rho, layout.num_rows)
    for i, k in enumerate(layout.row_subspace.tolist()):
        start = int(layout.offsets[k])
        assert torch.equal(dense[start : start + layout.ranks[k], i], C[i, : layout.ranks[k]])
    assert int((dense != 0).sum()) == layout.num_parameters(0)
    mask = torch.arange(layout.num_subspaces) % 2 == 0
    spread = column_mask(mask, layout.offsets, layout.rho)
    assert spread.tolist() == [bool(mask[k]) for k, r in enumerate(layout.ranks) for _ in range(r)]


def test_packing_the_wrong_shapes_is_refused():
    layout = SubspaceLayout(int32(0, 1, 0), (2, 1))
    B, C = [torch.zeros(2, 4), torch.zeros(1, 4)], [torch.zeros(2, 2), torch.zeros(1, 1)]
    with pytest.raises(ValueError, match="expected 2 matrices each, got 1 and 2"):
        layout.pack(B[:1], C)
    with pytest.raises(ValueError, match=r"B\[1\]: expected shape \(1, 4\), got \(2, 4\)"):
        layout.pack([B[0], B[0]], C)
    with pytest.raises(ValueError, match=r"B\[1\]: expected shape \(1, 4\), got \(1, 5\)"):
        layout.pack([B[0], torch.zeros(1, 5)], C)
    with pytest.raises(ValueError, match=r"C\[0\]: expected shape \(2, 2\), got \(1, 1\)"):
        layout.pack(B, [C[1], C[1]])


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


def test_a_weight_of_equal_rows_gets_one_subspace():
    linear = nn.Linear(6, 5, bias=False)
    linear.weight.data.copy_(linear.weight.data[:1].expand(5, 6).clone())
    layer = FusedAdaMSSLinear.from_linear(linear, AdaMSSConfig(r=1, num_subspaces=3))
    assert layer.layout.num_subspaces <= 3
    assert layer(torch.randn(2, 6)).shape == (2, 5)


def test_indices_past_two_to_the_31_are_addressed():
    # N * M > 2**31 on meta: shapes and index arithmetic only, no memory.
    layer = make_layer(N=20).to("meta")
    y = layer(torch.empty(2**28, 24, device="meta"))
    assert y.shape == (2**28, 20)
    layout = SubspaceLayout(torch.empty(2**17, dtype=torch.int32, device="meta"), (3,) * 2**15)
    C = torch.empty(2**17, 3, device="meta")
    assert block_diagonal(C, layout.row_subspace, layout.offsets, layout.rho).numel() > 2**31
    assert adamss_linear is not None

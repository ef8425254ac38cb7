"""A layout is valid or refused, packs without loss, and addresses each coefficient once."""

from __future__ import annotations

import pytest
import torch
from conftest import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st

from adamss_kernels import SubspaceLayout
from adamss_kernels.layout import block_diagonal, column_mask


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


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


def test_indices_past_two_to_the_31_are_addressed():
    # N * M > 2**31 on meta: shapes and index arithmetic only, no memory.
    layer = make_layer(N=20).to("meta")
    y = layer(torch.empty(2**28, 24, device="meta"))
    assert y.shape == (2**28, 20)
    layout = SubspaceLayout(torch.empty(2**17, dtype=torch.int32, device="meta"), (3,) * 2**15)
    C = torch.empty(2**17, 3, device="meta")
    assert block_diagonal(C, layout.row_subspace, layout.offsets, layout.rho).numel() > 2**31

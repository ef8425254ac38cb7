"""SVD and clustering of a frozen weight: where basis, layout, B and C come from."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .config import AdaMSSConfig
from .layout import SubspaceLayout

logger = logging.getLogger(__name__)

# PEFT's constants: the row assignment of its checkpoints is rebuilt from them, so they can never change.
_KMEANS = {"init": "random", "n_init": 1, "max_iter": 10, "random_state": 123456789}


class Decomposition(NamedTuple):
    """Everything that AdaMSS derives from one frozen weight.

    Attributes:
        basis: A (R, D), dtype of the weight.
        basis_bias: a (R,), dtype of the weight; None without a bias.
        layout: Row assignment and ranks, on the weight's device.
        B: (RHO, R), orthonormal rows within each subspace; float32 for 16-bit weights, else the weight's dtype.
        C: (N, r_max), dtype of B.
    """

    basis: Tensor
    basis_bias: Tensor | None
    layout: SubspaceLayout
    B: Tensor
    C: Tensor


def decompose(weight: Tensor, bias: Tensor | None, config: AdaMSSConfig, *, name: str = "weight") -> Decomposition:
    """Initialise AdaMSS for one layer: randomised SVD, KMeans on the left factor's rows, per-subspace directions.

    The basis and the row assignment equal installed PEFT's bit for bit in the same process. The global random state is
    neither read nor changed. An SVD's bits depend on more than the arguments, though: on the number of threads, the
    instruction set, the library and the type of device. Between threads and instruction sets of one processor the basis
    was seen to move by 1e-4 to 6e-4 (relative) and single rows of it to change their sign, while its span kept within
    2e-6 and the row assignment did not change. Nothing that is stored may rest on those bits.

    Args:
        weight: W (N, D), any floating dtype.
        bias: (N,) or None.
        config: Uses r, num_subspaces, subspace_rank, use_dynamic_rank, svd_threshold, init_weights, random_seed.
        name: What messages call this weight.

    Raises:
        ValueError: The weight is not a floating (N, D) matrix with N, D >= 1, or has a value that is not finite, or
            is on `meta` with `use_dynamic_rank`.
    """
    param_dtype = torch.promote_types(weight.dtype, torch.float32)
    matrix = _require_matrix(weight, bias, name)
    if weight.is_meta:
        return _shapes_only(weight, bias, config, param_dtype, name)

    R = min(config.r, *matrix.shape)
    if config.subspace_rank > R:
        message = f"{name}: subspace_rank={config.subspace_rank} exceeds the rank of the basis and is clamped to {R}"
        warnings.warn(message, stacklevel=2)
    with _seeded(weight.device, config.random_seed):
        U, A = _truncated_svd(matrix, R)
        row_subspace = _cluster_rows(U, config.num_subspaces, name).to(weight.device)
        directions = [_subspace_directions(U[row_subspace == k], config) for k in range(int(row_subspace.max()) + 1)]
    ranks = tuple(B_k.shape[0] for B_k in directions)
    layout = SubspaceLayout(row_subspace, ranks)

    B = torch.cat(directions).to(param_dtype)
    C = torch.zeros(layout.num_rows, layout.r_max, dtype=param_dtype, device=weight.device)
    if config.init_weights is None:
        generator = torch.Generator().manual_seed(config.random_seed)
        noise = torch.randn(C.shape, generator=generator, dtype=torch.float32, device="cpu") * 0.01
        columns, ranks_of_rows = torch.arange(layout.r_max, device="cpu"), torch.tensor(ranks, device="cpu")
        structural = columns >= ranks_of_rows[row_subspace.cpu().long()][:, None]
        C.copy_(noise.masked_fill(structural, 0.0))

    return Decomposition(*_split(A, weight, bias), layout, B, C)


def rebuild_basis(
    weight: Tensor, bias: Tensor | None, config: AdaMSSConfig, *, name: str = "weight"
) -> tuple[Tensor, Tensor | None]:
    """Return the basis (R, D) and its column for the bias that `decompose` gives, without clustering the rows.

    Args:
        weight: As for `decompose`, and so are the others.
        bias: (N,) or None.
        config: Uses r and random_seed.
        name: What messages call this weight.

    Raises:
        ValueError: As `decompose`.
    """
    matrix = _require_matrix(weight, bias, name)
    with _seeded(weight.device, config.random_seed):
        _, A = _truncated_svd(matrix, min(config.r, *matrix.shape))
    return _split(A, weight, bias)


def _require_matrix(weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    """Return [W | bias] in float32, or raise a `ValueError` where it is not a finite matrix."""
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point matrix (N, D), got {weight.dtype} {tuple(weight.shape)}")
    matrix = augmented(weight, bias).to(torch.float32)
    if not weight.is_meta and not torch.isfinite(torch.stack(torch.aminmax(matrix))).all():
        raise ValueError(f"{name}: expected finite values, found NaN or infinity in the weight or bias")
    return matrix


def _split(A: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the basis and its column for the bias, in the weight's dtype, out of A (R, D~)."""
    A = A.to(weight.dtype)
    return (A.contiguous(), None) if bias is None else (A[:, :-1].contiguous(), A[:, -1].contiguous())


def augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return [weight | bias], the matrix that is decomposed."""
    return weight.detach() if bias is None else torch.cat((weight.detach(), bias.detach()[:, None]), dim=1)


def _truncated_svd(matrix: Tensor, R: int) -> tuple[Tensor, Tensor]:
    """Return U (N, R) and A = V^T (R, D~), drawing a random projection from the global generator."""
    U, _, V = torch.svd_lowrank(matrix, q=R, niter=2)
    return U.contiguous(), V.T.contiguous()


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Draw from a generator seeded with `seed` inside, and leave the global random state as it was."""
    fork = {"devices": []} if device.type == "cpu" else {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**fork):
        torch.manual_seed(seed)
        yield


def _cluster_rows(U: Tensor, num_subspaces: int, name: str) -> Tensor:
    """Return (N,) int32 on the CPU: the KMeans cluster of each row of U, empty clusters dropped."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    K = min(num_subspaces, U.shape[0])
    with warnings.catch_warnings():
        # Fewer distinct rows than clusters: said below in our own words.
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = KMeans(n_clusters=K, **_KMEANS).fit_predict(U.cpu().numpy())
    used, row_subspace = torch.from_numpy(labels).long().unique(return_inverse=True)
    if len(used) < num_subspaces:
        logger.info("%s: %d subspaces instead of %d (rows or distinct rows are fewer)", name, len(used), num_subspaces)
    return row_subspace.to(torch.int32)


def _subspace_directions(U_k: Tensor, config: AdaMSSConfig) -> Tensor:
    """Return B_k (r_k, R): the leading right singular vectors of U_k (n_k, R), each with its largest entry positive.

    They span what PEFT takes from the (n_k, n_k) Gram matrix U_k U_k^T, whose singular values are theirs squared.
    """
    r_k = min(config.subspace_rank, *U_k.shape)
    # Dynamic ranks look at all singular values; else a few more than are kept make the leading ones accurate.
    q = min(U_k.shape) if config.use_dynamic_rank else min(r_k + 6, *U_k.shape)
    _, sigma, V = torch.svd_lowrank(U_k, q=q, niter=2)
    if config.use_dynamic_rank:
        significant = int((sigma.square() > config.svd_threshold * sigma[0].square()).sum())
        r_k = max(1, min(r_k, significant))
    B_k = V[:, :r_k].T
    largest = B_k.gather(1, B_k.abs().argmax(dim=1, keepdim=True))
    return B_k * torch.where(largest < 0, -1.0, 1.0)


def _shapes_only(
    weight: Tensor, bias: Tensor | None, config: AdaMSSConfig, param_dtype: torch.dtype, name: str
) -> Decomposition:
    """Decomposition of a weight on `meta`: shapes as if no subspace were smaller than its rank."""
    if config.use_dynamic_rank:
        raise ValueError(f"{name}: use_dynamic_rank=True needs the weight's values, which a meta tensor does not have")
    N, D = weight.shape
    R = min(config.r, N, D + (bias is not None))
    ranks = (min(config.subspace_rank, R),) * min(config.num_subspaces, N)
    layout = SubspaceLayout(torch.empty(N, dtype=torch.int32, device="meta"), ranks)
    return Decomposition(
        weight.new_empty(R, D),
        None if bias is None else weight.new_empty(R),
        layout,
        weight.new_empty(layout.rho, R, dtype=param_dtype),
        weight.new_empty(N, layout.r_max, dtype=param_dtype),
    )

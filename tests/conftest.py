"""Fixtures and builders that several test files share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, SubspaceLayout, available_backends
from adamss_kernels.subspaces import Subspaces

pytest_plugins = ["cuda_on_host"]

# pytest's first process imports torchao when it is told of a warning of PEFT's, and what that logs would come after the
# summary, which has to be the last line.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

GPU_BACKENDS = ("triton", "cuda")
CPU_BACKENDS = [
    name for name, state in available_backends().items() if state == "available" and name not in GPU_BACKENDS
]


@dataclass
class Problem:
    """Random operands of `adamss_linear`, shaped as in docs/notation.md."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    basis: Tensor
    basis_bias: Tensor | None
    B: Tensor
    C: Tensor
    layout: SubspaceLayout

    @property
    def operands(self) -> tuple:
        return self.x, self.weight, self.bias, self.basis, self.basis_bias, self.B, self.C, self.layout

    def raw(self, active: Tensor | None = None, trainable: Tensor | None = None) -> tuple:
        """Detached operands as a backend's `forward` takes them: x, weight, bias, B, C and `Subspaces`."""
        x, weight, bias, basis, basis_bias, B, C = (None if t is None else t.detach() for t in self.operands[:-1])
        rows = (self.layout.row_subspace, self.layout.offsets)
        return x, weight, bias, B, C, Subspaces(basis, basis_bias, *rows, active, trainable)

    def to(self, dtype: torch.dtype, param_dtype: torch.dtype | None = None) -> Problem:
        """Cast to `dtype`, and B and C to `param_dtype`; the leaves are new and require grad where they did."""

        def cast(t: Tensor | None, to: torch.dtype = dtype) -> Tensor | None:
            return None if t is None else t.detach().to(to, copy=True).requires_grad_(t.requires_grad)

        frozen = [cast(t) for t in (self.x, self.weight, self.bias, self.basis, self.basis_bias)]
        return Problem(*frozen, cast(self.B, param_dtype or dtype), cast(self.C, param_dtype or dtype), self.layout)


def make_problem(
    M: int | tuple[int, ...] = 7,
    D: int = 13,
    N: int = 11,
    R: int = 5,
    ranks: tuple[int, ...] = (2, 1, 3),
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Problem:
    """Draw operands; every subspace owns at least one row, and structural zeros of C hold garbage on purpose."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    K = len(ranks)
    rows = torch.cat((torch.arange(K), torch.randint(0, K, (N - K,), generator=g)))
    layout = SubspaceLayout(rows[torch.randperm(N, generator=g)].to(torch.int32), ranks)
    shape = (M,) if isinstance(M, int) else M
    return Problem(
        x=randn(*shape, D).requires_grad_(),
        weight=randn(N, D) / D**0.5,
        bias=randn(N) if bias else None,
        basis=randn(R, D) / D**0.5,
        basis_bias=randn(R) if bias else None,
        B=randn(layout.rho, R).requires_grad_(),
        C=randn(N, layout.r_max).requires_grad_(),
        layout=layout,
    )


def randomise(layer: FusedAdaMSSLinear, seed: int = 0) -> FusedAdaMSSLinear:
    """Give C values, as training would: at initialisation the update is zero and hides errors."""
    C = torch.randn(layer.C.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    layer.C.data.copy_(
        C * (layer.C.new_tensor(layer.layout.ranks)[layer.row_subspace.long()][:, None] > torch.arange(C.shape[1]))
    )
    return layer


def make_layer(D: int = 24, N: int = 20, bias: bool = True, seed: int = 0, **config: object) -> FusedAdaMSSLinear:
    """A small layer with a trained-looking C."""
    torch.manual_seed(seed)
    options: dict = {"r": 8, "num_subspaces": 3, "subspace_rank": 2} | config
    return randomise(FusedAdaMSSLinear.from_linear(nn.Linear(D, N, bias=bias), AdaMSSConfig(**options)))


# In the order of the seconds that they take; what is missing here takes less.
LONGEST = ("triton_compile", "cpu", "bench_gpu", "examples", "bench", "cuda_compile", "distributed_docs", "travel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the files that take longest, so that no process is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path.stem, len(LONGEST)), item.path not in slow))


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def _poisoned_empty() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that memory which nobody wrote shows."""
    previous = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.utils.deterministic.fill_uninitialized_memory = previous[0]
    torch.use_deterministic_algorithms(previous[1])


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices that are small enough only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""`AdaMSSConfig`: every hyperparameter of an AdaMSS adapter, validated once."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

BACKENDS = ("reference", "cpu", "triton", "cuda")
"""Names of the implementations of `adamss_linear`, in no order of preference."""


def known_backend(requested: str) -> str:
    """Return `requested` if it is "auto" or one of `BACKENDS`; "native" is what 0.1.0 called "cpu".

    Raises:
        ValueError: It is neither.

    Warns:
        FutureWarning: It is the old name.
    """
    if requested == "native":
        warnings.warn(
            "backend: 'native' is called 'cpu' now; the old name goes with the next release", FutureWarning, 3
        )
        return "cpu"
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected 'auto' or one of {BACKENDS}, got {requested!r}")
    return requested


SAVE_FOR_BACKWARD = ("auto", "projection", "input")


ASA_FIELDS = (
    "asa_target_subspaces",
    "init_warmup",
    "final_warmup",
    "mask_interval",
    "asa_importance_beta",
    "asa_uncertainty_beta",
    "asa_schedule_exponent",
)
"""The hyperparameters of ASA that PEFT has too."""


@dataclass(frozen=True)
class AdaMSSConfig:
    """Hyperparameters of AdaMSS, with the field names and defaults of PEFT's `AdamssConfig`.

    Attributes:
        r: Rank R of the frozen SVD basis; clamped to min(R, N, D + bias) of each layer.
        num_subspaces: K, the number of clusters of output rows; clamped to N of each layer.
        subspace_rank: Rank r_k of each trainable subspace; with `use_dynamic_rank`, its upper bound.
        target_modules: Name suffixes, or one regular expression matched against full names, of the linear layers
            to adapt. None takes every `nn.Linear` outside `modules_to_save`.
        modules_to_save: Name suffixes of modules that are trained in full and saved with the adapter.
        init_weights: "orthogonal" starts from the frozen layer (C = 0); None draws a small random C.
        layers_to_transform: Layer index or indices to which name suffixes are restricted.
        layers_pattern: Name or names of the module list that carries the layer index.
        use_asa: Whether Adaptive Subspace Allocation prunes subspaces during training.
        asa_target_subspaces: Subspaces still trained at the end, in total or per layer (see `asa_scope`).
        init_warmup: Optimizer step t0 of the first importance update.
        final_warmup: Optimizer step t1 of the last pruning event.
        mask_interval: Optimizer steps between pruning events.
        asa_importance_beta: EMA coefficient of the importance |w * g|.
        asa_uncertainty_beta: EMA coefficient of the importance's deviation from its mean.
        asa_schedule_exponent: Exponent e of the budget T + (total - T) * (1 - (t - t0) / (t1 - t0)) ** e.
        use_dynamic_rank: Whether r_k counts the Gram singular values above `svd_threshold` times the largest.
        svd_threshold: Ratio used by `use_dynamic_rank`.
        random_seed: Seed of the SVD's random projection and of everything else that initialisation draws.
        asa_scope: "global" ranks the subspaces of all layers together; "layer" applies the target to each layer.
        asa_mode: "freeze" keeps a pruned subspace's contribution; "prune" also removes the contribution.
        asa_compat: "peft" reproduces PEFT's pruning decisions, including its off-by-one; None is exact.
        save_for_backward: What backward keeps of the input: "projection" P (M, R), "input" x (M, D), or "auto".
        backend: Implementation to run: "auto" or a name that `available_backends()` lists.

    Raises:
        ValueError: A field has a value outside its domain; the message names the field and the value.
    """

    r: int = 100
    num_subspaces: int = 5
    subspace_rank: int = 1
    target_modules: str | tuple[str, ...] | list[str] | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None
    init_weights: Literal["orthogonal"] | None = "orthogonal"
    layers_to_transform: int | tuple[int, ...] | list[int] | None = None
    layers_pattern: str | tuple[str, ...] | list[str] | None = None
    use_asa: bool = False
    asa_target_subspaces: int = 50
    init_warmup: int = 50
    final_warmup: int = 1000
    mask_interval: int = 100
    asa_importance_beta: float = 0.85
    asa_uncertainty_beta: float = 0.85
    asa_schedule_exponent: float = 3.0
    use_dynamic_rank: bool = False
    svd_threshold: float = 0.1
    random_seed: int = 0
    asa_scope: Literal["global", "layer"] = "global"
    asa_mode: Literal["freeze", "prune"] = "freeze"
    asa_compat: Literal["peft"] | None = None
    save_for_backward: Literal["auto", "projection", "input"] = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for field in ("r", "num_subspaces", "subspace_rank", "asa_target_subspaces", "mask_interval"):
            self._require(field, _is_int(getattr(self, field)) and getattr(self, field) >= 1, "an integer >= 1")
        for field in ("init_warmup", "final_warmup"):
            self._require(field, _is_int(getattr(self, field)) and getattr(self, field) >= 0, "an integer >= 0")
        self._require(
            "random_seed", _is_int(self.random_seed) and 0 <= self.random_seed < 2**63, "an integer in [0, 2**63)"
        )
        for field in ("asa_importance_beta", "asa_uncertainty_beta", "svd_threshold"):
            self._require(field, _is_real(getattr(self, field)) and 0 <= getattr(self, field) < 1, "a number in [0, 1)")
        self._require(
            "asa_schedule_exponent",
            _is_real(self.asa_schedule_exponent) and 0 < self.asa_schedule_exponent < math.inf,
            "a finite number > 0",
        )
        for field in ("use_asa", "use_dynamic_rank"):
            self._require(field, isinstance(getattr(self, field), bool), "a bool")
        if self.backend == "native":
            object.__setattr__(self, "backend", known_backend(self.backend))
        for field, choices in (
            ("init_weights", ("orthogonal", None)),
            ("asa_scope", ("global", "layer")),
            ("asa_mode", ("freeze", "prune")),
            ("asa_compat", (None, "peft")),
            ("save_for_backward", SAVE_FOR_BACKWARD),
            ("backend", ("auto", *BACKENDS)),
        ):
            self._require(field, getattr(self, field) in choices, f"one of {choices}")

        self._normalise_names("target_modules", regex=True)
        self._normalise_names("modules_to_save")
        self._normalise_names("layers_pattern")
        for pattern in self.layers_pattern or ():
            self._require_pattern("layers_pattern", pattern)
        if self.layers_to_transform is not None:
            value: Any = self.layers_to_transform
            indices = tuple(value) if isinstance(value, Iterable) else (value,)
            valid = bool(indices) and all(_is_int(i) and i >= 0 for i in indices)
            self._require("layers_to_transform", valid, "a layer index >= 0 or a non-empty list of them")
            object.__setattr__(self, "layers_to_transform", indices)
            self._require(
                "layers_to_transform",
                not isinstance(self.target_modules, str),
                "None when target_modules is a regular expression (put the indices into the expression)",
            )
        if self.use_asa:
            self._require(
                "init_warmup", self.init_warmup < self.final_warmup, f"less than final_warmup={self.final_warmup}"
            )

    def _require(self, field: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"AdaMSSConfig.{field} = {getattr(self, field)!r}: expected {expected}")

    def _normalise_names(self, field: str, regex: bool = False) -> None:
        value = getattr(self, field)
        if value is None:
            return
        if isinstance(value, str):
            if regex:
                self._require_pattern(field, value)
                return
            value = (value,)
        expected = "a non-empty list of module names" + (" or a regular expression" if regex else "")
        self._require(field, isinstance(value, Iterable), expected)
        names = tuple(value)
        self._require(field, bool(names) and all(isinstance(name, str) and name for name in names), expected)
        # A set has no order of its own; sorting keeps equal configs equal.
        object.__setattr__(self, field, tuple(sorted(names)) if isinstance(value, (set, frozenset)) else names)

    def _require_pattern(self, field: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"AdaMSSConfig.{field} = {getattr(self, field)!r}: not a regular expression: {error}"
            ) from None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-serialisable values; `AdaMSSConfig(**d)` restores the config."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}


def require_config(config: object) -> None:
    """Raise a TypeError for what is no `AdaMSSConfig`, say the config of PEFT, which is alike but for some fields."""
    if not isinstance(config, AdaMSSConfig):
        kind = f"{type(config).__module__}.{type(config).__qualname__}"
        raise TypeError(f"config: expected an adamss_kernels.AdaMSSConfig, got a {kind}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)

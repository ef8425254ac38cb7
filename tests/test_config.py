"""A configuration has PEFT's defaults, and is valid or refused by field and value."""

from __future__ import annotations

import dataclasses
import json

import pytest

from adamss_kernels import AdaMSSConfig


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


def test_the_backend_that_the_first_release_called_native_is_taken_with_a_warning():
    with pytest.warns(FutureWarning, match="'native' is called 'cpu' now"):
        assert AdaMSSConfig(backend="native").backend == "cpu"
    with pytest.raises(ValueError, match="backend"):
        AdaMSSConfig(backend="abacus")

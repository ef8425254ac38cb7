"""An adapted model is exported to ONNX in ONNX's own operators, and computes the same there."""

from __future__ import annotations

import pytest
import torch
from conftest import make_layer, randomise
from torch import nn

from adamss_kernels import AdaMSSConfig, FusedAdaMSSLinear, inject_adamss

pytest.importorskip("onnxscript")
reference = pytest.importorskip("onnx.reference")
pytestmark = pytest.mark.slow


def exported(model: nn.Module, x: torch.Tensor):
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("M")},), verbose=False)
    assert {node.domain for node in program.model.graph} == {""}, "nothing but standard operators"
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    return lambda x: torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_computes_in_onnx_what_it_does_here_for_any_number_of_tokens(bias):
    layer = make_layer(bias=bias)
    layer.set_masks(active=torch.tensor([True, False, True]), trainable=torch.tensor([True, True, False]))
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(20, 3)).eval()
    run = exported(model, torch.randn(5, 24))
    for M in (5, 3, 1):
        x = torch.randn(M, 24)
        # Sums of 24 terms of order one, in another order: a few roundings.
        torch.testing.assert_close(run(x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_an_adapted_conv1d_of_transformers_goes_the_same_way():
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D(20, 24)
    config = AdaMSSConfig(r=8, num_subspaces=3, subspace_rank=2, target_modules=["0"])
    model = inject_adamss(nn.Sequential(conv1d), config, progress=False).eval()
    randomise(model[0])
    x = torch.randn(4, 24)
    torch.testing.assert_close(exported(model, torch.randn(5, 24))(x), model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_merged_model_is_plain_in_onnx():
    model = nn.Sequential(make_layer()).eval()
    x = torch.randn(5, 24)
    expected = model(x).detach()
    layer = model[0]
    assert isinstance(layer, FusedAdaMSSLinear)
    layer.merge()
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model.graph] == ["Gemm"]
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    y = torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)

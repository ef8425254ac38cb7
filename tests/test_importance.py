"""ASA's averages are those of the weights as they are in each step, wherever and however they lie by then."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, inject_adamss

CONFIG = AdaMSSConfig(r=8, num_subspaces=3, subspace_rank=2, use_asa=True, init_warmup=1, mask_interval=50)


def draw(model: nn.Module, step: int) -> None:
    """Give every trained parameter values and a gradient, the same for each model."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def averages(change) -> dict[str, torch.Tensor]:
    """The averages after four steps, between which `change` was made to the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 30))
    inject_adamss(model, CONFIG, progress=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    allocator = SubspaceAllocator(model, CONFIG)
    allocator.attach(optimizer)
    for step in range(1, 5):
        draw(model, step)
        optimizer.step()
        allocator.update_and_allocate(step)
        if step == 2:
            change(model)
    state = allocator.state_dict()
    return {f"{kind}/{key}": t for kind in ("importance", "uncertainty") for key, t in state[kind].items()}


def lay_out_by_columns(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.t().contiguous().t()
    assert not parameter.is_contiguous()


CHANGES = {
    "one weight is not contiguous": lambda model: lay_out_by_columns(model[0].B),
    "no weight is contiguous": lambda model: [lay_out_by_columns(p) for p in model.parameters() if p.requires_grad],
    "one weight lies elsewhere": lambda model: setattr(model[1].C, "data", model[1].C.data.clone()),
    "one weight is another parameter": lambda model: setattr(model[1], "C", nn.Parameter(model[1].C.detach().clone())),
    "one weight is cast": lambda model: setattr(model[1].B, "data", model[1].B.data.double()),
    "the model is cast": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_averages_are_those_of_a_model_that_nobody_touched(change):
    untouched, touched = averages(lambda model: None), averages(CHANGES[change])
    assert untouched.keys() == touched.keys()
    for key, expected in untouched.items():
        torch.testing.assert_close(touched[key].float(), expected, msg=lambda text, key=key: f"{key}: {text}")
    assert change != "the model is cast" or all(t.dtype == torch.float64 for t in touched.values())


def test_frozen_rows_are_restored_after_the_model_was_cast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20))
    inject_adamss(model, CONFIG, progress=False)
    optimizer = torch.optim.SGD([model[0].B, model[0].C], lr=0.1, weight_decay=0.5)
    SubspaceAllocator(model, CONFIG).attach(optimizer)
    model[0].trainable[1] = False
    for cast in (model.float, model.double):
        draw(cast(), step=1)
        before = model[0].B.detach().clone()
        optimizer.step()
        assert [torch.equal(model[0].B[p], before[p]) for p in range(6)] == [False, False, True, True, False, False]


def test_peft_matrices_that_are_not_contiguous_any_more_are_scored_as_they_are():
    peft = pytest.importorskip("peft")
    from adamss_kernels import apply_adamss_kernels

    scores = []
    for by_columns in (False, True):
        torch.manual_seed(0)
        config = peft.AdamssConfig(
            r=8, num_subspaces=3, subspace_rank=2, target_modules=["0"], use_asa=True, init_warmup=1, final_warmup=100
        )
        model = apply_adamss_kernels(peft.get_peft_model(nn.Sequential(nn.Linear(30, 20)), config))
        for step in range(1, 5):
            draw(model, step)
            model.base_model.update_and_allocate(step)
            if step == 2 and by_columns:
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data = parameter.data.t().contiguous().t()
        layer = model.base_model.model[0]
        scores.append([*layer.exp_avg_ipt_A["default"], *layer.exp_avg_ipt_B["default"]])
    for contiguous, by_column in zip(*scores, strict=True):
        torch.testing.assert_close(by_column, contiguous)

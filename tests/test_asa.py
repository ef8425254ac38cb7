"""ASA leaves exactly the budget, takes PEFT's decisions on request, and freezes rows that no optimizer moves."""

import copy
import logging

import pytest
import torch
from asa_run import TOTAL, Run, chain, config
from torch import nn

from adamss_kernels import AdaMSSConfig, SubspaceAllocator, importance, inject_adamss
from adamss_kernels.model import adamss_layers
from adamss_kernels.schedule import keep_above_threshold, keep_top, scheduled_budget

pytestmark = pytest.mark.usefixtures("one_thread")


def frozen_rows(layer):
    """Return masks (RHO,) and (N,) of the rows of B and C whose subspace is frozen."""
    owner = torch.repeat_interleave(torch.arange(len(layer.layout.ranks)), torch.tensor(layer.layout.ranks))
    return ~layer.trainable[owner], ~layer.trainable[layer.row_subspace.long()]


# --- the schedule ---


@pytest.mark.parametrize("warmup", [(5, 47, 5), (1, 99, 100)])
@pytest.mark.parametrize("target", [1, 2, 5, 8, 16, 31, 32, 40])
def test_every_event_leaves_exactly_the_scheduled_number(target, warmup):
    first, last, interval = warmup
    cfg = config(asa_target_subspaces=target, init_warmup=first, final_warmup=last, mask_interval=interval)
    run = Run(cfg)
    events = 0
    for step in run.steps(0, last + 2):
        if first <= step <= last and (step % interval == 0 or step == last):
            events += 1
            fraction = 1 - (step - first) / (last - first)
            expected = min(TOTAL, int(target + (TOTAL - target) * fraction**3.0))
            assert run.active() == expected == scheduled_budget(step, TOTAL, cfg)
    assert events == len(run.allocator.history)
    assert run.active() == min(target, TOTAL)


def test_layer_scope_applies_the_target_to_each_layer():
    run = Run(config(asa_scope="layer", asa_target_subspaces=3)).until(48)
    assert list(run.allocator.active_counts().values()) == [3] * 4


def test_what_is_frozen_stays_frozen():
    run = Run(config(asa_target_subspaces=2))
    before = torch.ones(TOTAL, dtype=torch.bool)
    for _ in run.steps(0, 60):
        now = torch.cat([layer.trainable for layer in run.layers])
        assert not (now & ~before).any()
        before = now


def test_equal_scores_are_kept_in_order_of_their_index():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    keep = keep_top(scores, torch.tensor([True, True, False, True, True]), 3)
    assert keep.tolist() == [True, True, False, False, True]


def test_peft_keeps_one_fewer_than_the_budget_and_none_of_equals():
    everyone = torch.ones(4, dtype=torch.bool)
    assert keep_above_threshold(torch.tensor([4.0, 1.0, 3.0, 2.0]), everyone, 3).tolist() == [True, False, True, False]
    assert not keep_above_threshold(torch.ones(4), everyone, 3).any()


def test_freeze_keeps_the_contribution_and_prune_removes_it():
    frozen = Run(config()).until(48)
    pruned = Run(config(asa_mode="prune")).until(48)
    assert all(layer.active.all() for layer in frozen.layers)
    assert all(torch.equal(layer.active, layer.trainable) for layer in pruned.layers)
    x = torch.randn(3, 14)
    for layer in pruned.layers:
        delta = layer.delta_weight()
        assert not delta[~layer.active[layer.row_subspace.long()]].any()
    merged = nn.Sequential(*(layer.to_linear() for layer in pruned.layers))
    torch.testing.assert_close(pruned.model(x), merged(x))


# --- the same decisions as PEFT ---


def pack_from_peft(peft_layer, layer):
    """Copy PEFT's parameters and gradients (none where it has frozen them) into the packed layout."""
    A, B = peft_layer.adamss_A["default"], peft_layer.adamss_B["default"]
    grads = [[torch.zeros_like(p) if p.grad is None else p.grad for p in ps] for ps in (A, B)]
    with torch.no_grad():
        for parameter, value in zip((layer.B, layer.C), layer.layout.pack(list(A), list(B)), strict=True):
            parameter.copy_(value)
        layer.B.grad, layer.C.grad = layer.layout.pack(*grads)


@pytest.mark.parametrize("seed", range(5))
def test_compat_takes_the_decisions_of_installed_peft_at_every_step(seed):
    peft = pytest.importorskip("peft", minversion="0.21")
    fields = {"r": 8, "num_subspaces": 6, "subspace_rank": 2, "use_asa": True, "asa_target_subspaces": 5}
    fields |= {"init_warmup": 4, "final_warmup": 52, "mask_interval": 6}

    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(14, 19), nn.Tanh(), nn.Linear(19, 24), nn.Tanh(), nn.Linear(24, 17))
    # The same clustering in both: theirs sees what ours sees, under the same random state.
    cfg = AdaMSSConfig(**fields, asa_compat="peft", random_seed=seed)
    ours = inject_adamss(copy.deepcopy(base), cfg, progress=False)
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(base, peft.AdamssConfig(**fields, target_modules=["0", "2", "4"], random_seed=seed))
    peft_layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.adamss.layer.AdamssLayer)]
    layers = list(adamss_layers(ours).values())
    allocator = SubspaceAllocator(ours, cfg)

    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        theirs(torch.randn(6, 14)).square().mean().backward()
        optimizer.step()
        for peft_layer, layer in zip(peft_layers, layers, strict=True):
            pack_from_peft(peft_layer, layer)
        theirs.base_model.update_and_allocate(step)
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
        for peft_layer, layer in zip(peft_layers, layers, strict=True):
            expected = [p.requires_grad for p in peft_layer.adamss_A["default"]]
            assert layer.trainable.tolist() == expected, f"step {step}"
    assert sum(allocator.active_counts().values()) == 4, "one fewer than the target, as published"


# --- frozen rows ---

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["freeze", "prune"])
def test_frozen_rows_stay_bit_identical_under_every_optimizer(name, mode):
    run = Run(config(asa_mode=mode, asa_target_subspaces=9), OPTIMIZERS[name]).until(48)
    assert run.active() == 9
    before = copy.deepcopy([(layer.B, layer.C) for layer in run.layers])
    run.until(98, start=48)
    moved = 0
    for (B, C), layer in zip(before, run.layers, strict=True):
        for rows, old, new in zip(frozen_rows(layer), (B, C), (layer.B, layer.C), strict=True):
            assert torch.equal(old[rows].view(torch.int32), new[rows].view(torch.int32))
            moved += not torch.equal(old[~rows], new[~rows])
            state = [
                t for t in run.optimizer.state[new].values() if isinstance(t, torch.Tensor) and t.shape == new.shape
            ]
            assert state
            assert not any(t[rows].any() for t in state)
    assert moved, "the others train on"


def test_frozen_rows_survive_gradients_made_nan_by_clipping():
    run = Run(config()).until(48)
    before = copy.deepcopy(run.layers)
    run.backward(48)
    run.layers[0].C.grad[0] = torch.nan
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    assert run.layers[-1].B.grad.isnan().any()
    run.optimizer.step()
    for old, new in zip(before, run.layers, strict=True):
        rows = frozen_rows(new)[0]
        assert torch.equal(old.B[rows], new.B[rows])


def test_masks_that_come_with_a_checkpoint_are_obeyed_without_an_event():
    run = Run(config()).until(48)
    state = run.model.state_dict()
    other = Run(config(), OPTIMIZERS["adamw"])
    other.model.load_state_dict(state)
    other.until(120, start=100)
    for layer, trained in zip(other.layers, run.layers, strict=True):
        rows = frozen_rows(trained)[0]
        assert torch.equal(layer.B[rows], trained.B[rows])


# --- training as people do it ---


def test_steps_that_a_gradscaler_skips_are_not_scored():
    plain, scaled = Run(config(final_warmup=60)), Run(config(final_warmup=60))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(30):
        if step == 12:
            scaled.backward(step)
            scaler.scale(torch.zeros(())).item()
            scaled.layers[1].C.grad[3] = torch.inf
            scaler.step(scaled.optimizer)
            scaler.update()
            scaled.allocator.update_and_allocate(step)
            scaled.optimizer.zero_grad()
            assert scaler.get_scale() == 2.0**9
            continue
        plain.until(step + 1, start=step)
        scaled.until(step + 1, start=step)
    for a, b in zip(plain.layers, scaled.layers, strict=True):
        assert torch.equal(a.trainable, b.trainable)
        assert torch.equal(a.C, b.C)


def test_an_unattached_allocator_skips_a_step_with_a_gradient_that_is_not_finite():
    plain, hit = Run(config(), attach=False), Run(config(), attach=False)
    plain.until(8)
    hit.until(8)
    hit.backward(8)
    hit.layers[2].B.grad[0, 0] = torch.nan
    hit.allocator.update_and_allocate(8)
    a, b = plain.allocator.state_dict(), hit.allocator.state_dict()
    for key in ("importance", "uncertainty"):
        assert all(torch.equal(a[key][name], b[key][name]) for name in a[key])


def test_gradient_accumulation_scores_the_accumulated_gradient_once():
    once, halves = Run(config(), OPTIMIZERS["sgd"]), Run(config(), OPTIMIZERS["sgd"])
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 14, generator=generator), torch.randn(8, 21, generator=generator)
        nn.functional.mse_loss(once.model(x), y).backward()
        for part_x, part_y in zip(x.chunk(2), y.chunk(2), strict=True):
            (nn.functional.mse_loss(halves.model(part_x), part_y) / 2).backward()
        for run in (once, halves):
            run.optimizer.step()
            run.allocator.update_and_allocate(step)
            run.optimizer.zero_grad()
    for a, b in zip(once.layers, halves.layers, strict=True):
        assert torch.equal(a.trainable, b.trainable)


def test_taking_elements_in_blocks_changes_no_bit(monkeypatch):
    whole = Run(config()).until(23).allocator.state_dict()
    monkeypatch.setattr(importance, "_CPU_BLOCK", 37)
    in_blocks = Run(config()).until(23).allocator.state_dict()
    for key in ("importance", "uncertainty", "trainable"):
        assert all(torch.equal(in_blocks[key][name], t) for name, t in whole[key].items())


def test_zero_scores_prune_nothing_and_warn():
    run = Run(config(), attach=False)
    for step in range(5, 10):
        for layer in run.layers:
            layer.B.grad, layer.C.grad = torch.zeros_like(layer.B), torch.zeros_like(layer.C)
        run.allocator.update_and_allocate(step)
    for layer in run.layers:
        layer.B.grad, layer.C.grad = torch.zeros_like(layer.B), torch.zeros_like(layer.C)
    with pytest.warns(UserWarning, match="step 10: all scores are zero") as caught:
        run.allocator.update_and_allocate(10)
    assert caught[0].filename == __file__
    assert run.active() == TOTAL


def test_zero_scores_freeze_everything_with_compat_as_in_peft():
    run = Run(config(asa_compat="peft"), attach=False)
    for layer in run.layers:
        layer.B.grad, layer.C.grad = torch.zeros_like(layer.B), torch.zeros_like(layer.C)
    with pytest.warns(UserWarning, match="everything is frozen"):
        run.allocator.update_and_allocate(10)
    assert run.active() == 0


@pytest.mark.parametrize("attach", [True, False])
def test_weights_that_are_not_finite_raise_with_the_layers_name(attach):
    run = Run(config(), attach=attach).until(10)
    run.backward(10)
    run.optimizer.step()
    with torch.no_grad():
        run.layers[2].C[5, 0] = torch.nan
    before = copy.deepcopy([layer.trainable for layer in run.layers])
    with pytest.raises(ValueError, match=r"^2: at step 10 the importance of subspace \d is nan"):
        run.allocator.update_and_allocate(10)
    assert all(torch.equal(a, layer.trainable) for a, layer in zip(before, run.layers, strict=True))


def test_gradients_that_are_never_finite_raise_with_the_layers_name():
    run = Run(config(), attach=False)
    run.backward(0)
    run.layers[1].B.grad[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1: the gradient of B is not finite at step 10"):
        run.allocator.update_and_allocate(10)


def test_a_call_after_zero_grad_says_so():
    run = Run(config(), attach=False)
    with pytest.raises(RuntimeError, match=r"before optimizer\.zero_grad"):
        run.allocator.update_and_allocate(10)


def test_arguments_that_cannot_work_are_refused():
    cfg = config()
    model = inject_adamss(chain(), cfg, progress=False)
    with pytest.raises(ValueError, match="no FusedAdaMSSLinear"):
        SubspaceAllocator(chain(), cfg)
    with pytest.raises(ValueError, match="use_asa = False"):
        SubspaceAllocator(model, AdaMSSConfig())
    with pytest.raises(ValueError, match="asa_scope = 'layer'"):
        SubspaceAllocator(model, config(asa_compat="peft", asa_scope="layer"))
    with pytest.raises(ValueError, match="trains B or C"):
        SubspaceAllocator(model, cfg).attach(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"optimizer: expected a torch.optim.Optimizer, got a generator"):
        SubspaceAllocator(model, cfg).attach(model.parameters())
    with pytest.raises(TypeError, match="config: expected an adamss_kernels.AdaMSSConfig, got a builtins.dict"):
        SubspaceAllocator(model, {"use_asa": True})


# --- to look at ---


def test_every_event_is_logged_and_plotted(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    run = Run(config(asa_target_subspaces=1))
    with pytest.raises(ValueError, match="at least one event"):
        run.allocator.plot(tmp_path / "none.png")
    with caplog.at_level(logging.INFO, logger="adamss_kernels"):
        run.until(48)
    lines = [record.getMessage() for record in caplog.records if record.name == "adamss_kernels.asa"]
    assert len(lines) == len(run.allocator.history) == 10
    assert lines[0] == "ASA step 5: budget 32, active subspaces 32 -> 32, layers emptied: none"
    emptied = [name for line in lines for name in line.partition("emptied: ")[2].split(", ") if name != "none"]
    assert len(emptied) == len(set(emptied)) == 3
    run.allocator.plot(tmp_path / "asa.png")
    assert (tmp_path / "asa.png").stat().st_size > 0

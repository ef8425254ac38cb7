"""A run that is resumed is bit for bit the unbroken one, and a state that does not fit is refused."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from asa_run import Run, config, finished

from adamss_kernels import save_adapter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

RESUME_SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from adamss_kernels import load_adapter
from asa_run import Run, chain, config, finished
folder = Path(sys.argv[1])
run = Run(config(), model=load_adapter(chain(), folder))
state = torch.load(folder / "training.pt")
run.optimizer.load_state_dict(state["optimizer"])
run.allocator.load_state_dict(state["asa"])
torch.save(finished(run.until(60, start=31)), folder / "resumed.pt")
"""


def flatten(value, path=""):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{path}.{key}").items()}
    return {path: value}


def test_a_run_resumed_in_a_new_process_is_bit_identical(tmp_path):
    run = Run(config()).until(31)  # one step after an event: the EMAs are in use
    save_adapter(run.model, tmp_path)
    torch.save({"optimizer": run.optimizer.state_dict(), "asa": run.allocator.state_dict()}, tmp_path / "training.pt")
    expected = flatten(finished(run.until(60, start=31)))

    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    subprocess.run([sys.executable, "-c", RESUME_SCRIPT, str(tmp_path), str(here)], check=True, env=environment)
    resumed = flatten(torch.load(tmp_path / "resumed.pt"))
    assert resumed.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(value, resumed[key]) if isinstance(value, torch.Tensor) else value == resumed[key]
        assert same, key


def test_a_state_dict_is_a_copy_and_restores_masks_by_itself():
    run = Run(config()).until(31)
    state = run.allocator.state_dict()
    snapshot = copy.deepcopy(state)
    run.until(40, start=31)
    assert all(torch.equal(state["importance"][k], v) for k, v in snapshot["importance"].items())
    fresh = Run(config())
    fresh.allocator.load_state_dict(state)
    assert fresh.allocator.active_counts() == dict(zip("0123", snapshot["history"][-1][2], strict=True))


def test_a_state_of_another_model_is_refused():
    state = Run(config()).allocator.state_dict()
    other = Run(config(num_subspaces=4))
    with pytest.raises(ValueError, match=r"state_dict\['trainable'\]\['0'\]: expected shape \(4,\), got \(8,\)"):
        other.allocator.load_state_dict(state)
    with pytest.raises(ValueError, match=r"state_dict: expected the entries .*, got none for \['history'\]"):
        other.allocator.load_state_dict({key: value for key, value in state.items() if key != "history"})


def test_a_state_that_lacks_one_average_changes_nothing():
    run = Run(config()).until(23)
    state, own = run.allocator.state_dict(), Run(config()).until(18).allocator
    before = own.state_dict()
    del state["uncertainty"]["3.C"]
    with pytest.raises(ValueError, match=r"state_dict: expected an entry for '3\.C', got none"):
        own.load_state_dict(state)
    for kind in ("importance", "uncertainty", "trainable"):
        assert all(torch.equal(t, own.state_dict()[kind][key]) for key, t in before[kind].items())

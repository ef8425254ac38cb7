"""What the two fine-tuning scripts share: options, adaptation, a Trainer that survives kills, and the report."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hyperparameters
import numpy as np
import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from adamss_kernels import (
    AdaMSSConfig,
    ASACallback,
    inject_adamss,
    load_adapter,
    print_trainable_parameters,
    save_adapter,
)
from adamss_kernels.atomic import replace_file, sync
from adamss_kernels.config import BACKENDS
from adamss_kernels.model import adamss_layers

COMPLETE_FILE = "complete"
ARGUMENTS_FILE = "arguments.json"
REPORT_FILE = "report.json"
# What may change between a run and its continuation.
_FREE_ARGUMENTS = ("output_dir", "progress")
# What transformers calls queries and values; it differs between models and between its versions.
_QUERY_VALUE = (["query", "value"], ["q_proj", "v_proj"], ["q_lin", "v_lin"], ["q", "v"])


def parse_arguments(
    parser: argparse.ArgumentParser, defaults: dict[str, Any], asa_unit: str, argv: Sequence[str] | None
) -> argparse.Namespace:
    """Declare the shared options, and parse."""
    add = parser.add_argument
    add(
        "--output_dir",
        type=Path,
        default=Path("./output"),
        help="checkpoints, adapter and report; a run continues there",
    )
    add("--adamss_r", type=int, help="rank R of the SVD basis")
    add("--adamss_k", type=int, help="subspaces K per layer")
    add("--adamss_ri", type=int, help="rank r_k of each subspace")
    add("--target_modules", nargs="+", help="name suffixes of the layers to adapt (default: queries and values)")
    add("--use_asa", action="store_true", help="train ever fewer subspaces")
    add("--target_kk", type=int, help="subspaces still trained at the end (see --asa_scope)")
    add("--asa_scope", choices=("layer", "global"), default="layer", help="what --target_kk counts in")
    add("--asa_init_warmup", type=int, help=f"{asa_unit} before the first pruning")
    add("--asa_final_warmup", type=int, help=f"{asa_unit} until the last pruning")
    add("--asa_mask_interval", type=int, help=f"{asa_unit} between prunings")
    add("--num_epochs", type=int)
    add("--batch_size", type=int)
    add("--lr", type=float, help="learning rate of B and C (default: the published one)")
    add("--head_lr", type=float, help="learning rate of the new head (default: the published one)")
    add("--weight_decay", type=float, help="(default: the published one)")
    add("--warmup_ratio", type=float, help="share of the steps in which the learning rates rise")
    add("--backend", choices=("auto", *BACKENDS), default="auto", help="implementation of the layer")
    add("--seed", type=int, default=0)
    add("--max_train_samples", type=int, help="train on the first so many examples")
    add("--max_eval_samples", type=int, help="evaluate on the first so many examples")
    add("--save_steps", type=int, help="checkpoints also every so many optimizer steps")
    add("--no_progress", dest="progress", action="store_false", help="no progress bars")
    parser.set_defaults(**defaults)
    return parser.parse_args(argv)


def set_rates(args: argparse.Namespace, found: hyperparameters.Rates | None, fallback: hyperparameters.Rates) -> None:
    """Fill in the rates that the command line left open, and say where they come from."""
    source = "the published table" if found else "no published values for this task and model; PEFT's fallback"
    for name, value in (found or fallback)._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)
            print(f"{name} = {value} ({source})")


def fine_tune(
    args: argparse.Namespace,
    model: Any,
    train: Any,
    evaluation: Any,
    collate: Callable[[list[Any]], dict[str, Any]],
    metrics: Callable[[np.ndarray, np.ndarray], dict[str, float]],
    asa_steps: int,
) -> dict[str, Any]:
    """Adapt and train `model`, going on from the last complete checkpoint in `args.output_dir`; return the report.

    Args:
        args: From `parse_arguments`, with every rate set.
        model: A transformers model with a classification head.
        train: Dataset with `__len__`; likewise `evaluation`.
        evaluation: Evaluated after every epoch.
        collate: Examples to a batch with "labels".
        metrics: Logits and labels to named values, the most important one first.
        asa_steps: Optimizer steps in a unit of the ASA options.
    """
    _claim(args)
    head = next(name for name in ("classifier", "score") if isinstance(getattr(model, name, None), nn.Module))
    config = AdaMSSConfig(
        r=args.adamss_r,
        num_subspaces=args.adamss_k,
        subspace_rank=args.adamss_ri,
        target_modules=args.target_modules or query_and_value(model),
        modules_to_save=[head],
        use_asa=args.use_asa,
        asa_target_subspaces=args.target_kk,
        asa_scope=args.asa_scope,
        init_warmup=args.asa_init_warmup * asa_steps,
        final_warmup=args.asa_final_warmup * asa_steps,
        mask_interval=args.asa_mask_interval * asa_steps,
        random_seed=args.seed,
        backend=args.backend,
    )
    inject_adamss(model, config, progress=args.progress)
    callbacks: list[TrainerCallback] = [ASACallback()] if args.use_asa else []
    if hasattr(train, "set_epoch"):
        callbacks.append(TellEpoch(train))
    if args.save_steps:
        callbacks.append(SaveWithinEpochs(args.save_steps))
    # Last, so that the mark comes after whatever the others write into the checkpoint.
    callbacks.append(MarkComplete())
    trainer = AdapterTrainer(
        head=head,
        head_lr=args.head_lr,
        model=model,
        args=_training_arguments(args),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=evaluation,
        compute_metrics=lambda predicted: metrics(predicted.predictions, predicted.label_ids),
        callbacks=callbacks,
    )
    print_trainable_parameters(model)
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint is not None:
        print(f"continuing from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    save_adapter(model, args.output_dir / "adapter")
    report = _report(args, model, trainer.state.log_history, head)
    text = json.dumps(report, indent=2)
    replace_file(args.output_dir / REPORT_FILE, lambda path: path.write_text(text + "\n"))
    print(_as_text(report, args.output_dir))
    return report


def query_and_value(model: nn.Module) -> list[str]:
    """Return what the query and value projections are called in `model`."""
    endings = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for names in _QUERY_VALUE:
        if endings.issuperset(names):
            return names
    raise SystemExit(f"--target_modules: found none of {_QUERY_VALUE} in this model; name the layers to adapt")


class AdapterTrainer(Trainer):
    """A Trainer with its own learning rate for the head, whose checkpoints hold the adapter instead of the model."""

    def __init__(self, *args: Any, head: str, head_lr: float, **kwargs: Any) -> None:
        self.head, self.head_lr = head, head_lr
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make AdamW over two groups: the head, and the rest of what trains."""
        if self.optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
            for name, parameter in (model or self.model).named_parameters():
                if parameter.requires_grad:
                    groups[f".{self.head}." in f".{name}"].append(parameter)
            rates = {True: self.head_lr, False: self.args.learning_rate}
            self.optimizer = torch.optim.AdamW(
                [{"params": parameters, "lr": rates[is_head]} for is_head, parameters in groups.items()],
                weight_decay=self.args.weight_decay,
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # The masks, the basis and the row map are in it; the frozen weights, nearly all of a model, are not.
        save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Before the optimizer is made: this replaces the parameters.
        load_adapter(model or self.model, resume_from_checkpoint)


class TellEpoch(TrainerCallback):
    """Tells a data set which epoch begins, also where a run is continued in the middle of one."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first batch is read."""
        self.data.set_epoch(state.global_step * args.num_train_epochs // state.max_steps)


class SaveWithinEpochs(TrainerCallback):
    """Asks for a checkpoint every so many steps, but not at the end of an epoch, where one follows the evaluation."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after every optimizer step."""
        ends_epoch = state.global_step * args.num_train_epochs % state.max_steps == 0
        if state.global_step % self.steps == 0 and not ends_epoch:
            control.should_save = True


class MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete once all of it is on the disk; what is not marked is never continued from."""

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after a checkpoint has been written."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        replace_file(folder / COMPLETE_FILE, lambda path: path.write_text(f"{state.global_step}\n"))


def last_complete_checkpoint(output_dir: Path) -> Path | None:
    """Return the newest complete checkpoint, and delete those that a kill left incomplete."""
    complete: dict[int, Path] = {}
    for folder in output_dir.glob("checkpoint-*"):
        if (folder / COMPLETE_FILE).is_file():
            complete[int(folder.name.removeprefix("checkpoint-"))] = folder
        else:
            shutil.rmtree(folder)
    return complete[max(complete)] if complete else None


def _claim(args: argparse.Namespace) -> None:
    """Note what runs in the output folder, and refuse to continue another run there."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / ARGUMENTS_FILE
    mine = {key: value for key, value in vars(args).items() if key not in _FREE_ARGUMENTS}
    if path.is_file():
        theirs = json.loads(path.read_text())
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise SystemExit(
                    f"--output_dir {args.output_dir}: holds a run with {key} = {theirs.get(key)!r}, got "
                    f"{mine.get(key)!r}; name another folder"
                )
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(mine, indent=2) + "\n"))


def _training_arguments(args: argparse.Namespace) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(args.output_dir),
        num_train_epochs=args.num_epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        weight_decay=args.weight_decay,
        # Below one it is a share of all steps.
        warmup_steps=args.warmup_ratio,
        eval_strategy="epoch",
        logging_strategy="epoch",
        # After the evaluation, so that its metrics are in the checkpoint.
        save_strategy="epoch",
        # The one before stays until the new one is complete.
        save_total_limit=2,
        seed=args.seed,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=not args.progress,
        report_to="none",
    )


def _report(args: argparse.Namespace, model: nn.Module, history: list[dict[str, Any]], head: str) -> dict[str, Any]:
    """Return what the run has reached; nothing in it depends on when it was interrupted."""
    epochs = []
    for entry in history:
        if "eval_loss" in entry:
            values = {key.removeprefix("eval_"): value for key, value in entry.items() if key.startswith("eval_")}
            timeless = {k: v for k, v in values.items() if k != "runtime" and not k.endswith("per_second")}
            active = {"active_subspaces": entry["asa/active"]} if "asa/active" in entry else {}
            epochs.append({"epoch": round(entry["epoch"], 6), **timeless, **active})
    metric = next(key for key in epochs[-1] if key not in ("epoch", "loss"))
    layers = adamss_layers(model).values()
    return {
        "model": str(args.model_name_or_path),
        "dataset": str(args.dataset_name),
        "metric": metric,
        "best": max(epoch[metric] for epoch in epochs),
        "final": epochs[-1][metric],
        "epochs": epochs,
        "parameters": {
            "model": sum(p.numel() for p in model.parameters()),
            "adapter": sum(layer.layout.num_parameters(layer.basis.shape[0]) for layer in layers),
            "head": sum(p.numel() for p in model.get_submodule(head).parameters()),
        },
        "subspaces": {
            "total": sum(layer.layout.num_subspaces for layer in layers),
            "still_trained": sum(int((layer.active & layer.trainable).sum()) for layer in layers),
        },
    }


def _as_text(report: dict[str, Any], output_dir: Path) -> str:
    columns = list(report["epochs"][-1])
    lines = ["", "".join(f"{name:>22}" for name in columns)]
    lines += ["".join(f"{epoch.get(name, float('nan')):>22.4g}" for name in columns) for epoch in report["epochs"]]
    sizes, subspaces = report["parameters"], report["subspaces"]
    share = sizes["adapter"] / sizes["model"]
    lines += [
        "",
        f"{report['metric']}: {report['final']:.4f} at the end, {report['best']:.4f} at best",
        f"trained: {sizes['adapter']:,} adapter parameters ({share:.3%} of the model), {sizes['head']:,} in the head",
        f"subspaces still trained at the end: {subspaces['still_trained']} of {subspaces['total']}",
        f"adapter: {output_dir / 'adapter'}, report: {output_dir / REPORT_FILE}",
    ]
    return "\n".join(lines)

"""Fine-tune a text classifier with AdaMSS: a GLUE task, or any data set of texts and labels from the hub or a folder.

`--dataset_name` is a GLUE task (cola, mrpc, qnli, rte, sst2, stsb, ...), a data set of the hub, a folder that
`Dataset.save_to_disk` wrote, or a folder with train and validation files (csv, json, jsonl or parquet). Run again with
the same command, it goes on from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hyperparameters
import numpy as np

TASKS = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the report."""
    import training
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="roberta-base", help="model of the hub, or a folder")
    parser.add_argument("--dataset_name", default="cola", help="GLUE task, data set of the hub, or a folder")
    parser.add_argument("--max_length", type=int, default=512, help="tokens that are kept of a text")
    args = training.parse_arguments(parser, hyperparameters.GLUE_DEFAULTS, "epochs", argv)
    found = hyperparameters.published(hyperparameters.GLUE, args.model_name_or_path, args.dataset_name)
    training.set_rates(args, found, hyperparameters.GLUE_FALLBACK)

    set_seed(args.seed)
    data = load(args.dataset_name)
    train, evaluation, labels = splits(data, args)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    texts = TASKS.get(args.dataset_name) or text_columns(train)

    def tokenize(batch: dict[str, list[Any]]) -> dict[str, Any]:
        tokens: dict[str, Any] = tokenizer(
            *(batch[name] for name in texts), truncation=True, max_length=args.max_length
        )
        return tokens | {"labels": batch["label"]}

    train, evaluation = (
        part.map(tokenize, batched=True, remove_columns=part.column_names, desc="tokenize")
        for part in (train, evaluation)
    )
    model = AutoModelForSequenceClassification.from_pretrained(
        args.model_name_or_path, num_labels=len(labels) or 1, ignore_mismatched_sizes=True
    )
    model.config.id2label = dict(enumerate(labels)) or model.config.id2label
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    steps_per_epoch = -(-len(train) // args.batch_size)
    collate = DataCollatorWithPadding(tokenizer)
    return training.fine_tune(
        args, model, train, evaluation, collate, metric_of(args.dataset_name, bool(labels)), steps_per_epoch
    )


def load(name: str) -> Any:
    """Return the `DatasetDict` that `--dataset_name` means."""
    import datasets

    folder = Path(name)
    if name in TASKS:
        return datasets.load_dataset("nyu-mll/glue", name)
    if not folder.is_dir():
        return datasets.load_dataset(name)
    if (folder / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    for suffix in ("csv", "json", "jsonl", "parquet"):
        files = {path.stem: str(path) for path in folder.glob(f"*.{suffix}")}
        if "train" in files:
            return datasets.load_dataset("json" if suffix == "jsonl" else suffix, data_files=files)
    raise SystemExit(f"--dataset_name {name}: the folder has no train.csv, .json, .jsonl or .parquet")


def splits(data: Any, args: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    """Return the training and the evaluation part, both with a column "label", and the labels' names.

    The names are empty where the labels are numbers to regress on.
    """
    import datasets

    train = data["train"]
    name = next((part for part in ("validation", "validation_matched", "test") if part in data), None)
    if name is None:
        divided = train.train_test_split(test_size=0.1, seed=args.seed)
        train, evaluation = divided["train"], divided["test"]
    else:
        evaluation = data[name]
    column = next((c for c in ("label", "labels", "fine_label") if c in train.column_names), None)
    if column is None:
        raise SystemExit(f"--dataset_name {args.dataset_name}: has no column 'label' among {train.column_names}")
    if column != "label":
        train, evaluation = (part.rename_column(column, "label") for part in (train, evaluation))
    names: list[str] = []
    if not str(getattr(train.features["label"], "dtype", "")).startswith("float"):
        if not isinstance(train.features["label"], datasets.ClassLabel):
            feature = datasets.ClassLabel(names=sorted({str(label) for label in train["label"]}))
            train, evaluation = (
                part.map(lambda row: {"label": str(row["label"])}).cast_column("label", feature)
                for part in (train, evaluation)
            )
        names = list(train.features["label"].names)
    parts = []
    for part, count in ((train, args.max_train_samples), (evaluation, args.max_eval_samples)):
        parts.append(part if count is None else part.select(range(min(count, len(part)))))
    return parts[0], parts[1], names


def text_columns(part: Any) -> tuple[str, ...]:
    """Return the columns of text: at most two, in the order of the data set."""
    names = [n for n, kind in part.features.items() if n != "label" and getattr(kind, "dtype", None) in _TEXT]
    if not 1 <= len(names) <= 2:
        raise SystemExit(f"--dataset_name: expected one or two columns of text, got {names}")
    return tuple(names)


_TEXT = ("string", "large_string")


def metric_of(task: str, classifies: bool) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    """Return the metric by which GLUE judges a task; accuracy, or Pearson's correlation, for other data."""

    def correlation(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"pearson": float(np.corrcoef(logits.squeeze(-1), labels)[0, 1])}

    def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return {"accuracy": float((logits.argmax(-1) == labels).mean())}

    def matthews(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        from sklearn.metrics import matthews_corrcoef

        return {"matthews_correlation": float(matthews_corrcoef(labels, logits.argmax(-1)))} | accuracy(logits, labels)

    if not classifies:
        return correlation
    return matthews if task == "cola" else accuracy


if __name__ == "__main__":
    main()

"""The published hyperparameters per task and model, which the two scripts take as defaults.

Learning rates and weight decays are Tables 18 and 19 of the AdaMSS paper (Zheng et al., NeurIPS 2025) as transcribed in
Hugging Face PEFT, examples/adamss_finetuning (glue_adamss_asa_example.py, and image_classification_adamss_asa.py in the
commits of pull request 2987), which also give K, r_k, epochs, batch size and warmup. The original repository's
run-glue-adamss.bash and run-vit-adamss.bash (github.com/jzheng20/AdaMSS) agree where they name values.
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """Learning rate of B and C, learning rate of the head, weight decay."""

    lr: float
    head_lr: float
    weight_decay: float


GLUE: dict[str, dict[str, Rates]] = {
    "roberta-base": {
        "cola": Rates(1e-3, 5e-3, 5e-3),
        "mrpc": Rates(1e-2, 5e-4, 0.0),
        "qnli": Rates(1e-3, 5e-3, 5e-3),
        "rte": Rates(5e-4, 5e-3, 5e-3),
        "sst2": Rates(1e-3, 5e-3, 5e-4),
        "stsb": Rates(1e-3, 5e-3, 5e-3),
    },
    "roberta-large": {
        "cola": Rates(5e-3, 5e-4, 0.1),
        "mrpc": Rates(1e-3, 5e-5, 5e-3),
        "qnli": Rates(5e-4, 5e-2, 5e-3),
        "rte": Rates(5e-3, 5e-3, 0.5),
        "sst2": Rates(1e-3, 5e-4, 0.0),
        "stsb": Rates(1e-3, 5e-4, 5e-4),
    },
}

IMAGES: dict[str, dict[str, Rates]] = {
    "vit-base-patch16-224-in21k": {
        "cars": Rates(1e-2, 5e-3, 0.0),
        "cifar10": Rates(1e-2, 5e-3, 5e-2),
        "cifar100": Rates(1e-2, 5e-3, 5e-2),
        "eurosat": Rates(1e-2, 5e-4, 5e-2),
        "fgvc": Rates(1e-2, 5e-3, 5e-4),
        "pets": Rates(5e-3, 5e-3, 5e-4),
        "resisc": Rates(1e-2, 5e-3, 5e-4),
    },
    "vit-large-patch16-224-in21k": {
        "cars": Rates(1e-2, 5e-3, 0.1),
        "cifar10": Rates(1e-2, 5e-2, 0.1),
        "cifar100": Rates(1e-2, 5e-2, 5e-2),
        "eurosat": Rates(1e-2, 5e-4, 1e-2),
        "fgvc": Rates(1e-2, 5e-4, 5e-4),
        "pets": Rates(1e-3, 5e-4, 5e-4),
        "resisc": Rates(1e-2, 5e-4, 0.1),
    },
}

# PEFT's scripts fall back on these for tasks and models that the tables do not have.
GLUE_FALLBACK = Rates(1e-3, 5e-3, 5e-3)
IMAGES_FALLBACK = Rates(1e-2, 5e-3, 5e-4)

GLUE_DEFAULTS = {
    "adamss_r": 100,
    "adamss_k": 10,
    "adamss_ri": 1,
    "target_kk": 5,
    "num_epochs": 100,
    "batch_size": 32,
    "warmup_ratio": 0.06,
    # In epochs.
    "asa_init_warmup": 5,
    "asa_final_warmup": 95,
    "asa_mask_interval": 10,
}

IMAGES_DEFAULTS = {
    "adamss_r": 100,
    "adamss_ri": 3,
    "target_kk": 5,
    "num_epochs": 10,
    "batch_size": 32,
    "warmup_ratio": 0.0,
    # In optimizer steps.
    "asa_init_warmup": 50,
    "asa_final_warmup": 1000,
    "asa_mask_interval": 100,
}

IMAGES_K = {"vit-large-patch16-224-in21k": 16}
IMAGES_K_FALLBACK = 10


def published(table: dict[str, dict[str, Rates]], model: str, task: str) -> Rates | None:
    """Return the rates for a model, named by its last path component, and a task; None where none were published."""
    return table.get(model.rstrip("/").rsplit("/", 1)[-1], {}).get(task)

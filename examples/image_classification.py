"""Fine-tune an image classifier with AdaMSS on a data set from the hub or a folder of images.

`--dataset_name` is one of the published tasks (cars, cifar10, cifar100, eurosat, fgvc, pets, resisc), a data set of the
hub, a folder that `Dataset.save_to_disk` wrote, or a folder of images `<split>/<label>/<image>`. Run again with the
same command, it goes on from its last complete checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hyperparameters
import numpy as np
import torch
from torch import Tensor

# Where the hub keeps the data sets of the paper: training part, test part.
PUBLISHED = {
    "cars": ("Multimodal-Fatima/StanfordCars_train", "Multimodal-Fatima/StanfordCars_test"),
    "cifar10": ("Multimodal-Fatima/CIFAR10_train", "Multimodal-Fatima/CIFAR10_test"),
    "cifar100": ("cifar100", "cifar100"),
    "eurosat": ("timm/eurosat-rgb", "timm/eurosat-rgb"),
    "fgvc": ("Multimodal-Fatima/FGVC_Aircraft_train", "Multimodal-Fatima/FGVC_Aircraft_test"),
    "pets": ("timm/oxford-iiit-pet", "timm/oxford-iiit-pet"),
    "resisc": ("timm/resisc45", "timm/resisc45"),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line and return the report."""
    import training
    from glue import splits
    from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model_name_or_path", default="google/vit-base-patch16-224-in21k", help="hub name, or a folder"
    )
    parser.add_argument("--dataset_name", default="cifar10", help="published task, data set of the hub, or a folder")
    parser.add_argument("--no_augmentation", action="store_true", help="train on the images as they are")
    args = training.parse_arguments(parser, hyperparameters.IMAGES_DEFAULTS, "optimizer steps", argv)
    model_name = Path(args.model_name_or_path).name
    args.adamss_k = args.adamss_k or hyperparameters.IMAGES_K.get(model_name, hyperparameters.IMAGES_K_FALLBACK)
    found = hyperparameters.published(hyperparameters.IMAGES, args.model_name_or_path, args.dataset_name)
    training.set_rates(args, found, hyperparameters.IMAGES_FALLBACK)

    set_seed(args.seed)
    train, evaluation, labels = splits(load(args.dataset_name), args)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    train, evaluation = (
        Images(part, processor, None if part is evaluation or args.no_augmentation else args.seed)
        for part in (train, evaluation)
    )
    model = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
    )
    return training.fine_tune(args, model, train, evaluation, collate, accuracy, asa_steps=1)


def load(name: str) -> Any:
    """Return the `DatasetDict` that `--dataset_name` means."""
    import datasets

    if name in PUBLISHED:
        first, second = PUBLISHED[name]
        return datasets.DatasetDict(
            train=datasets.load_dataset(first, split="train"), test=datasets.load_dataset(second, split="test")
        )
    if not Path(name).is_dir():
        return datasets.load_dataset(name)
    if (Path(name) / "dataset_dict.json").is_file():
        return datasets.load_from_disk(name)
    return datasets.load_dataset("imagefolder", data_dir=name)


class Images(torch.utils.data.Dataset):
    """Images as pixels (3, size, size) with their labels, varied in training.

    How an image is varied follows from the seed, the epoch and its index, and not from a generator that goes on from
    image to image: a run that is continued in the middle of an epoch must see what the unbroken one would have seen,
    although data are read ahead.
    """

    def __init__(self, part: Any, processor: Any, seed: int | None) -> None:
        """Take a part of a data set and the model's image processor; a seed of None leaves the images as they are."""
        column = next((name for name in ("image", "img") if name in part.column_names), None)
        if column is None:
            raise SystemExit(f"--dataset_name: has no column 'image' among {part.column_names}")
        self.part, self.column, self.seed, self.epoch = part, column, seed, 0
        self.size = processor.size["height"]
        self.mean, self.std = (
            torch.tensor(list(v))[:, None, None] for v in (processor.image_mean, processor.image_std)
        )

    def set_epoch(self, epoch: int) -> None:
        """Vary the images in another way from now on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.part[index]
        image = row[self.column].convert("RGB")
        if self.seed is None:
            image = centred(image, self.size)
        else:
            chance = np.random.default_rng((self.seed, self.epoch, index))
            image = varied(image, self.size, chance.random(5).tolist())
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": row["label"]}


def varied(image: Any, size: int, chance: Sequence[float]) -> Any:
    """Cut out 8 % to 100 % of the area at a ratio of 3:4 to 4:3, resize it, and mirror every other one.

    Args:
        image: Of any size.
        size: Of the result, in both directions.
        chance: Five numbers in [0, 1): for area, ratio, place (x and y) and mirroring.
    """
    width, height = image.size
    area, ratio, x, y, mirror = chance
    area = width * height * (0.08 + 0.92 * area)
    ratio = math.exp(math.log(4 / 3) * (2 * ratio - 1))
    w, h = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = x * (width - w), y * (height - h)
    image = image.resize((size, size), resample=_BILINEAR, box=(left, top, left + w, top + h))
    return image.transpose(_MIRROR) if mirror < 0.5 else image


def centred(image: Any, size: int) -> Any:
    """Cut out the largest square in the middle and resize it."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.resize((size, size), resample=_BILINEAR, box=(left, top, left + side, top + side))


# PIL's constants, by value: it need not be imported for `--help`.
_BILINEAR, _MIRROR = 2, 0


def collate(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack examples to pixels (n, 3, size, size) and labels (n,)."""
    return {
        "pixel_values": torch.stack([example["pixel_values"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


def accuracy(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the share of images that are labelled correctly."""
    return {"accuracy": float((logits.argmax(-1) == labels).mean())}


if __name__ == "__main__":
    main()

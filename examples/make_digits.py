"""Write a small image classification task and a model for it: scikit-learn's handwritten digits as a folder of images.

The model, a transformers ViT, is pretrained here on the digits 0 to 4; the folder holds 5 to 9, for adapting it. Needs
no download.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

SIZE = 16


def main() -> None:
    """Write images/ and model/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, nargs="?", default=Path("digits"), help="folder (default: digits)")
    parser.add_argument("--epochs", type=int, default=25, help="epochs of pretraining (default: 25)")
    args = parser.parse_args()
    write_images(args.output / "images")
    write_model(args.output / "model", args.epochs)


def write_images(folder: Path) -> None:
    """Write the digits 5 to 9 as `<split>/<digit>/<number>.png`, every fourth one for validation."""
    from PIL import Image

    from adamss_kernels.cli.digits import load_digits_split

    data = load_digits_split(5, 9)
    for split, x, y in (("train", data.train_x, data.train_y), ("validation", data.test_x, data.test_y)):
        for number, (image, label) in enumerate(zip(x, y.tolist(), strict=True)):
            path = folder / split / str(5 + label) / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = (image * 255).round().to(torch.uint8).numpy()
            Image.fromarray(pixels).resize((SIZE, SIZE), resample=Image.Resampling.BILINEAR).save(path)
        print(f"{folder / split}: {len(y)} images")


def write_model(folder: Path, epochs: int) -> None:
    """Pretrain a ViT on the digits 0 to 4 and save it with its image processor."""
    from tqdm.auto import tqdm
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    from adamss_kernels.cli.digits import load_digits_split

    torch.manual_seed(0)
    data = load_digits_split(0, 4)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=SIZE,
            patch_size=4,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            num_labels=5,
        )
    )

    def pixels(images: torch.Tensor) -> torch.Tensor:
        large = torch.nn.functional.interpolate(images[:, None], size=(SIZE, SIZE), mode="bilinear")
        return (large * 2 - 1).expand(-1, 3, -1, -1)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    batches = -(-len(data.train_y) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * batches)
    for _ in tqdm(range(epochs), desc="pretrain on 0-4", unit="epoch"):
        for index in torch.randperm(len(data.train_y)).split(64):
            model(pixel_values=pixels(data.train_x[index]), labels=data.train_y[index]).loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = (model(pixel_values=pixels(data.test_x)).logits.argmax(1) == data.test_y).float().mean().item()
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    print(f"{folder}: accuracy on 0-4 {right:.1%}")


if __name__ == "__main__":
    main()

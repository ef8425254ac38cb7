"""Fine-tune a small BERT by a `transformers.Trainer` under whatever accelerate is configured for.

    accelerate launch --config_file examples/fsdp2.yaml examples/distributed_trainer.py --output_dir out

Model and data are made up. A run that is started again goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from adamss_kernels import AdaMSSConfig, ASACallback, inject_adamss, save_adapter


def dataset() -> list[dict[str, object]]:
    """Return 256 sequences, labelled by whether their first number is odd."""
    ids = torch.randint(0, 64, (256, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]


def main() -> None:
    """Train, or go on training, and save the adapter."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("./output"))
    args = parser.parse_args()

    arguments = TrainingArguments(
        str(args.output_dir),
        max_steps=16,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        save_steps=8,
        logging_steps=8,
        average_tokens_across_devices=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, **shape))
    config = AdaMSSConfig(
        r=16, num_subspaces=4, target_modules=["query", "value"], modules_to_save=["classifier"], use_asa=True
    )
    inject_adamss(model, config, progress=False)
    asa = ASACallback(target_kk=6, init_warmup=2, final_warmup=12, mask_interval=2)
    trainer = Trainer(model, arguments, train_dataset=dataset(), callbacks=[asa])
    last = get_last_checkpoint(args.output_dir) if args.output_dir.is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    save_adapter(trainer.model, args.output_dir / "adapter")
    if trainer.is_world_process_zero():
        entry = [e for e in trainer.state.log_history if "loss" in e][-1]
        print(f"step {entry['step']}, loss {entry['loss']:.5f}, active subspaces {entry['asa/active']}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

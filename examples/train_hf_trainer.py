"""The pruned ViT in transformers' Trainer: a LoRA and a head on scikit-learn's digits.

    pip install "fastrecycle[examples]"
    python examples/train_hf_trainer.py --steps 100 --out runs/trainer

Trainer wants a model that takes a batch by names and returns its loss; the rest is its own. The
LoRA is written as a PEFT folder.
"""

from __future__ import annotations

from pathlib import Path

import torch
import tyro
from lora_module import LoRAClassifier, digits
from torch import Tensor
from transformers import EvalPrediction, Trainer, TrainingArguments

from fastrecycle import LoRA, ViT


class LoRAForTrainer(LoRAClassifier):
    """A `LoRAClassifier` that computes its own loss."""

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Loss and logits of images (B, 3, S, S) uint8 with labels (B,)."""
        logits = super().forward(pixels)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def by_name(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """A batch of (pixels, label) as the arguments of `forward`."""
    pixels, labels = zip(*rows, strict=True)
    return {"pixels": torch.stack(pixels), "labels": torch.stack(labels)}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """In percent."""
    return {"accuracy": 100 * (prediction.predictions.argmax(1) == prediction.label_ids).mean()}


def main(
    out: Path,
    steps: int = 100,
    batch: int = 64,
    prune: tuple[int, float] = (6, 0.5),
    lr: float = 1e-3,
    seed: int = 0,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> float:
    """Train, save the LoRA with its head, and print the accuracy on held-out digits.

    Args:
        out: the PEFT folder.
        steps: of AdamW.
        batch: images a step.
        prune: block after whose attention tokens are dropped, and the share dropped.
        lr: AdamW's peak rate, which Trainer lets fall in a line.
        seed: of the start, the split and the batches.
        device: cuda or cpu.

    Returns:
        Accuracy on the held-out fifth, in percent.

    """
    torch.manual_seed(seed)
    vit = ViT.from_pretrained("demo")
    train, held_out = digits(vit, seed)
    model = LoRAForTrainer(vit, LoRA.init(vit.config, rank=4, seed=seed), 10, dict([prune]))
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=128,
        learning_rate=lr,
        logging_steps=20,
        seed=seed,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        save_strategy="no",  # it would write the frozen backbone too
        report_to="none",
        remove_unused_columns=False,  # rows are tuples, named by `by_name`
        label_names=["labels"],
        dataloader_pin_memory=device != "cpu",
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=by_name,
        train_dataset=train,
        eval_dataset=held_out,
        compute_metrics=accuracy,
    )
    trainer.train()
    result = trainer.evaluate()["eval_accuracy"]
    model.lora.save(out)
    print(f"{result:.1f} % of {len(held_out)} held-out digits; LoRA: {out}")
    return result


if __name__ == "__main__":
    tyro.cli(main)

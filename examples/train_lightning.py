"""The pruned ViT in Lightning: a LoRA and a head on scikit-learn's digits.

    pip install "fastrecycle[examples]"
    python examples/train_lightning.py --steps 100 --out runs/lightning

Devices, precision and checkpoints are Lightning's; the LoRA is written as a PEFT folder.
"""

from __future__ import annotations

import logging
from pathlib import Path

import lightning
import torch
import tyro
from lora_module import LoRAClassifier, digits
from torch import Tensor
from torch.utils.data import DataLoader

from fastrecycle import LoRA, ViT


class DigitsModule(lightning.LightningModule):
    """Cross-entropy of a `LoRAClassifier`, by Adam.

    Args:
        model: what learns.
        lr: Adam's rate.

    """

    def __init__(self, model: LoRAClassifier, lr: float):
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The loss of a batch (pixels, labels)."""
        pixels, labels = batch
        loss = torch.nn.functional.cross_entropy(self.model(pixels), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch: list[Tensor], index: int) -> None:
        """Accuracy, in percent."""
        pixels, labels = batch
        right = self.model(pixels).argmax(1) == labels
        self.log("accuracy", 100 * right.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the LoRA and the head."""
        learns = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(learns, lr=self.lr)


def main(
    out: Path,
    steps: int = 100,
    batch: int = 64,
    prune: tuple[int, float] = (6, 0.5),
    lr: float = 1e-3,
    seed: int = 0,
    accelerator: str = "auto",
) -> float:
    """Train, save the LoRA with its head, and print the accuracy on held-out digits.

    Args:
        out: the PEFT folder.
        steps: of Adam.
        batch: images a step.
        prune: block after whose attention tokens are dropped, and the share dropped.
        lr: Adam's rate.
        seed: of the start, the split and the batches.
        accelerator: Lightning's: auto, gpu or cpu.

    Returns:
        Accuracy on the held-out fifth, in percent.

    """
    lightning.seed_everything(seed, verbose=False)
    vit = ViT.from_pretrained("demo")
    train, held_out = digits(vit, seed)
    module = DigitsModule(
        LoRAClassifier(vit, LoRA.init(vit.config, rank=4, seed=seed), 10, dict([prune])), lr
    )
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator=accelerator,
        devices=1,
        precision="bf16-mixed" if accelerator != "cpu" and torch.cuda.is_available() else 32,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(train, batch, shuffle=True, drop_last=True))
    (result,) = trainer.test(module, DataLoader(held_out, 128), verbose=False)
    module.model.lora.save(out)
    print(f"{result['accuracy']:.1f} % of {len(held_out)} held-out digits; LoRA: {out}")
    return result["accuracy"]


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    tyro.cli(main)

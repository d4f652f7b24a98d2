"""A frozen, pruned ViT with a LoRA and a head as one `nn.Module`, and scikit-learn's digits for it.

What train_lightning.py and train_hf_trainer.py share: both want a module that owns what it learns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, random_split

from fastrecycle import Head, LoRA, ViT
from fastrecycle.eval import decode


class LoRAClassifier(nn.Module):
    """Logits of a LoRA and a linear head on a frozen backbone that drops tokens on the way.

    Args:
        vit: the backbone; it is frozen here.
        lora: where to start.
        classes: number of them.
        prune: {block, 0-based: share of its patches dropped}.

    """

    def __init__(self, vit: ViT, lora: LoRA, classes: int, prune: dict[int, float]):
        super().__init__()
        self.vit, lora = vit.requires_grad_(False), lora.clone()
        self.a, self.b = nn.ParameterDict(lora.a), nn.ParameterDict(lora.b)
        for target, scale in lora.scale.items():
            self.register_buffer(f"scale_{target}", scale)
        self.head = nn.Linear(vit.config.features, classes)
        self.start, self.prune = lora, prune

    @property
    def lora(self) -> LoRA:
        """The LoRA as it stands: its tensors are this module's parameters, so gradients reach them.

        Made anew at each use, because a move to another device replaces buffers.
        """
        scale = {target: self.get_buffer(f"scale_{target}") for target in self.a}
        head = Head(self.head.weight, self.head.bias)
        return replace(self.start, a=dict(self.a), b=dict(self.b), scale=scale, head=head)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, S, S) uint8."""
        images = self.vit.normalise(pixels.float() / 255)
        return self.head(self.vit(images, self.lora, prune=self.prune))


def digits(vit: ViT, seed: int = 0) -> tuple[TensorDataset, TensorDataset]:
    """Digits as (pixels (3, S, S) uint8, label): those to train on, and a held-out fifth."""
    data = decode(vit, "digits")
    images = TensorDataset(data.pixels, torch.from_numpy(data.labels))
    train, held_out = random_split(images, (0.8, 0.2), torch.Generator().manual_seed(seed))
    return train, held_out

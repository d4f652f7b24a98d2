"""NN and LoRAs Avg + NN: the nearest class centre, without any training (App. D)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrecycle.baselines.base import AverageOf, FrozenFeatures
from fastrecycle.classifier import Distance, class_means, prototype_logits
from fastrecycle.lora import LoRA
from fastrecycle.ops import Backend
from fastrecycle.vit import ViT


class NearestCentre(FrozenFeatures):
    """Classify by the nearest class mean: "NN", and with a bank "LoRAs Avg + NN".

    Args:
        vit, bank, of, batch_size, precision, backend: see `FrozenFeatures`.
        distance: see `prototype_logits`.

    """

    def __init__(
        self,
        vit: ViT,
        bank: Sequence[LoRA] | None = None,
        of: AverageOf = "factors",
        distance: Distance = "euclidean",
        batch_size: int = 64,
        precision: str = "fp32",
        backend: Backend = "auto",
    ):
        self.vit = vit
        self.bank = bank
        self.of = of
        self.distance = distance
        self.batch_size = batch_size
        self.precision = precision
        self.backend = backend

    def check(self) -> None:
        """See `FrozenFeatures.check`."""
        if self.distance not in ("euclidean", "squared", "cosine"):
            raise ValueError(
                f'distance: expected "euclidean", "squared" or "cosine", got {self.distance!r}'
            )

    def parameters(self, ways: int, features: int) -> int:
        """None are trained."""
        return 0

    def _adapt(self, support: Tensor, index: Tensor, ways: int) -> tuple[Tensor, ...]:
        centres = [class_means(support[:, index == way], 1) for way in range(ways)]
        return (torch.cat(centres, -2),)  # (E, W, F)

    def _logits(self, rule: tuple[Tensor, ...], query: Tensor) -> Tensor:
        return prototype_logits(rule[0], query, self.distance)

"""Linear probe and LoRAs Avg + Linear: only a classification head is trained (App. D).

E tasks, n support images, W ways, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastrecycle.baselines.base import AverageOf, FrozenFeatures
from fastrecycle.lora import LoRA
from fastrecycle.ops import Backend
from fastrecycle.vit import ViT

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


def check_descent(optimizer: str, lr: float, steps: int) -> None:
    """Raise unless these are settings of gradient descent.

    Raises:
        ValueError: one is not.

    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f'optimizer: expected "sgd" or "adam", got {optimizer!r}')
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr: must be positive and finite, got {lr}")
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")


class LinearProbe(FrozenFeatures):
    """Softmax regression on frozen features: "Linear-probe", and with a bank "LoRAs Avg + Linear".

    Each step takes the whole support set. Weights and biases start at zero, so that nothing is
    random: the loss is convex, and a random head would only add noise to so few steps.

    Args:
        vit, bank, of, batch_size, precision, backend: see `FrozenFeatures`.
        optimizer: "sgd", without momentum, or "adam".
        lr: learning rate; the paper takes the best of .1, .01 and .001 (see `choose`).
        steps: the paper has 50 and 5.

    """

    def __init__(
        self,
        vit: ViT,
        bank: Sequence[LoRA] | None = None,
        of: AverageOf = "factors",
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.01,
        steps: int = 50,
        batch_size: int = 64,
        precision: str = "fp32",
        backend: Backend = "auto",
    ):
        self.vit = vit
        self.bank = bank
        self.of = of
        self.optimizer = optimizer
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.precision = precision
        self.backend = backend

    def check(self) -> None:
        """See `FrozenFeatures.check`."""
        check_descent(self.optimizer, self.lr, self.steps)

    def parameters(self, ways: int, features: int) -> int:
        """Weights and biases of the head."""
        return ways * (features + 1)

    def _adapt(self, support: Tensor, index: Tensor, ways: int) -> tuple[Tensor, ...]:
        # With as many images of each class the bias's first slope is 0 but for rounding, which Adam
        # would scale up to a step of its own: in float32 up to lr, in float64 1e-8 of it.
        support = support.double()
        count, images, width = support.shape
        weight = support.new_zeros(count, width, ways)
        bias = support.new_zeros(count, 1, ways)
        optimizer = OPTIMIZERS[self.optimizer]((weight, bias), lr=self.lr)
        truth = torch.nn.functional.one_hot(index, ways).to(support)  # (n, W)
        for _ in range(self.steps):
            p = torch.baddbmm(bias, support, weight).softmax(-1)  # (E, n, W)
            # Gradient of a task's mean cross-entropy by its logits: (p - truth) / n. Both
            # optimizers treat each number by itself, so each task trains as it would alone.
            slope = (p - truth) / images
            weight.grad = support.transpose(1, 2) @ slope
            bias.grad = slope.sum(1, keepdim=True)
            optimizer.step()
        return weight.float(), bias.float()

    def _logits(self, rule: tuple[Tensor, ...], query: Tensor) -> Tensor:
        weight, bias = rule
        return torch.baddbmm(bias, query, weight)

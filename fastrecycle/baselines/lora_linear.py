"""LoRA + Linear: a fresh LoRA and a linear head are trained (App. D; Hu et al., 2021).

E tasks, n images, L blocks, R rank, S side, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastrecycle.baselines.tuning import TunedNetwork
from fastrecycle.lora import LoRA, LoRAStack
from fastrecycle.ops import autocast
from fastrecycle.vit import ViT


class LoRALinear(TunedNetwork):
    """Train a LoRA on the frozen backbone, and a linear head, on the support set.

    All tasks start from the same random `a` and from b = 0, scale 1; see `LoRA.init`.

    Args:
        vit, optimizer, lr, steps, batch_size, precision: see `TunedNetwork`.
        rank: of the LoRA; the paper's is 4.
        targets: see `LoRA.init`.
        seed: of the LoRA's start.

    """

    def __init__(
        self,
        vit: ViT,
        rank: int = 4,
        targets: Sequence[str] = ("q", "v"),
        seed: int = 0,
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.01,
        steps: int = 50,
        batch_size: int = 64,
        precision: str = "fp32",
    ):
        self.vit = vit
        self.rank = rank
        self.targets = targets
        self.seed = seed
        self.optimizer = optimizer
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.precision = precision

    def check(self) -> None:
        """See `AdaptedNetwork.check`."""
        super().check()
        self._fresh()  # raises where rank or targets are out of range

    def _fresh(self) -> LoRA:
        return LoRA.init(self.vit.config, self.rank, targets=self.targets, seed=self.seed)

    def parameters(self, ways: int) -> int:
        """The LoRA's and the head's."""
        return self._fresh().parameters + self.rule.parameters(ways, self.vit.config.features)

    def _start(self, tasks: int) -> dict[str, Tensor]:
        lora = self._fresh().to(self.vit.pos_embed, non_blocking=True)
        factors = {f"a.{t}": x for t, x in lora.a.items()} | {
            f"b.{t}": x for t, x in lora.b.items()
        }
        return {name: x.expand(tasks, *x.shape).clone() for name, x in factors.items()}

    def _features(self, network: dict[str, Tensor], images: Tensor) -> Tensor:
        return stacked_features(self.vit, unpacked(network), images, self.precision)


def unpacked(network: dict[str, Tensor]) -> LoRAStack:
    """The LoRAs of scale 1 whose factors are named "a.TARGET" (E, L, R, d_in) and "b.TARGET"."""
    a, b = ({k[2:]: x for k, x in network.items() if k.startswith(f"{f}.")} for f in "ab")
    return LoRAStack(a, b, {t: torch.ones_like(x[:, :, 0, 0]) for t, x in a.items()})


def stacked_features(vit: ViT, stack: LoRAStack, images: Tensor, precision: str) -> Tensor:
    """Features (E, n, F) of images (E, n, 3, S, S), each task's under the stack's LoRA or gate."""
    with autocast(images.device, precision):
        return vit(images.flatten(0, 1), stack).unflatten(0, images.shape[:2])

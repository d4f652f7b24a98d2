"""Full Finetuning: the whole backbone and a linear head are trained (App. D).

E tasks, n images, S side, F features.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrecycle.baselines.tuning import TunedNetwork
from fastrecycle.ops import autocast
from fastrecycle.vit import ViT


class FullFineTuning(TunedNetwork):
    """Train every weight of the backbone, and a linear head, on the support set.

    The weights of the tasks of a batch lie stacked, and `torch.func.vmap` runs each task's images
    under its own. BatchNorm in a stem keeps its stored statistics.

    Args:
        vit, optimizer, lr, steps, batch_size, precision: see `TunedNetwork`.

    """

    def __init__(
        self,
        vit: ViT,
        optimizer: Literal["sgd", "adam"] = "sgd",
        lr: float = 0.01,
        steps: int = 50,
        batch_size: int = 64,
        precision: str = "fp32",
    ):
        self.vit = vit
        self.optimizer = optimizer
        self.lr = lr
        self.steps = steps
        self.batch_size = batch_size
        self.precision = precision

    def parameters(self, ways: int) -> int:
        """All of the backbone's, and the head's."""
        own = sum(p.numel() for p in self.vit.parameters())
        return own + self.rule.parameters(ways, self.vit.config.features)

    def _start(self, tasks: int) -> dict[str, Tensor]:
        return {
            name: p.detach().expand(tasks, *p.shape).clone()
            for name, p in self.vit.named_parameters()
        }

    def _features(self, network: dict[str, Tensor], images: Tensor) -> Tensor:
        buffers = dict(self.vit.named_buffers())

        def one(weights: dict[str, Tensor], pixels: Tensor) -> Tensor:
            return functional_call(self.vit, (weights, buffers), (pixels,))

        # Under vmap a tensor does not say that it needs a gradient, so fused attention on CUDA
        # would not keep what its backward reads; that of the CPU has no rule for vmap at all.
        with sdpa_kernel(SDPBackend.MATH), autocast(images.device, self.precision):
            return vmap(one)(network, images)

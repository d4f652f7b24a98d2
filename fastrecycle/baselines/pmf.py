"""P>M>F: pre-train, meta-train on the synthetic pool, fine-tune (Hu et al., CVPR 2022; App. D).

E tasks, W ways, n support images, S side.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastrecycle.baselines.full_finetuning import FullFineTuning
from fastrecycle.baselines.network import Adapted, AdaptedNetwork, PrototypeRule, Rule
from fastrecycle.config import MetaConfig
from fastrecycle.vit import ViT

# M: a ProtoNet with cosine prototypes at scale 10, all of the backbone, cross-entropy on labels;
# tasks and augmentation are the meta-LoRA's. `meta_train(vit, pool, PMF_META).vit` is the model.
# Its authors let the scale learn, from 10 on, and a bias beside it.
PMF_META = MetaConfig(
    learn="backbone", start="zero", target="label", distance="cosine", lr=5e-5, schedule="cosine"
)

# F: the rates of its authors' code; 0 is no fine-tuning. They choose for each data set on its test
# tasks, we on validation tasks.
PMF_GRID: dict[str, tuple[Any, ...]] = {"lr": (0.0, 1e-4, 1e-3, 1e-2)}

AUGMENTED = 0.9  # share of the steps


class PMF(FullFineTuning):
    """Fine-tune a meta-trained backbone with augmented support images as queries: "P>M>F".

    Each step classifies the support images, flipped, shifted and with other colours, by the
    cosine to the class means of the support images as they are, and moves every weight by Adam.

    Args:
        vit: meta-trained, `meta_train(vit, pool, PMF_META).vit`; never changed.
        lr: Adam's rate, chosen on validation tasks from `PMF_GRID`; 0 fine-tunes nothing.
        steps: of Adam.
        seed: of the augmentation, which all tasks share.
        batch_size, precision: see `AdaptedNetwork`.

    """

    optimizer: Literal["sgd", "adam"] = "adam"
    rule: Rule = PrototypeRule("cosine")

    def __init__(
        self,
        vit: ViT,
        lr: float = 1e-4,
        steps: int = 50,
        seed: int = 0,
        batch_size: int = 64,
        precision: str = "fp32",
    ):
        self.vit = vit
        self.lr = lr
        self.steps = steps
        self.seed = seed
        self.batch_size = batch_size
        self.precision = precision

    def check(self) -> None:
        """See `AdaptedNetwork.check`."""
        if self.lr == 0:
            AdaptedNetwork.check(self)
        else:
            super().check()

    def parameters(self, ways: int) -> int:
        """All of the backbone's, or none."""
        return 0 if self.lr == 0 else super().parameters(ways)

    def _views(self, images: Tensor, step: int) -> Tensor | None:
        """The support images as its authors augment them, in normalised space.

        One flip for all; each image has its own brightness, saturation and contrast, and a shift
        by up to an eighth of the side, behind which comes 0.
        """
        # the same for every task, so that one of many comes out as it would alone
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        if rng.random() >= AUGMENTED:
            return None
        count, side = images.shape[1], images.shape[-1]
        x = images.flip(-1) if rng.random() < 0.5 else images
        drawn = torch.from_numpy(rng.random((3, count, 1, 1, 1))).to(images)
        x = x + (drawn[0] - 0.5)
        grey = x.mean(2, keepdim=True)
        x = grey + 2 * drawn[1] * (x - grey)
        mean = x.mean((2, 3, 4), keepdim=True)
        x = mean + (drawn[2] + 0.5) * (x - mean)
        reach = int(side / 8 + 0.5)
        shift = rng.integers(0, 2 * reach + 1, (2, count, 1))
        rows, columns = (torch.from_numpy(s + np.arange(side)).to(x.device) for s in shift)
        padded = torch.nn.functional.pad(x, (reach,) * 4)
        image = torch.arange(count, device=x.device)[:, None, None]
        moved = padded[:, image, :, rows[:, :, None], columns[:, None]]  # (n, S, S, E, 3)
        return moved.permute(3, 0, 4, 1, 2)

    def _adapt(self, images: Tensor, way: Tensor, ways: int) -> Adapted:
        if self.lr > 0:
            return super()._adapt(images, way, ways)
        network = self._start(len(images))
        with torch.no_grad():
            support = self._features(network, images)
        return Adapted(network, self.rule.fitted({}, support, way, ways))

"""Gradient descent on the support set, many tasks side by side.

E tasks, W ways, n support images, S side, F features.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from fastrecycle.baselines.linear import OPTIMIZERS, check_descent
from fastrecycle.baselines.network import Adapted, AdaptedNetwork, LinearRule, Rule


class TunedNetwork(AdaptedNetwork):
    """A network trained on the support set together with a linear head (App. D).

    Each step takes the whole support set. The tasks' losses are summed, and both optimizers treat
    each number by itself, so each task trains as it would alone. A subclass says by `_start` and
    `_features` what is trained; it may set another `rule` and, by `_views`, augment. It declares
    these arguments among its own:

    Args:
        vit, batch_size, precision: see `AdaptedNetwork`.
        optimizer: "sgd", without momentum, or "adam".
        lr: learning rate; the paper takes the best of .1, .01 and .001 (see `choose`).
        steps: the paper has 50 and 5.

    """

    optimizer: Literal["sgd", "adam"]
    lr: float
    steps: int
    rule: Rule = LinearRule()

    def check(self) -> None:
        """See `AdaptedNetwork.check`."""
        super().check()
        check_descent(self.optimizer, self.lr, self.steps)

    @abstractmethod
    def _start(self, tasks: int) -> dict[str, Tensor]:
        """What is trained of the network, each (E, ...), in memory of its own."""

    def _views(self, images: Tensor, step: int) -> Tensor | None:
        """The images (E, m n, 3, S, S) to be classified in a step, in the order of the support.

        None: the support images (E, n, 3, S, S) themselves.
        """
        return None

    def _losses(
        self, network: dict[str, Tensor], head: dict[str, Tensor], images: Tensor, way: Tensor,
        ways: int, step: int,
    ) -> Tensor:  # fmt: skip
        """Mean cross-entropy of each task, (E,)."""
        views = self._views(images, step)
        support = None
        if views is None or self.rule.reads_support:
            support = self._features(network, images)
        features = support if views is None else self._features(network, views)
        assert features is not None
        logits = self.rule.logits(self.rule.fitted(head, support, way, ways), features)
        truth = way.repeat(len(images), features.shape[1] // len(way))
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), truth.flatten(), reduction="none"
        )
        return losses.view(truth.shape).mean(1)

    def _adapt(self, images: Tensor, way: Tensor, ways: int) -> Adapted:
        count = len(images)
        network = self._start(count)
        head = self.rule.start(count, ways, self.vit.config.features, images.device)
        trained = [*network.values(), *head.values()]
        for tensor in trained:
            tensor.requires_grad_()
        optimizer = OPTIMIZERS[self.optimizer](trained, lr=self.lr)
        with torch.enable_grad():
            for step in range(self.steps):
                losses = self._losses(network, head, images, way, ways, step)
                # a backbone may have weights that its feature does not depend on
                gradients = torch.autograd.grad(losses.sum(), trained, allow_unused=True)
                for tensor, gradient in zip(trained, gradients, strict=True):
                    tensor.grad = gradient
                optimizer.step()
        for tensor in trained:
            tensor.requires_grad_(False)
            tensor.grad = None
        support = None
        if self.rule.reads_support:
            with torch.no_grad():
                support = self._features(network, images)
        return Adapted(network, self.rule.fitted(head, support, way, ways))

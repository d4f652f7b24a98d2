"""Images inverted from a small CNN, to stand beside those from LoRAs (Fig. 7).

B images, C classes, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastrecycle.pool import SyntheticPool
from fastrecycle.prior import ResNetPrior, load_prior


@dataclass(frozen=True)
class CnnImages:
    """Images of one class each, of one LoRA's classes."""

    task: int  # position of the LoRA in the pool
    labels: tuple[int, ...]
    plain: Tensor  # (C, 3, S, S) floats in [0, 1]; cross-entropy alone
    with_statistics: Tensor  # the same with the CNN's own R_BN
    agreement: tuple[float, float]  # share of each that the CNN assigns to its class


def load_cnn(source: str | Path) -> ResNetPrior:
    """The network to invert: "demo", or a ResNet's file that tells its own conventions.

    Raises:
        FileNotFoundError, ValueError: see `load_prior`; also a network of another kind.

    """
    network = load_prior(source)
    if not isinstance(network, ResNetPrior):
        raise ValueError(
            f"small_cnn: expected demo or a ResNet's file, got {source}; downloaded networks are"
            " no small CNNs"
        )
    return network


def class_directions(cnn: ResNetPrior, images: Tensor, labels: Tensor) -> Tensor:
    """A head for a CNN that has none: unit class means of its features, (C, F).

    Args:
        cnn: the network.
        images: (B, 3, S, S) in [0, 1].
        labels: (B,) int64; the C of them that occur, ascending, are the rows.

    """
    with torch.no_grad():
        features = cnn.features(images)[0]
    means = torch.stack([features[labels == label].mean(0) for label in labels.unique()])
    return nn.functional.normalize(means - means.mean(0), dim=1)


def invert_cnn(
    cnn: ResNetPrior,
    head: Tensor,
    side: int,
    *,
    alpha: float = 0.0,
    iterations: int = 200,
    lr: float = 0.05,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> tuple[Tensor, float]:
    """One image a class by gradient descent on pixels: cross-entropy + alpha R_BN.

    Args:
        cnn: the network, with its own BatchNorm statistics.
        head: (C, F) unit directions of the classes among its features.
        side: S, pixels.
        alpha: weight of R_BN; 0: cross-entropy alone.
        iterations, lr: of Adam on pixels in [0, 1].
        seed: of the noise it starts from.
        on_step: called after each iteration.

    Returns:
        Images (C, 3, S, S) in [0, 1], and the share of them that the CNN assigns to their class.

    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(head), 3, side, side, generator=generator)
    images = (0.5 + 0.2 * noise).clamp_(0, 1).to(head.device).requires_grad_()
    labels = torch.arange(len(head), device=head.device)
    optimiser = torch.optim.Adam([images], lr=lr, betas=(0.5, 0.99))
    reach = side // 8  # rolled and flipped as LoRA Inversion's images are
    for step in range(iterations):
        rows, columns = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
        seen = images.roll((rows, columns), (2, 3))
        if torch.rand((), generator=generator) < 0.5:
            seen = seen.flip(3)
        features, r_bn = cnn.features(seen)
        logits = 10 * nn.functional.normalize(features - features.mean(0), dim=1) @ head.T
        loss = nn.functional.cross_entropy(logits, labels) + alpha * r_bn.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            images.clamp_(0, 1)
        on_step(step + 1)
    with torch.no_grad():
        features = cnn.features(images)[0]
        right = (features - features.mean(0)) @ head.T
    return images.detach().cpu(), float((right.argmax(1) == labels).float().mean())


def cnn_images(
    cnn: ResNetPrior,
    pool: SyntheticPool,
    *,
    loras: int = 2,
    classes: int = 5,
    alpha: float = 0.01,
    iterations: int = 200,
    seed: int = 0,
    on_step: Callable[[int], None] = lambda step: None,
) -> list[CnnImages]:
    """Images of the first LoRAs' classes from a CNN, without and with its own R_BN."""
    found = []
    device = next(cnn.buffers()).device
    for task in range(min(loras, len(pool.parts))):
        part = pool.parts[task]
        labels = part.labels.unique()[:classes]
        if len(labels) < 2:
            continue
        used = torch.isin(part.labels, labels)
        pixels = part.images[used].to(device).float() / 255
        head = class_directions(cnn, pixels, part.labels[used].to(device))
        side = part.images.shape[-1]
        options = {"iterations": iterations, "seed": seed + task, "on_step": on_step}
        plain, right = invert_cnn(cnn, head, side, **options)  # type: ignore[arg-type]
        natural, also = invert_cnn(cnn, head, side, alpha=alpha, **options)  # type: ignore[arg-type]
        found.append(CnnImages(task, tuple(labels.tolist()), plain, natural, (right, also)))
    return found

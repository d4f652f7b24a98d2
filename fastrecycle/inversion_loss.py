"""What LoRA Inversion descends on: L_data of each task in a batch (LoRA Recycle, Eq. 1).

G tasks in one batch, m images of each, C classes, S side, k kept patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastrecycle.augment import apply_maps
from fastrecycle.config import InversionConfig
from fastrecycle.lora import LoRAStack
from fastrecycle.ops import Impl, autocast
from fastrecycle.prior import ResNetPrior
from fastrecycle.vit import ViT


def data_loss(
    vit: ViT,
    prior: nn.Module | None,
    images: Tensor,
    stack: LoRAStack | None,
    heads: Tensor,
    biases: Tensor,
    labels: Tensor,
    config: InversionConfig,
    pruned: bool,
    precision: str = "fp32",
    shrink: Tensor | None = None,
    impl: Impl = "reference",
    side: torch.cuda.Stream | None = None,
    natural: Tensor | None = None,
    normalised: bool = False,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """L_data of each task, LoRA Recycle, Eq. 1: CE(h(f(X)), Y) + alpha R_BN(X) (+ TV, L2).

    Under heads of class texts the cross-entropy is the contrastive loss (Sec. 5, zero-shot).

    Args:
        vit: the frozen backbone.
        prior: see `fastrecycle.prior`; None drops R_BN.
        images: (G, m, 3, S, S), in the backbone's input space.
        stack: G LoRAs; None: none, or one that is part of the backbone's weights.
        heads: (G, C, features), biases (G, C).
        labels: (m,) int64, the same for each task.
        config: weights of the terms, pruning schedule.
        pruned: whether the schedule is in force yet.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        shrink: (G, S, S), maps of `shrink_table` through which the backbone sees each task.
        impl: code of the operations.
        side: where the prior runs beside the backbone, forward and backward; None: after it.
        natural: (G m, 3, S, S), the images in the normalisation of a `ResNetPrior`, as
            `ops.jitter_pixels` makes them; None: they are made of `images` here.
        normalised: see `Head`.
        keep: (G m, k), the patches that the backbone sees; None: all. The prior sees whole images.

    Returns:
        loss, CE and R_BN of each task, each (G,) float32. A task's loss depends on its own images
        alone, so the gradient of the sum is each task's gradient.

    """
    tasks, per_task = images.shape[:2]
    flat = images.flatten(0, 1)
    r_bn = None
    if prior is not None and config.alpha > 0:
        # One is bound by memory, the other by arithmetic. Autograd goes back on the same streams.
        with _beside(side), autocast(images.device, precision):
            # another network's BatchNorms are read by hooks, whatever computes them
            options: dict[str, Any] = {"impl": impl} if isinstance(prior, ResNetPrior) else {}
            if natural is not None:
                options["normalised"] = True
            pixels = vit.pixels(flat) if natural is None else natural
            r_bn = prior(pixels, segments=tasks, first_bn=config.first_bn, **options)
    seen = flat if shrink is None else apply_maps(images, shrink).flatten(0, 1)
    with autocast(images.device, precision):
        # without an index each LoRA has an equal share of the batch: its own task
        features = vit(seen, stack, prune=config.prune if pruned else None, keep=keep, impl=impl)
    # The head is tiny and its logits feed the loss: full precision.
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    if normalised:
        features = nn.functional.normalize(features, dim=-1)
    logits = features.unflatten(0, (tasks, per_task)) @ heads.transpose(1, 2) + biases[:, None]
    target = labels.expand(tasks, -1)
    ce = nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)
    loss = config.ce * ce
    if r_bn is None:
        r_bn = torch.zeros_like(ce)
    else:
        if side is not None:
            torch.cuda.current_stream().wait_stream(side)
        loss = loss + config.alpha * r_bn
    if config.tv > 0:
        rows = (images[..., 1:, :] - images[..., :-1, :]).abs().mean((1, 2, 3, 4))
        columns = (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3, 4))
        loss = loss + config.tv * (rows + columns)
    if config.l2 > 0:
        loss = loss + config.l2 * images.square().mean((1, 2, 3, 4))
    return loss, ce, r_bn


@contextmanager
def _beside(side: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on another stream, from where the current one stands."""
    if side is None:
        yield
        return
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield

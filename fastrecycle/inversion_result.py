"""What a finished task leaves: 8-bit pixels, their patches in order, the teacher's logits.

m images, n patches, C classes, S side, k kept patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrecycle.lora import LoRA
from fastrecycle.pool_files import TaskImages
from fastrecycle.pruning import PruneSchedule, top_patches
from fastrecycle.vit import ViT


def task_images(
    vit: ViT,
    lora: LoRA,
    last: Tensor,
    keep: Tensor | None,
    prune: PruneSchedule,
    *,
    task: int,
    labels: Tensor,
    batch_size: int,
) -> TaskImages:
    """A task's last iterate as the pool keeps it (LoRA Recycle, Sec. 4.3).

    Args:
        vit: the frozen backbone.
        lora: the task's LoRA, with its head.
        last: (m, 3, S, S), un-jittered, in the backbone's input space.
        keep: (m, k), the patches that the backbone saw last; None: all.
        prune: schedule whose survivors lead the order.
        task: number of the LoRA in its bank.
        labels: (m,) int64.
        batch_size: images of one forward pass.

    """
    pixels = (vit.pixels(last) * 255).round().clamp(0, 255).byte()
    own = lora.to(last.device)
    head = own.require_head()
    order, logits, survivors = [], [], vit.config.patches
    for rows in torch.arange(len(pixels), device=last.device).split(batch_size):
        images = vit.normalise(pixels[rows].float() / 255)
        # The teacher is the LoRA's whole network: it sees all patches.
        whole = vit.encode(images, own)
        importance = whole.cls_scores
        if prune or keep is not None:
            chosen = None if keep is None else keep[rows]
            pruned = vit.encode(images, own, prune=prune or None, keep=chosen)
            survivors = pruned.kept.shape[1]
            importance = _survivors_first(importance, pruned.kept, pruned.cls_scores)
        order.append(importance.sort(dim=1, descending=True, stable=True).indices)
        logits.append(head(whole.features.float()))
    return TaskImages(
        task=task,
        images=pixels.cpu(),
        labels=labels.cpu(),
        order=torch.cat(order).cpu(),
        survivors=survivors,
        teacher_logits=torch.cat(logits).cpu(),
        class_names=lora.class_names,
        name=lora.name,
        text=head.weight.float().cpu() if head.normalised else None,
    )


def _survivors_first(whole: Tensor, kept: Tensor, scores: Tensor) -> Tensor:
    """Importance of all patches in which every survivor of pruning beats every other patch.

    Args:
        whole: (B, n), last block's CLS attention of the unpruned network.
        kept: (B, k), survivors, ascending.
        scores: (B, k') of the pruned network's last block; where that block prunes too, k' > k:
            the survivors are then its k best, so their own scores are the k highest.
    """
    if scores.shape[1] > kept.shape[1]:
        scores = scores.gather(1, top_patches(scores, kept.shape[1]))
    # attention weights are at most 1
    return whole.scatter(1, kept, scores + 1)

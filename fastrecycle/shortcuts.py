"""Shortcuts of LoRA Inversion beyond the paper: small images, fewer patches, tasks that are done.

All of them change shapes or company only between iterations that are fixed beforehand, so that the
steps between are static and a task's images do not depend on the tasks beside it. What each costs
in accuracy is `docs/scaling.md`'s to say.

G tasks, m images of each, S side, n patches, k of them kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastrecycle.config import InversionConfig
from fastrecycle.lora import LoRA
from fastrecycle.pool_files import TaskImages
from fastrecycle.pruning import kept_count, top_patches
from fastrecycle.vit import ViT
from fastrecycle.vit_config import ViTConfig


def coarse_side(config: InversionConfig, vit: ViTConfig) -> int:
    """Side of the images of a coarse start, in pixels: whole patches, at least one."""
    return max(1, round(config.coarse_scale * vit.grid)) * vit.patch_size


def side_at(iteration: int, config: InversionConfig, vit: ViTConfig) -> int:
    """Side of the images in an iteration, in pixels."""
    coarse = iteration < config.coarse * config.iterations
    return coarse_side(config, vit) if coarse else vit.image_size


def kept_at(iteration: int, config: InversionConfig, patches: int) -> int:
    """Patches of an image that the backbone still sees in an iteration."""
    shares = [
        share
        for share, start in zip(config.drop, config.drop_at, strict=True)
        if iteration >= start * config.iterations
    ]
    return kept_count(patches, max(shares, default=0.0))


def enlarged(images: Tensor, side: int) -> Tensor:
    """(G, m, 3, s, s) -> (G, m, 3, side, side), bilinear."""
    flat = nn.functional.interpolate(
        images.flatten(0, 1), size=(side, side), mode="bilinear", align_corners=False
    )
    return flat.unflatten(0, images.shape[:2])


@torch.no_grad()
def best_patches(
    vit: ViT, images: Tensor, lora: LoRA, keep: Tensor | None, count: int, batch_size: int = 100
) -> Tensor:
    """The patches with the highest CLS attention of the last block, of those kept so far.

    Args:
        vit: the backbone.
        images: (m, 3, S, S) of one task, normalised and not jittered.
        lora: the task's.
        keep: (m, k) patch indices; None: all.
        count: patches to keep.

    Returns:
        (m, count) int64, ascending.

    """
    chosen = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        own = None if keep is None else keep[rows]
        scores = vit.encode(images[rows], lora, keep=own).cls_scores
        alive = top_patches(scores, count)
        chosen.append(alive if own is None else own.gather(1, alive))
    return torch.cat(chosen)


def moved_patches(keep: Tensor, shift: Tensor, flip: Tensor, vit: ViTConfig) -> Tensor:
    """Patches that show the kept ones after a task's roll and flip, to the nearest patch.

    Args:
        keep: (G, m, k) patch indices of the images as they lie.
        shift: (G, 2) pixels down and right; flip: (G,), after the roll.
        vit: grid and patch size.

    Returns:
        (G m, k) int64.

    """
    steps = (shift / vit.patch_size).round().long()[:, :, None, None]
    rows = (keep // vit.grid + steps[:, 0]) % vit.grid
    columns = (keep % vit.grid + steps[:, 1]) % vit.grid
    columns = torch.where(flip[:, None, None], vit.grid - 1 - columns, columns)
    return (rows * vit.grid + columns).flatten(0, 1)


def converged(mean: Tensor, before: Tensor | None, plateau: float) -> Tensor:
    """Which tasks' mean loss fell by less than a share `plateau` of what it was: (G,) bool.

    Args:
        mean: (G,) over the window that ends; before: over the one before it, None where there was
            none.
        plateau: see `InversionConfig`.

    """
    if before is None:
        return torch.zeros_like(mean, dtype=torch.bool)
    return before - mean < plateau * before.abs()


def warm_images(
    earlier: Sequence[TaskImages],
    class_names: Sequence[str] | None,
    classes: int,
    per_class: int,
    generator: torch.Generator,
) -> Tensor:
    """Images to start a task from: of its classes by name, where earlier tasks show them, else any.

    Args:
        earlier: finished tasks.
        class_names: of the task's head, or None.
        classes: of the head; per_class: images of each.
        generator: the task's.

    Returns:
        (classes per_class, 3, S, S) uint8, class-major.

    """
    shown: dict[str, list[tuple[int, int]]] = {}
    everything = []
    for i, part in enumerate(earlier):
        for row, label in enumerate(part.labels.tolist()):
            everything.append((i, row))
            if part.class_names is not None:
                shown.setdefault(part.class_names[label], []).append((i, row))
    rows = []
    for c in range(classes):
        candidates = everything if class_names is None else shown.get(class_names[c], everything)
        drawn = torch.randperm(len(candidates), generator=generator)[:per_class].tolist()
        while len(drawn) < per_class:
            drawn += drawn[: per_class - len(drawn)]
        rows += [candidates[j] for j in drawn]
    return torch.stack([earlier[i].images[row] for i, row in rows])

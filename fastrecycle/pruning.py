"""Token pruning: from a schedule to token counts, from CLS attention to the patches that stay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

PruneSchedule = Mapping[int, float]
"""{block (0-based): share of the current patches to drop after that block's attention}."""


def patches_after_blocks(patches: int, depth: int, prune: PruneSchedule | None) -> tuple[int, ...]:
    """Number of patches left after each block; block l drops int(ratio * current) of them.

    Raises:
        ValueError: a block or a ratio is out of range.

    """
    schedule = dict(prune or {})
    for block, ratio in schedule.items():
        if not isinstance(block, int) or not 0 <= block < depth:
            raise ValueError(f"prune: blocks are integers in [0, {depth - 1}], got {block!r}")
        if not 0 <= ratio < 1:
            raise ValueError(f"prune: ratio of block {block} must be in [0, 1), got {ratio}")
    counts = []
    for block in range(depth):
        patches -= int(schedule.get(block, 0.0) * patches)
        counts.append(patches)
    return tuple(counts)


def top_patches(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` highest scores of each row, in ascending order.

    Ties are broken by position (the earlier patch stays), so survivors never depend on how a
    library's top-k happens to order equal scores.

    Args:
        scores: (B, n).
        count: in [1, n].

    Returns:
        (B, count) int64.

    Raises:
        ValueError: `count` is out of range.

    """
    if not 1 <= count <= scores.shape[1]:
        raise ValueError(f"top_patches: count must be in [1, {scores.shape[1]}], got {count}")
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=1).values


def kept_count(patches: int, sparsity: float) -> int:
    """Patches left of `patches` when a share `sparsity` of them is masked.

    Raises:
        ValueError: `sparsity` is not in [0, 1).

    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity: must be in [0, 1), got {sparsity}")
    return patches - int(sparsity * patches)


def masked_images(images: Tensor, kept: Tensor, patch_size: int, fill: float = 0.0) -> Tensor:
    """Images with all but the kept patches set to `fill`: for looking at, not for training.

    Args:
        images: (B, C, S, S).
        kept: (B, k) patch indices, row-major.

    """
    grid = images.shape[-1] // patch_size
    mask = torch.zeros(len(images), grid * grid, dtype=torch.bool, device=images.device)
    mask.scatter_(1, kept, True)
    mask = mask.view(-1, 1, grid, grid)
    mask = mask.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return torch.where(mask, images, torch.full_like(images, fill))

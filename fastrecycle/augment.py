"""Augmentations of square images that are linear maps of their rows and columns.

Y = R X C^T, with R and C (S, S): one batched product serves images with different maps, so a step
has static shapes whatever was drawn. E maps, B images, S side.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def shrink_table(side: int, low: int, high: int) -> Tensor:
    """Maps that shrink an image to `low`, ..., `high` pixels and enlarge it to `side` again.

    Bilinear with antialiasing down, bicubic up, as `torch.nn.functional.interpolate` has them. Maps
    from `side` on are the identity, which stands there once.

    Returns:
        (sides, side, side) float32; row i is the map to `min(low, side) + i` pixels.

    """
    # Column j of a map is what pixel j turns into. All columns in one image: an image of width 1
    # comes out wrong from PyTorch's antialiased interpolation (seen in 2.14 on the CPU).
    columns = torch.eye(side)[None, None]
    maps = []
    for small in range(min(low, side), min(high, side) + 1):
        if small < side:
            down = nn.functional.interpolate(
                columns, (small, side), mode="bilinear", antialias=True
            )
            maps.append(nn.functional.interpolate(down, (side, side), mode="bicubic")[0, 0])
        else:
            maps.append(columns[0, 0])
    return torch.stack(maps)


def crop_maps(scale: Tensor, offset: Tensor, side: int) -> Tensor:
    """Maps that enlarge a window of an image to the whole of it, bilinearly.

    Args:
        scale: (B,) share of the side that the window keeps, in (0, 1].
        offset: (B,) where it starts, as a share of the side, in [0, 1 - scale].
        side: pixels.

    Returns:
        (B, side, side) float32.

    """
    line = torch.arange(side, device=scale.device, dtype=torch.float32)
    source = offset[:, None] * side + (line + 0.5) * scale[:, None] - 0.5
    source = source.clamp(0, side - 1)
    return (1 - (source[..., None] - line).abs()).clamp_min(0)


def apply_maps(images: Tensor, rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Multiply each channel from both sides, rows @ image @ columns^T, in float32 at least.

    Args:
        images: (B, ..., S, S).
        rows, columns: (B, S, S), one for each entry of the first axis; None: the same as `rows`.

    """
    columns = rows if columns is None else columns
    shape = (len(rows),) + (1,) * (images.ndim - 3) + rows.shape[1:]
    with torch.autocast(images.device.type, enabled=False):  # pixels stay in full precision
        return rows.view(shape) @ images @ columns.view(shape).mT

"""Positions of patches: learned tables at another image size, and rotary positions.

n patches, D width, d head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def resized_table(table: Tensor, prefix: int, grid: int, antialias: bool = True) -> Tensor:
    """A learned table of positions for another number of patches, by bicubic interpolation.

    Args:
        table: (prefix + n, D), of which the first `prefix` rows stay.
        prefix: rows of the prefix tokens.
        grid: patches along one side afterwards.
        antialias: as timm and DINOv2 with registers have it; False: as DINOv2 has it.

    Returns:
        (prefix + grid^2, D).

    """
    old = math.isqrt(len(table) - prefix)
    image = table[prefix:].T.reshape(1, -1, old, old)
    image = nn.functional.interpolate(
        image, size=(grid, grid), mode="bicubic", align_corners=False, antialias=antialias
    )
    return torch.cat((table[:prefix], image.flatten(2)[0].T))


def rotary_table(grid: int, prefix: int, head_width: int, base: float = 100.0) -> Tensor:
    """Cosines and sines of DINOv3's rotary positions, (2, prefix + n, d) float64.

    A patch's centre has coordinates y and x in [-1, 1]; frequency i of d / 4 turns by
    2 pi coordinate / base^(4 i / d). Prefix tokens are not turned.
    """
    centres = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid * 2 - 1
    where = torch.cartesian_prod(centres, centres)  # (n, 2), row-major: y, x
    periods = base ** (torch.arange(0, head_width, 4, dtype=torch.float64) / head_width)
    angles = (2 * math.pi * where[:, :, None] / periods).flatten(1).tile(2)  # (n, d)
    angles = nn.functional.pad(angles, (0, 0, prefix, 0))
    return torch.stack((angles.cos(), angles.sin()))


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Queries or keys (B, N, H, d) turned by (2, B or 1, N, 1, d) cosines and sines."""
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]

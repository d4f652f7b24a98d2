"""Where chance moves a task's images in each iteration: a roll, a flip, a resolution.

G tasks in one batch, S side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrecycle.config import InversionConfig


def task_generator(seed: int, task: int) -> torch.Generator:
    """Random numbers of one task, whatever else is computed beside it."""
    # A 64-bit mix (SplitMix64) keeps the streams of neighbouring seeds and tasks apart.
    x = (seed * 0x9E3779B97F4A7C15 + task * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    return torch.Generator().manual_seed((x ^ (x >> 31)) % 2**63)


@dataclass(frozen=True)
class Jitter:
    """A roll, a flip and a resolution of each task's images, drawn for all iterations at once."""

    shift: Tensor  # (iterations, G, 2) int64, rows and columns
    flip: Tensor  # (iterations, G) bool
    resolution: Tensor  # (iterations, G) int64, row of `shrink_table`; zeros where it is off

    @staticmethod
    def draw(generators: Sequence[torch.Generator], config: InversionConfig, side: int) -> Jitter:
        """From each task's own generator."""
        reach = int(config.jitter * side)
        shape = (config.iterations,)
        shifts = [torch.randint(-reach, reach + 1, (*shape, 2), generator=g) for g in generators]
        flips = [torch.rand(shape, generator=g) < config.flip for g in generators]
        low, high = config.resolution
        sides = torch.zeros(config.iterations, len(generators), dtype=torch.int64)
        if high > 0:
            drawn = [torch.randint(low, high + 1, shape, generator=g) for g in generators]
            sides = torch.stack(drawn, 1).clamp_max(side) - min(low, side)
        return Jitter(torch.stack(shifts, 1), torch.stack(flips, 1), sides)

    def of(self, tasks: Sequence[int], scale: float = 1.0) -> Jitter:
        """The tables of some of the tasks, for images whose side is `scale` times as long."""
        shift = (self.shift[:, tasks] * scale).round().long()
        return Jitter(shift, self.flip[:, tasks], self.resolution[:, tasks])

    def to(self, device: torch.device) -> Jitter:
        """The same tables on a device."""
        return Jitter(*(x.to(device) for x in (self.shift, self.flip, self.resolution)))

    def at(self, clock: Tensor) -> tuple[Tensor, Tensor]:
        """Shift (G, 2) and flip (G,) of the iteration that the clock shows; see `index`."""
        return row_at(self.shift, clock), row_at(self.flip, clock)

    def index(self, clock: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Source rows and columns of each output pixel, (G, S) each.

        Args:
            clock: (1,) int64 iteration, on the tables' device: read there, never by the host.
            side: S.

        """
        line = torch.arange(side, device=self.shift.device)
        shift, flip = self.at(clock)
        rows = (line - shift[:, :1]) % side
        columns = (line - shift[:, 1:]) % side
        return rows, torch.where(flip[:, None], columns.flip(1), columns)


def row_at(table: Tensor, clock: Tensor) -> Tensor:
    """Row of a table, (1,) int64 and maybe past the end, as in the warm-up of a recording."""
    return table.index_select(0, clock.clamp_max(len(table) - 1))[0]


def gather_pixels(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """images[g, :, :, rows[g], columns[g]]: (G, m, 3, S, S), (G, S), (G, S) -> the same shape."""
    tasks, side = rows.shape
    rows = rows.view(tasks, 1, 1, side, 1).expand(images.shape)
    images = images.gather(3, rows)
    return images.gather(4, columns.view(tasks, 1, 1, 1, side).expand(images.shape))


def inverse(index: Tensor) -> Tensor:
    """The inverse of each row's permutation, (G, S)."""
    line = torch.arange(index.shape[1], device=index.device).expand_as(index)
    return torch.zeros_like(index).scatter(1, index, line)

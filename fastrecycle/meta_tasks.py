"""Tasks of meta-training, and all else that chance decides (LoRA Recycle, Sec. 4.2).

E episodes in a step, W ways, K shots, Q queries a class.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrecycle.config import MetaConfig
from fastrecycle.ops import host
from fastrecycle.parallel import Ranks
from fastrecycle.pool import SyntheticPool
from fastrecycle.pruning import kept_count


class Episodes(NamedTuple):
    """The tasks of one step, as rows of the pool."""

    rows: np.ndarray  # (E, W, K + Q) int64
    labels: np.ndarray  # (E, W) int64: column of the teacher's head; -1 in interpolated tasks


class EpisodeSampler:
    """Draws tasks from a pool: of one LoRA (Eq. 3), or of classes of several (Eq. 4).

    Step t's tasks depend on the seed and t alone, so a resumed run draws the same.

    Raises:
        ValueError: the pool has too few classes, or too few images of a class.

    """

    def __init__(self, pool: SyntheticPool, config: MetaConfig, seed: int = 0):
        self.config, self.seed = config, seed
        tasks, labels, classes = (x.numpy() for x in (pool.tasks, pool.labels, pool.classes))
        need = config.shots + config.queries
        widths = [len(np.unique(labels[tasks == task])) for task in range(len(pool.parts))]
        for task, label in sorted(set(zip(tasks.tolist(), labels.tolist(), strict=True))):
            count = int(((tasks == task) & (labels == label)).sum())
            if count < need:
                raise ValueError(
                    f"pool: a {config.shots}-shot task with {config.queries} queries needs"
                    f" {need} images a class, LoRA {task} class {label} has {count};"
                    " invert more images_per_class, or ask for fewer queries"
                )
        if config.shots == 0 and pool.text is None:
            raise ValueError(
                "pool: 0-shot tasks need the class texts of every LoRA, which this pool does not"
                " hold; invert LoRAs with such heads (pretune(..., text=...) makes them,"
                " text_heads(bank, text) adds them; --text), or ask for shots >= 1"
            )
        if config.interpolation < 1 and max(widths) < config.ways:
            raise ValueError(
                f"ways: a {config.ways}-way task of one LoRA needs a head with that many classes;"
                f" the largest has {max(widths)}; use fewer ways or interpolation=1"
            )
        shown = len(np.unique(classes))
        if config.interpolation > 0 and shown < config.ways:
            raise ValueError(f"ways: the pool shows {shown} classes, fewer than {config.ways}")
        self.tables = host.TaskTables.of_pool(tasks, labels, classes, config.ways)

    def draw(self, step: int, steps: int = 1) -> Episodes:
        """The tasks of a step, or of so many from it on, one step after the other."""
        config = self.config
        rows, labels = host.draw_steps(
            self.tables, config.ways, config.shots + config.queries, config.tasks,
            config.interpolation, self.seed, step, steps, holders=config.holders,
        )  # fmt: skip
        return Episodes(rows.reshape(-1, *rows.shape[2:]), labels.reshape(-1, config.ways))


class Draw(NamedTuple):
    """What chance decides about a step's tasks of one shape, as tensors; or, with one more axis in
    front, about many steps'.
    """

    rows: Tensor  # (E, W, K + Q) int64, of the pool
    labels: Tensor  # (E, W) int64, see `Episodes`
    flip: Tensor  # (E,) bool
    small: Tensor  # (E,) int64, rows of the shrink table
    crop: Tensor  # (3, images) float32: scale, first row, first column; (3, 0) without crops
    counts: Tensor  # (images,) int64 kept patches where they differ, else (0,)


def masked_groups(config: MetaConfig) -> tuple[bool, ...]:
    """Of each group of tasks in a step, whether it masks patches."""
    if config.sparsity == 0:
        return (False,)
    return (False, True) if config.whole > 0 else (True,)


def group_sizes(config: MetaConfig) -> tuple[int, ...]:
    """Tasks of each group in a step, over all ranks."""
    whole = round(config.whole * config.tasks)
    return (whole, config.tasks - whole) if len(masked_groups(config)) > 1 else (config.tasks,)


def draw_tasks(
    sampler: EpisodeSampler, first: int, steps: int, side: int, patches: int, ranks: Ranks
) -> list[Draw]:
    """All that is random in some steps: of tasks of whole images, then of those that mask.

    Each tensor has an axis of steps in front. A step's draw depends on the seed and its number.
    """
    config = sampler.config
    episodes = sampler.draw(first, steps)
    rows, labels = (x.reshape(steps, config.tasks, *x.shape[1:]) for x in episodes)
    groups = masked_groups(config)
    drawn: dict[bool, list[tuple[np.ndarray, ...]]] = {masked: [] for masked in groups}
    split = group_sizes(config)[0] if not all(groups) else 0
    for i in range(steps):
        # the sampler's key, another stretch of its counter
        rng = np.random.Generator(
            np.random.Philox(key=[sampler.seed, first + i], counter=[0, 0, 0, 1])
        )
        flip = rng.random(config.tasks) < config.flip
        for masked in drawn:
            part = slice(split, None) if masked else slice(0, split)
            count, images = len(rows[i, part]), rows[i, part].size
            # all ranks draw for all, so that their number changes nothing
            own, own_images = ranks.share(count), ranks.share(images)
            crop = np.zeros((3, 0))
            if not masked and config.crop < 1:
                scale = rng.uniform(config.crop, 1, images)
                crop = np.stack([scale, *(rng.random((2, images)) * (1 - scale))])
            low, high = _sides(config, masked)
            small = rng.integers(low, high + 1, count).clip(max=side) - min(low, side)
            counts = np.zeros(0, np.int64)
            if masked and config.sparsity_per == "image" and config.whole == 0:
                counts = rng.permutation(keep_ladder(images, patches, config.sparsity))
            drawn[masked].append(
                (rows[i, part][own], labels[i, part][own], flip[part][own], small[own],
                 crop.astype(np.float32)[:, own_images if crop.size else slice(0)],
                 counts[own_images if counts.size else slice(0)])
            )  # fmt: skip
    return [
        Draw(*(torch.from_numpy(np.stack(x)) for x in zip(*each, strict=True)))
        for each in drawn.values()
    ]


def _sides(config: MetaConfig, masked: bool) -> tuple[int, int]:
    return config.masked_resolution if masked and config.whole > 0 else config.resolution


@lru_cache
def keep_ladder(count: int, patches: int, sparsity: float) -> tuple[int, ...]:
    """Kept patches for each of `count` images, with mean (1 - sparsity) patches.

    Images keep 1, 1/2, 1/4, 1/8 or 1/16 of their patches, in geometric proportions that meet the
    mean, so that one task compares images across counts at the cost of the fixed ratio.
    """
    mean = kept_count(patches, sparsity) / patches
    levels = np.array([1.0, 0.5, 0.25, 0.125, 0.0625])
    if mean >= 1:
        return (patches,) * count
    if mean <= levels[-1]:
        return (max(1, kept_count(patches, sparsity)),) * count
    low, high = 1e-6, 1e6
    for _ in range(200):  # weights r^j; the mean falls as r grows
        ratio = (low * high) ** 0.5
        weights = ratio ** np.arange(len(levels))
        low, high = (ratio, high) if weights @ levels / weights.sum() > mean else (low, ratio)
    share = weights / weights.sum()
    edges = np.floor(np.cumsum(share) * count + 0.5).astype(int)
    sizes = np.diff(np.concatenate([[0], edges]))
    ladder = [max(1, round(level * patches)) for level in levels]
    counts = [k for k, size in zip(ladder, sizes.tolist(), strict=True) for _ in range(size)]
    # Rounding leaves the total a little off: spread the difference over the images.
    budget = round(mean * patches * count)
    i = 0
    while sum(counts) != budget:
        step = 1 if sum(counts) < budget else -1
        j = i % count
        if 1 <= counts[j] + step <= patches:
            counts[j] += step
        i += 1
    return tuple(counts)


def masked_patches(patches: int, config: MetaConfig) -> int:
    """Patches that an image keeps in a task that masks: all such images the same number."""
    mean = kept_count(patches, config.sparsity)
    whole = round(config.whole * config.tasks)
    return max(1, (mean * config.tasks - whole * patches) // (config.tasks - whole))

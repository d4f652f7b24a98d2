"""Meta-training: one meta-LoRA from many synthetic few-shot tasks (LoRA Recycle, Sec. 4.2, 4.3).

E episodes in a step, W ways, K shots, Q queries a class, F features, S side.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrecycle.augment import crop_maps, shrink_table
from fastrecycle.capture import Captured, capture, optimiser_state, set_rate
from fastrecycle.classifier import class_means, prototype_logits
from fastrecycle.config import MetaConfig
from fastrecycle.files import load_checkpoint, save_checkpoint
from fastrecycle.inversion import OnStep
from fastrecycle.lora import LoRA
from fastrecycle.ops import (
    Impl,
    Resolved,
    augment,
    autocast,
    check_precision,
    host,
    impl_of,
    weight_dtype,
)
from fastrecycle.parallel import ALONE, Ranks
from fastrecycle.pool import SyntheticPool
from fastrecycle.pruning import kept_count
from fastrecycle.text import check_width
from fastrecycle.vit import RaggedKeep, ViT

log = logging.getLogger(__name__)

# Step 0 of a checkpoint's metadata format; a change of it makes old checkpoints unreadable.
_STATE_VERSION = "1"

DRAWN = 64  # steps whose draws are made and moved to the device at once
# and where their images are moved, too: 1.2 GB at 100 images of 224 pixels a step
STAGED = 80


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


class Batch(NamedTuple):
    """Tasks of one shape, ready for the backbone."""

    images: Tensor  # (E W (K + Q), 3, S, S), normalised
    keep: Tensor | RaggedKeep | None  # kept patches of each image; None: all
    target: Tensor  # (E, W Q, W), see `targets`
    text: Tensor | None  # (E, W, F), class texts, scale included, where there are no shots


def targets(pool_logits: Tensor, tasks: Draw | Episodes, config: MetaConfig) -> Tensor:
    """Target distribution of each query: the teacher's, or one-hot in interpolated tasks and where
    `config.target` is "label".

    KL(teacher, student) and cross-entropy differ from CE(target, student) only by the target's
    entropy, so one loss serves Eq. 3a and Eq. 4.

    Returns:
        (E, W Q, W) float32 on the device of `pool_logits`.

    """
    device = pool_logits.device
    rows, labels = (torch.as_tensor(x, device=device) for x in (tasks.rows, tasks.labels))
    queries = rows[:, :, config.shots :]
    own = (labels[:, 0] >= 0) & (config.target == "teacher")
    columns = labels.clamp_min(0)[:, None, None, :].expand(-1, config.ways, config.queries, -1)
    logits = pool_logits[queries].gather(-1, columns)  # (E, W, Q, W)
    # below 1 even where a sure teacher's softmax rounds to it: `meta_loss` knows labels by their 1
    teacher = (logits / config.temperature).softmax(-1).clamp_max(1 - torch.finfo().eps)
    one_hot = torch.eye(config.ways, device=device)[:, None].expand(-1, config.queries, -1)
    return torch.where(own[:, None, None, None], teacher, one_hot).flatten(1, 2)


def meta_loss(
    features: Tensor, target: Tensor, config: MetaConfig, text: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_meta, LoRA Recycle, Eq. 3 and 4, and the accuracy against the target's mode.

    Without shots, class texts stand in for prototypes: against labels this is CLIP's contrastive
    loss from images to texts, cross-entropy over scale cos(image, text).

    Args:
        features: (E, W, K + Q, F), support images first.
        target: (E, W Q, W), see `targets`.
        config: shots, distance, direction of the KL.
        text: (E, W, F), class texts, scale included; given if and only if there are no shots.

    Returns:
        loss and accuracy, scalars.

    """
    if text is not None:
        unit = torch.nn.functional.normalize(features.flatten(1, 2).to(text.dtype), dim=-1)
        logits = unit @ text.transpose(1, 2)
    else:
        support, query = features.split((config.shots, config.queries), dim=2)
        prototypes = class_means(support.flatten(1, 2), config.ways)
        logits = prototype_logits(prototypes, query.flatten(1, 2), config.distance)
    log_p = (logits / config.temperature).log_softmax(-1)
    log_target = target.clamp_min(1e-12).log()
    if config.kl == "teacher_student":
        loss = (target * (log_target - log_p)).sum(-1).mean()
    else:
        one_hot = (target.amax(-1, keepdim=True) == 1).to(target.dtype)
        reverse = (log_p.exp() * (log_p - log_target)).sum(-1, keepdim=True)
        forward = -(target * log_p).sum(-1, keepdim=True)
        # interpolated tasks have no teacher: their one-hot target takes the cross-entropy
        loss = (one_hot * forward + (1 - one_hot) * reverse).mean()
    accuracy = (logits.argmax(-1) == target.argmax(-1)).float().mean()
    return loss * config.temperature**2, accuracy


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


@dataclass(frozen=True)
class MetaResult:
    """What meta-training returns."""

    lora: LoRA
    vit: ViT  # the backbone given, or a trained copy where learn="backbone"
    best_step: int  # the step returned: the last, or the best on validation tasks
    validation: dict[int, float]


class MetaTrainer:
    """Meta-LoRA, optimiser and sampler; `step()` is one update of Alg. 1.

    Args:
        vit: the frozen backbone, on the device to use.
        pool: synthetic images; moved to that device as 8-bit pixels.
        config: see `MetaConfig`.
        seed: of the meta-LoRA's start and of everything drawn.
        precision: "fp32", "bf16" or "fp8", which needs the backend "triton".
        backend: "reference" (eager), "compile" or "triton": see `fastrecycle.ops`.
        ranks: processes that share each step's tasks; see `fastrecycle.parallel`.
        staged: bring each stretch of steps only the images that it draws, rather than have the
            whole pool on the device; None: where a pool on disk takes over a quarter of the memory.

    """

    def __init__(
        self,
        vit: ViT,
        pool: SyntheticPool,
        config: MetaConfig,
        *,
        seed: int = 0,
        precision: str = "fp32",
        backend: Resolved = "reference",
        start: LoRA | None = None,
        ranks: Ranks = ALONE,
        staged: bool | None = None,
    ):
        device = vit.pos_embed.device
        if pool.side != vit.config.image_size:
            raise ValueError(
                f"pool: images of side {pool.side}, the backbone takes {vit.config.image_size}"
            )
        if pool.patches != vit.config.patches:
            raise ValueError(
                f"pool: images of {pool.patches} patches, the backbone makes {vit.config.patches};"
                " they were inverted from another backbone"
            )
        check_precision(precision, backend, device)
        if precision == "fp8" and config.learn == "backbone":
            raise ValueError(
                'precision: "fp8" needs a frozen backbone, got learn="backbone"; use "bf16"'
            )
        self.config, self.seed, self.precision = config, seed, precision
        self.sampler = EpisodeSampler(pool, config, seed)
        self.pool, self.ranks, self.device = pool, ranks, device
        self.staged = _is_large(pool, device) if staged is None else staged
        if not self.staged:
            self.images = pool.images.to(device)
            self.logits = pool.teacher_logits.to(device)
            self.order = pool.order.to(device)  # most important patch first
        self.steps_drawn = STAGED if self.staged else DRAWN
        self.text = self.text_rows = None
        if config.shots == 0 and pool.text is not None:
            check_width(pool.text, vit.config.features)
            self.text, self.text_rows = pool.text.to(device), pool.text_rows.to(device)
        self.patches = pool.patches
        self.masked_count = masked_patches(pool.patches, config)
        if config.sparsity > 0 and (config.sparsity_per == "batch" or config.whole > 0):
            # raises if inversion left too few patches
            pool.keep(1 - self.masked_count / pool.patches)
        side = vit.config.image_size
        # the kernels have no gradient for the backbone's own weights
        self.impl: Impl = "reference" if config.learn == "backbone" else impl_of(backend)
        # and where images are bf16 those of the augmentation take float16
        halves = self.impl == "triton" and precision != "fp32"
        self.map_dtype = torch.float16 if halves else torch.float32
        self.shrink, self.masked_shrink = (
            shrink_table(side, *sides).to(device, self.map_dtype) if sides[1] else None
            for sides in (config.resolution, config.masked_resolution)
        )
        self.vit = vit
        for masked, tasks in zip(self._masked(), self._counts(), strict=True):
            ranks.share(tasks, "tasks that mask" if masked else "tasks of whole images")
        blocks = config.learned_blocks(vit.config.depth)
        lora = LoRA.init(
            vit.config, config.rank, config.alpha, config.targets,
            blocks=blocks if config.learn != "backbone" else None, seed=seed,
        )  # fmt: skip
        if config.start == "average" and start is None and config.learn != "backbone":
            raise ValueError(
                'start: "average" needs the average of the bank, got None; pass'
                ' LoRA.average(bank), or MetaConfig(start="zero") to start from nothing'
            )
        if start is not None:
            lora = _started(lora, start, blocks)
        self.lora = lora.to(device).clone()
        if config.learn == "backbone":
            self.vit = ViT(vit.config).to(device)
            self.vit.load_state_dict(vit.state_dict())
            self.vit.requires_grad_(True)
            self.parameters: list[Tensor] = list(self.vit.parameters())
        else:
            self.parameters = [x.requires_grad_() for x in self.lora.tensors()]
        ragged = config.sparsity > 0 and config.sparsity_per == "image" and config.whole == 0
        # A recorded step cannot read a number of the host, nor make shapes from what was drawn.
        self.recorded = backend != "reference" and device.type == "cuda" and not ragged
        self.optimiser = torch.optim.Adam(
            self.parameters,
            lr=torch.tensor(config.lr, device=device) if self.recorded else config.lr,
            capturable=self.recorded,
            fused=self.recorded,
        )
        self.average = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.iteration = 0
        self.clock = torch.zeros((), device=device)
        if backend != "reference" and precision != "fp32" and config.learn != "backbone":
            self.backbone = vit.prepared(weight_dtype(precision))
        else:
            self.backbone = self.vit
        self._loss = self._forward
        if backend == "compile" or (backend == "triton" and self.impl == "reference"):
            self._loss = torch.compile(self._forward, dynamic=False)
        self._graph: Captured | None = None
        self._drawn: list[Draw] = []
        self._block = -1  # of `steps_drawn` steps, whose draws these are

    def _forward(
        self,
        images: Tensor,
        keep: Tensor | RaggedKeep | None,
        target: Tensor,
        text: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        lora = None if config.learn == "backbone" else self.lora
        with autocast(images.device, self.precision):
            features = self.backbone(images, lora, keep=keep, impl=self.impl)
        features = features.unflatten(0, (-1, config.ways, config.shots + config.queries))
        return meta_loss(features, target, config, text)

    def _draw(self, first: int, steps: int) -> list[Draw]:
        """All that is random in some steps: of tasks of whole images, then of those that mask.

        Each tensor has an axis of steps in front. A step's draw depends on the seed and its number.
        """
        config, side = self.config, self.vit.config.image_size
        episodes = self.sampler.draw(first, steps)
        rows, labels = (x.reshape(steps, config.tasks, *x.shape[1:]) for x in episodes)
        drawn: dict[bool, list[tuple[np.ndarray, ...]]] = {masked: [] for masked in self._masked()}
        split = self._counts()[0] if not all(self._masked()) else 0
        for i in range(steps):
            # the sampler's key, another stretch of its counter
            rng = np.random.Generator(
                np.random.Philox(key=[self.seed, first + i], counter=[0, 0, 0, 1])
            )
            flip = rng.random(config.tasks) < config.flip
            for masked in drawn:
                part = slice(split, None) if masked else slice(0, split)
                count, images = len(rows[i, part]), rows[i, part].size
                # all ranks draw for all, so that their number changes nothing
                own, own_images = self.ranks.share(count), self.ranks.share(images)
                crop = np.zeros((3, 0))
                if not masked and config.crop < 1:
                    scale = rng.uniform(config.crop, 1, images)
                    crop = np.stack([scale, *(rng.random((2, images)) * (1 - scale))])
                low, high = self._sides(masked)
                small = rng.integers(low, high + 1, count).clip(max=side) - min(low, side)
                counts = np.zeros(0, np.int64)
                if masked and config.sparsity_per == "image" and config.whole == 0:
                    counts = rng.permutation(keep_ladder(images, self.patches, config.sparsity))
                drawn[masked].append(
                    (rows[i, part][own], labels[i, part][own], flip[part][own], small[own],
                     crop.astype(np.float32)[:, own_images if crop.size else slice(0)],
                     counts[own_images if counts.size else slice(0)])
                )  # fmt: skip
        return [
            Draw(*(torch.from_numpy(np.stack(x)) for x in zip(*each, strict=True)))
            for each in drawn.values()
        ]

    def _counts(self) -> tuple[int, ...]:
        """Tasks of each group in a step, over all ranks."""
        whole = round(self.config.whole * self.config.tasks)
        return (
            (whole, self.config.tasks - whole) if len(self._masked()) > 1 else (self.config.tasks,)
        )

    def _sides(self, masked: bool) -> tuple[int, int]:
        config = self.config
        return config.masked_resolution if masked and config.whole > 0 else config.resolution

    def _batch(self, draw: Draw, masked: bool) -> Batch:
        """A draw's images, augmented, their masks and targets; all on the device."""
        config, side = self.config, self.vit.config.image_size
        rows = draw.rows.flatten()
        per_task = len(rows) // len(draw.rows)
        table = self.masked_shrink if masked and config.whole > 0 else self.shrink
        which = None  # of the maps, for each image
        row_maps = column_maps = None
        if table is not None:
            row_maps, column_maps = table, table
            which = draw.small.repeat_interleave(per_task)
        if draw.crop.numel():
            row_maps, column_maps = (
                crop_maps(draw.crop[0], start, side) for start in draw.crop[1:]
            )
            if table is not None:
                first = table[which].float()
                row_maps, column_maps = first @ row_maps, first @ column_maps
            row_maps, column_maps = row_maps.to(self.map_dtype), column_maps.to(self.map_dtype)
            which = None
        flip = draw.flip.repeat_interleave(per_task)
        images = augment(
            self.images, rows, row_maps, column_maps, which, flip, self.vit.config.mean,
            self.vit.config.std, torch.float32 if self.precision == "fp32" else torch.bfloat16,
            impl=self.impl,
        )  # fmt: skip
        keep: Tensor | RaggedKeep | None = None
        if masked:
            order = self.order[rows]
            if draw.counts.numel():
                keep = RaggedKeep.of_orders(order, draw.counts)
            else:
                keep = order[:, : self.masked_count].sort(dim=1).values
            keep = _mirror(keep, self.vit.config.grid, flip)
        text = None
        if self.text is not None and self.text_rows is not None:
            text = self.text[self.text_rows[draw.rows[:, :, 0]]]
        return Batch(images, keep, targets(self.logits, draw, config), text)

    def _batches(self, step: int) -> list[Batch]:
        draws = self._draw(step, 1)
        if self.staged:
            draws = self._stage(draws)
        return [
            self._batch(Draw(*(x[0].to(self.device) for x in draw)), masked)
            for draw, masked in zip(draws, self._masked(), strict=True)
        ]

    def _stage(self, draws: list[Draw]) -> list[Draw]:
        """Have the images of some draws on the device; the draws, with their places there."""
        rows = torch.cat([draw.rows.flatten() for draw in draws])
        new = self.pool.gather(rows.numpy())
        if self.text is not None:
            fresh_rows = self.pool.text_rows[rows].to(self.device)
            if self.text_rows is None or len(self.text_rows) != len(rows):
                self.text_rows = fresh_rows
            else:
                self.text_rows.copy_(fresh_rows)
        if not hasattr(self, "images") or len(self.images) != len(rows):
            self.images, self.order, self.logits = (x.to(self.device) for x in new)
        else:  # in place: a recorded step reads these very tensors
            for own, fresh in zip((self.images, self.order, self.logits), new, strict=True):
                own.copy_(fresh)
        placed, start = [], 0
        for draw in draws:
            place = torch.arange(start, start + draw.rows.numel()).view_as(draw.rows)
            placed.append(draw._replace(rows=place))
            start += draw.rows.numel()
        return placed

    def _masked(self) -> tuple[bool, ...]:
        """Of each group of tasks in a step, whether it masks patches."""
        if self.config.sparsity == 0:
            return (False,)
        return (False, True) if self.config.whole > 0 else (True,)

    def _update(self) -> tuple[Tensor, Tensor]:
        """One update from the draw that the clock shows; everything happens on the device."""
        loss, accuracy = self.clock.new_zeros(()), self.clock.new_zeros(())
        slot = (self.clock.long() % self.steps_drawn).view(1)
        for draws, masked in zip(self._drawn, self._masked(), strict=True):
            batch = self._batch(Draw(*(x.index_select(0, slot)[0] for x in draws)), masked)
            share = len(batch.target) / self.config.tasks
            values = self._loss(*batch)
            loss, accuracy = loss + share * values[0], accuracy + share * values[1]
        own = torch.autograd.grad(loss, self.parameters)
        gradients, (loss, accuracy) = self.ranks.sum(own, (loss.detach(), accuracy))
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        self.optimiser.step()
        if self.average:
            # bias-corrected, so that early averages are not weighed down by the start
            decay = ((1 + self.clock) / (10 + self.clock)).clamp_max(self.config.ema)
            now = torch._foreach_mul([p.detach() for p in self.parameters], 1 - decay)
            torch._foreach_mul_(self.average, decay)
            torch._foreach_add_(self.average, now)
        self.clock += 1
        return loss.detach(), accuracy.detach()

    def _draw_ahead(self) -> None:
        """Have the draws of this step and of those around it on the device.

        Many steps at once, since each copy from the host makes it wait for the step under way.
        """
        block = self.iteration // self.steps_drawn
        if block == self._block:
            return
        new = self._draw(block * self.steps_drawn, self.steps_drawn)
        if self.staged:
            new = self._stage(new)
        if not self._drawn:
            self._drawn = [Draw(*(x.to(self.device) for x in draw)) for draw in new]
        else:  # in place: a recorded step reads these very tensors
            for own, draw in zip(self._drawn, new, strict=True):
                for x, y in zip(own, draw, strict=True):
                    x.copy_(y)
        self._block = block

    def step(self) -> dict[str, Tensor]:
        """One update; returns its loss and accuracy, still on the device.

        Where the step is recorded, the next one overwrites them.
        """
        set_rate(self.optimiser, self.config.lr_at(self.iteration))
        self._draw_ahead()
        self.iteration += 1
        if not self.recorded:
            loss, accuracy = self._update()
        else:
            if self._graph is None:
                state = [*self.parameters, *self.average, self.clock]
                state += optimiser_state(self.optimiser)
                self._graph = capture(self._update, state=state)
            loss, accuracy = self._graph()
        return {"loss": loss, "accuracy": accuracy}

    @property
    def done(self) -> bool:
        """Whether all steps are over."""
        return self.iteration >= self.config.steps

    def meta_lora(self) -> LoRA:
        """A detached copy of the meta-LoRA as it stands (its moving average, where asked for)."""
        lora = self.lora.clone()
        if self.average and self.config.learn != "backbone":
            for tensor, average in zip(lora.tensors(), self.average, strict=True):
                tensor.copy_(average)
        return lora

    def save(self, path: Path, extra: dict[str, Tensor]) -> None:
        """Write all that later steps need, atomically."""
        tensors = dict(extra)
        for i, p in enumerate(self.parameters):
            tensors[f"parameter.{i}"] = p
            for name, value in self.optimiser.state.get(p, {}).items():
                tensors[f"optimiser.{i}.{name}"] = value
        for i, x in enumerate(self.average):
            tensors[f"average.{i}"] = x
        save_checkpoint(
            path, tensors, {"iteration": str(self.iteration), "version": _STATE_VERSION}
        )

    def restore(self, path: Path) -> dict[str, Tensor]:
        """Go on from a saved state; returns what `save` was given as `extra`.

        Raises:
            ValueError: damaged, or of another configuration.

        """
        tensors, metadata = load_checkpoint(path)
        iteration = metadata.get("iteration", "")
        if (
            metadata.get("version") != _STATE_VERSION
            or not re.fullmatch("[0-9]{1,9}", iteration)
            or int(iteration) > self.config.steps
            or not self._holds_state(tensors)
        ):
            raise ValueError(f"{path}: a checkpoint of another configuration; remove it to restart")
        self.iteration = int(iteration)
        self.clock.fill_(self.iteration)
        self._graph = None  # it knows the old state
        with torch.no_grad():
            for i, p in enumerate(self.parameters):
                p.copy_(tensors.pop(f"parameter.{i}"))
                state = {}
                for name in ("step", "exp_avg", "exp_avg_sq"):
                    value = tensors.pop(f"optimiser.{i}.{name}", None)
                    if value is not None:
                        on_host = name == "step" and not self.recorded
                        state[name] = value if on_host else value.to(p.device)
                if state:
                    self.optimiser.state[p] = state
            for i, x in enumerate(self.average):
                x.copy_(tensors.pop(f"average.{i}"))
        return tensors

    def _holds_state(self, tensors: dict[str, Tensor]) -> bool:
        """Whether a checkpoint has all parameters, averages and moments of Adam, and no others."""
        expected = {f"average.{i}": x.shape for i, x in enumerate(self.average)}
        for i, p in enumerate(self.parameters):
            expected[f"parameter.{i}"] = p.shape
            if f"optimiser.{i}.step" in tensors:
                expected[f"optimiser.{i}.step"] = torch.Size()
                expected |= {f"optimiser.{i}.{m}": p.shape for m in ("exp_avg", "exp_avg_sq")}
        own = {
            name: x.shape
            for name, x in tensors.items()
            if name.startswith(("parameter.", "optimiser.", "average.")) and x.is_floating_point()
        }
        return own == expected


def _is_large(pool: SyntheticPool, device: torch.device) -> bool:
    """Whether a pool on disk is better read as it is drawn than held on the device."""
    if not pool.mapped:
        return False
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return pool.image_bytes > memory / 4


def _started(fresh: LoRA, start: LoRA, blocks: tuple[int, ...]) -> LoRA:
    """`fresh` with the change of `start`, as near as its rank allows, in the blocks that learn."""
    near = start.compress(fresh.rank, tuple(fresh.a))
    a, b = {}, {}
    for t in fresh.a:
        on = torch.tensor([float(i in blocks) for i in range(fresh.depth)])[:, None, None]
        scale = fresh.scale[t].clamp_min(1e-12)[:, None, None]
        a[t] = near.a[t].to(fresh.a[t]) * on
        b[t] = near.b[t].to(fresh.b[t]) * on / torch.where(on > 0, scale, 1.0)
    return replace(fresh, a=a, b=b)


def _mirror(keep: Tensor | RaggedKeep, grid: int, mirrored: Tensor) -> Tensor | RaggedKeep:
    """Patch indices after a horizontal flip of the images where `mirrored` (B,) says so."""

    def flip(index: Tensor, where: Tensor) -> Tensor:
        return torch.where(where, index + (grid - 1) - 2 * (index % grid), index)

    if isinstance(keep, RaggedKeep):
        return replace(keep, patches=flip(keep.patches, mirrored[keep.image]))
    return flip(keep, mirrored[:, None])


def meta_train(
    vit: ViT,
    pool: SyntheticPool,
    config: MetaConfig | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    backend: Resolved = "reference",
    start: LoRA | None = None,
    folder: str | Path | None = None,
    validate: Callable[[ViT, LoRA], float] | None = None,
    on_step: OnStep | None = None,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
    staged: bool | None = None,
) -> MetaResult:
    """Meta-train a meta-LoRA on a pool.

    Args:
        vit, pool, config, seed, precision, backend: see `MetaTrainer`.
        start: where the meta-LoRA starts, any rank; None: it changes nothing at first.
        folder: where checkpoints are kept; a second call goes on from there, to the same result.
        validate: scores a meta-LoRA on validation tasks, higher is better; with it the best step
            is returned instead of the last. Never give it test tasks.
        on_step: called after each step with the steps done and, from time to time, loss, accuracy,
            learning rate and validation score.
        stop: asked after each step; True saves the state and raises KeyboardInterrupt.
        ranks: processes that share each step's tasks, all of which call this with the same
            arguments; the first alone writes to the folder, validates and reports. See
            `fastrecycle.parallel`.
        staged: see `MetaTrainer`.

    Raises:
        ValueError: see `EpisodeSampler` and `SyntheticPool.keep`.
        KeyboardInterrupt: `stop` said so.

    """
    config = config or MetaConfig()
    trainer = MetaTrainer(
        vit, pool, config, seed=seed, precision=precision, backend=backend, start=start,
        ranks=ranks, staged=staged,
    )  # fmt: skip
    state = None if folder is None else Path(folder) / "meta.state.safetensors"
    best: tuple[int, float, list[Tensor]] | None = None
    validation: dict[int, float] = {}

    def extra() -> dict[str, Tensor]:
        scores = sorted(validation.items())
        tensors = {"validation": torch.tensor(scores, dtype=torch.float64).reshape(-1, 2)}
        if best is not None:
            tensors["best"] = torch.tensor([best[0], best[1]], dtype=torch.float64)
            tensors |= {f"best.{i}": x for i, x in enumerate(best[2])}
        return tensors

    if state is not None and state.exists():
        saved = trainer.restore(state)
        try:
            validation = {int(s): v for s, v in saved["validation"].tolist()}
            if "best" in saved:
                step, score = saved["best"].tolist()
                count = sum(name.startswith("best.") for name in saved)
                best = (int(step), score, [saved[f"best.{i}"] for i in range(count)])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(
                f"{state}: a checkpoint of another configuration; remove it to restart"
            ) from None
    while not trainer.done:
        values = trainer.step()
        step = trainer.iteration
        report: dict[str, float] = {}
        if validate is not None and (step % config.validate_every == 0 or trainer.done):
            lora = trainer.meta_lora()
            score = ranks.told(lambda: validate(trainer.vit, lora))  # noqa: B023
            validation[step] = report["validation"] = score
            if best is None or score > best[1]:
                kept = lora.tensors() if config.learn != "backbone" else trainer.parameters
                best = (step, score, [x.detach().cpu().clone() for x in kept])
        if on_step is not None and ranks.first:
            if step % 20 == 0 or trainer.done:
                report |= {k: v.item() for k, v in values.items()}
                report["lr"] = config.lr_at(step - 1)
            on_step(step, report)
        halt = ranks.agree(stop, step)
        due = halt or trainer.done or step % config.checkpoint_every == 0
        if state is not None and due and ranks.first:
            trainer.save(state, extra())
        if halt and not trainer.done:
            raise KeyboardInterrupt
    lora = trainer.meta_lora()
    chosen = trainer.iteration
    if best is not None:
        chosen = best[0]
        with torch.no_grad():
            own = lora.tensors() if config.learn != "backbone" else trainer.parameters
            for tensor, value in zip(own, best[2], strict=True):
                tensor.copy_(value)
    return MetaResult(lora, trainer.vit.requires_grad_(False), chosen, validation)

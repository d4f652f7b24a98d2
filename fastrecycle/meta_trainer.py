"""A meta-LoRA in training: batches from the pool, updates, checkpoints (LoRA Recycle, Alg. 1).

E episodes in a step, W ways, K shots, Q queries a class, F features, S side.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastrecycle.augment import crop_maps, shrink_table
from fastrecycle.capture import Captured, capture, optimiser_state, set_rate
from fastrecycle.config import MetaConfig
from fastrecycle.files import load_checkpoint, save_checkpoint
from fastrecycle.lora import LoRA
from fastrecycle.meta_loss import meta_loss, targets
from fastrecycle.meta_tasks import (
    Draw,
    EpisodeSampler,
    draw_tasks,
    group_sizes,
    masked_groups,
    masked_patches,
)
from fastrecycle.ops import (
    Impl,
    Resolved,
    augment,
    autocast,
    check_precision,
    impl_of,
    weight_dtype,
)
from fastrecycle.parallel import ALONE, Ranks
from fastrecycle.pool import SyntheticPool
from fastrecycle.text import check_width
from fastrecycle.vit import RaggedKeep, ViT

# Step 0 of a checkpoint's metadata format; a change of it makes old checkpoints unreadable.
_STATE_VERSION = "1"

DRAWN = 64  # steps whose draws are made and moved to the device at once
# and where their images are moved, too: 1.2 GB at 100 images of 224 pixels a step
STAGED = 80


class Batch(NamedTuple):
    """Tasks of one shape, ready for the backbone."""

    images: Tensor  # (E W (K + Q), 3, S, S), normalised
    keep: Tensor | RaggedKeep | None  # kept patches of each image; None: all
    target: Tensor  # (E, W Q, W), see `targets`
    text: Tensor | None  # (E, W, F), class texts, scale included, where there are no shots


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
        for masked, tasks in zip(masked_groups(config), group_sizes(config), strict=True):
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
        side = self.vit.config.image_size
        return draw_tasks(self.sampler, first, steps, side, self.patches, self.ranks)

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
            for draw, masked in zip(draws, masked_groups(self.config), strict=True)
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

    def _update(self) -> tuple[Tensor, Tensor]:
        """One update from the draw that the clock shows; everything happens on the device."""
        loss, accuracy = self.clock.new_zeros(()), self.clock.new_zeros(())
        slot = (self.clock.long() % self.steps_drawn).view(1)
        for draws, masked in zip(self._drawn, masked_groups(self.config), strict=True):
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

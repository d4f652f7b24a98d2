"""Training of CAML on the synthetic pool: views of its images, tasks drawn from them, the loop.

M images of the pool, V views of each, F features, E tasks in a step, W ways, K shots, Q queries a
class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrecycle.augment import shrink_table
from fastrecycle.baselines.caml import CAMLNetwork
from fastrecycle.capture import Captured, capture, optimiser_state, set_rate
from fastrecycle.classifier import Embedder
from fastrecycle.config import MetaConfig
from fastrecycle.inversion import OnStep
from fastrecycle.meta_trainer import DRAWN
from fastrecycle.metatrain import EpisodeSampler
from fastrecycle.ops import Resolved, augment, autocast
from fastrecycle.pool import SyntheticPool
from fastrecycle.vit import ViT


@dataclass(frozen=True)
class CAMLConfig:
    """The network of CAML and its training on synthetic tasks."""

    # Optimiser steps.
    steps: int = 2000
    # Classes of each task.
    ways: int = 5
    # Support images a class.
    shots: int = 1
    # Query images a class.
    queries: int = 15
    # Tasks in one step; their losses are averaged.
    tasks: int = 8
    # Probability that a task mixes classes of several LoRAs (cross-task interpolation, Eq. 4).
    interpolation: float = 0.5
    # Images of a class of such a task: from one LoRA that shows it, or from all.
    holders: Literal["one", "all"] = "one"
    # The most ways that the network will tell apart; a training task deals `ways` of the codes.
    max_ways: int = 5
    # Numbers of a label code, added to the features for the transformer's width.
    code_dim: int = 256
    # Blocks of the transformer; its authors take ViT-L's 24.
    layers: int = 24
    # Attention heads; they must divide features + code_dim.
    heads: int = 8
    # Peak learning rate of AdamW.
    lr: float = 3e-4
    # Its weight decay.
    weight_decay: float = 0.01
    # Share of the steps in which the rate rises to its peak, before it falls along a cosine.
    warmup: float = 0.05
    # Longest gradient, over all parameters; longer ones are cut back to it.
    clip: float = 1.0
    # Probability of a horizontal flip, for a task's images together.
    flip: float = 0.5
    # Resolution augmentation: a task's images shrink to a side of this range, in pixels, and grow
    # back. A side beyond the image's own leaves it as it is. "0 0" turns it off.
    resolution: tuple[int, int] = (24, 96)
    # Sides of that range, evenly spaced, that are drawn from: at each the pool is embedded once.
    sides: int = 25

    def __post_init__(self) -> None:
        for name in ("steps", "tasks", "sides", "shots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be >= 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr: must be positive and finite, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"weight_decay: must be finite and not negative, got {self.weight_decay}"
            )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: must be in [0, 1), got {self.warmup}")
        if not self.clip > 0:
            raise ValueError(f"clip: must be positive, got {self.clip}")
        if self.ways > self.max_ways:
            raise ValueError(f"ways: must be at most max_ways {self.max_ways}, got {self.ways}")
        self.episodes()

    def episodes(self) -> MetaConfig:
        """The tasks, and the augmentation of their images, as `EpisodeSampler` takes them.

        Raises:
            ValueError: a number out of range.

        """
        return MetaConfig(
            ways=self.ways, shots=self.shots, queries=self.queries, tasks=self.tasks,
            interpolation=self.interpolation, holders=self.holders, flip=self.flip,
            resolution=self.resolution,
        )  # fmt: skip

    def augmentation(self) -> tuple[float, tuple[int, int], int]:
        """Flip, resolution and sides: what `pool_views` reads."""
        return self.flip, self.resolution, self.sides

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (0-based)."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.lr * (step + 1) / warm
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Views(NamedTuple):
    """The pool's features under the plain backbone, augmented in every way of a grid."""

    features: Tensor  # (flips, sides, M, F)
    flips: tuple[bool, ...]  # whether mirrored
    drawn: tuple[int, ...]  # which of the sides, equally probable; those beyond the image's are one
    augmentation: tuple[float, tuple[int, int], int]  # flip, resolution, sides it was made for


def pool_views(
    vit: ViT,
    pool: SyntheticPool,
    config: CAMLConfig,
    *,
    precision: str = "fp32",
    backend: Resolved = "reference",
    batch_size: int = 256,
) -> Views:
    """Embed a pool under each augmentation that training draws.

    The backbone is frozen and a task's images are flipped and shrunk together, so a table of
    features holds all that training sees, and no step runs the backbone.

    Args:
        vit: the frozen backbone, on the device to use.
        pool: images of its size.
        config: flip, resolution and sides.
        precision, backend: see `Embedder`; below fp32 the table is bf16.
        batch_size: images a forward pass.

    Raises:
        ValueError: images of another size.

    """
    side, device = vit.config.image_size, vit.pos_embed.device
    if pool.images.shape[-1] != side:
        raise ValueError(f"pool: images of side {pool.images.shape[-1]}, the backbone takes {side}")
    flips = tuple(f for f, chance in ((False, 1 - config.flip), (True, config.flip)) if chance > 0)
    sides, drawn, maps = np.array([side]), np.zeros(1, np.int64), None
    if config.resolution[1]:
        grid = np.linspace(*config.resolution, config.sides).round().astype(int).clip(max=side)
        sides, drawn = np.unique(grid, return_inverse=True)
        maps = shrink_table(side, sides[0], sides[-1])[sides - sides[0]].to(device)
    embed = Embedder(vit, precision=precision, backend=backend)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    table = torch.empty(
        len(flips), len(sides), len(pool), vit.config.features, dtype=dtype, device=device
    )
    for rows in torch.arange(len(pool)).split(batch_size):
        pixels = pool.images[rows].to(device)
        every = torch.arange(len(rows), device=device)
        for i, flip in enumerate(flips):
            mirrored = torch.full((len(rows),), flip, device=device)
            for j in range(len(sides)):
                which = None if maps is None else torch.full_like(every, j)
                images = augment(
                    pixels, every, maps, maps, which, mirrored, vit.config.mean, vit.config.std,
                    dtype,
                )  # fmt: skip
                table[i, j, rows[0] : rows[-1] + 1] = embed(images, batch_size).to(dtype)
    return Views(table, flips, tuple(drawn.tolist()), config.augmentation())


class Draw(NamedTuple):
    """What chance decides about many steps' tasks."""

    rows: Tensor  # (steps, E, W (K + Q)) int64, of the table of views as one long list
    codes: Tensor  # (steps, E, W) int64, which code stands for each way


class CAMLTrainer:
    """Network, optimiser and sampler; `step()` is one update. See `train_caml`."""

    def __init__(
        self, views: Views, pool: SyntheticPool, config: CAMLConfig, *, seed: int, precision: str
    ):
        device = views.features.device
        self.config, self.seed, self.precision, self.views = config, seed, precision, views
        self.sampler = EpisodeSampler(pool, config.episodes(), seed)
        expected = (len(pool), *config.augmentation())
        got = (views.features.shape[2], *views.augmentation)
        if got != expected:
            raise ValueError(
                "views: expected (images, flip, resolution, sides) of pool and config"
                f" {expected}, got {got}; make them anew with pool_views"
            )
        self.table = views.features.flatten(0, 2)  # (V M, F)
        self.model = CAMLNetwork(
            self.table.shape[1], max_ways=config.max_ways, code_dim=config.code_dim,
            layers=config.layers, heads=config.heads, seed=seed,
        ).to(device)  # fmt: skip
        self.model.centre.copy_(self.table.mean(0, dtype=torch.float32))
        self.model.requires_grad_(True)
        self.parameters = list(self.model.parameters())
        # A recorded step cannot read a number of the host.
        self.recorded = device.type == "cuda"
        self.optimiser = torch.optim.AdamW(
            self.parameters,
            lr=torch.tensor(config.lr, device=device) if self.recorded else config.lr,
            weight_decay=config.weight_decay,
            capturable=self.recorded,
            fused=self.recorded,
        )
        ways, per_way = config.ways, config.shots + config.queries
        grid = torch.arange(ways * per_way, device=device).view(ways, per_way)
        self.support, self.query = (
            x.flatten() for x in grid.split((config.shots, config.queries), 1)
        )
        self.way, self.truth = (
            torch.arange(ways, device=device).repeat_interleave(count)
            for count in (config.shots, config.queries)
        )
        self.iteration = 0
        self.clock = torch.zeros((), dtype=torch.int64, device=device)
        self._graph: Captured | None = None
        self._drawn: Draw | None = None

    def _draw(self, first: int) -> Draw:
        """All that is random in DRAWN steps; a step's draw depends on the seed and its number."""
        config, views = self.config, self.views
        drawn = self.sampler.draw(first, DRAWN).rows.reshape(DRAWN, config.tasks, -1)
        rows, codes = [], []
        for i in range(DRAWN):
            # the sampler's key, another stretch of its counter
            rng = np.random.Generator(
                np.random.Philox(key=[self.seed, first + i], counter=[0, 0, 0, 1])
            )
            mirrored = rng.random(config.tasks) < config.flip
            flip = np.array([views.flips.index(bool(m)) for m in mirrored])
            side = rng.choice(views.drawn, config.tasks)
            view = flip * views.features.shape[1] + side  # (E,)
            rows.append(view[:, None] * views.features.shape[2] + drawn[i])
            every = np.tile(np.arange(config.max_ways), (config.tasks, 1))
            codes.append(rng.permuted(every, axis=1)[:, : config.ways])
        return Draw(torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(codes)))

    def _draw_ahead(self) -> None:
        """Have the draws of DRAWN steps on the device; each copy makes the host wait."""
        if self.iteration % DRAWN:
            return
        new = self._draw(self.iteration)
        if self._drawn is None:
            self._drawn = Draw(*(x.to(self.table.device) for x in new))
        else:  # in place: a recorded step reads these very tensors
            for own, x in zip(self._drawn, new, strict=True):
                own.copy_(x)

    def _update(self) -> tuple[Tensor, Tensor]:
        assert self._drawn is not None
        slot = (self.clock % DRAWN).view(1)
        rows, codes = (x.index_select(0, slot)[0] for x in self._drawn)
        features = self.table[rows]  # (E, W (K + Q), F)
        with autocast(features.device, self.precision):
            logits = self.model(features[:, self.support], self.way, features[:, self.query], codes)
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self.truth.repeat(len(codes))
        )
        gradients = torch.autograd.grad(loss, self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        self.optimiser.step()
        self.clock += 1
        return loss.detach(), (logits.argmax(-1) == self.truth).float().mean()

    def step(self) -> dict[str, Tensor]:
        """One update; returns its loss and accuracy, still on the device.

        On CUDA the step is recorded, and the next one overwrites them.
        """
        set_rate(self.optimiser, self.config.lr_at(self.iteration))
        self._draw_ahead()
        self.iteration += 1
        if not self.recorded:
            loss, accuracy = self._update()
        else:
            if self._graph is None:
                state = [*self.parameters, self.clock, *optimiser_state(self.optimiser)]
                self._graph = capture(self._update, state=state)
            loss, accuracy = self._graph()
        return {"loss": loss, "accuracy": accuracy}


def train_caml(
    vit: ViT,
    pool: SyntheticPool,
    config: CAMLConfig | None = None,
    *,
    seed: int = 0,
    precision: str = "fp32",
    backend: Resolved = "reference",
    views: Views | None = None,
    on_step: OnStep | None = None,
) -> CAMLNetwork:
    """Train CAML's network by cross-entropy on tasks from a pool.

    The same seed gives the same network, on the CPU bit for bit. There are no checkpoints: a run
    that was cut off starts over.

    Args:
        vit: the frozen backbone, on the device to use; on CUDA a step is recorded as a CUDA graph.
        pool: synthetic images.
        config: see `CAMLConfig`.
        seed: of the network's start, its codes and everything drawn.
        precision, backend: of the backbone, see `pool_views`; below fp32 the network trains in
            mixed precision too.
        views: what `pool_views` made of the same pool and settings, for several runs on one table.
        on_step: called after each step with the steps done and, from time to time, loss, accuracy
            and learning rate.

    Returns:
        The network of the last step, frozen, on the device of `vit`.

    Raises:
        ValueError: a pool of another backbone, or one too small for the tasks.

    """
    config = config or CAMLConfig()
    if views is None:
        EpisodeSampler(pool, config.episodes(), seed)  # raises before the pool is embedded
        views = pool_views(vit, pool, config, precision=precision, backend=backend)
    trainer = CAMLTrainer(views, pool, config, seed=seed, precision=precision)
    for step in range(1, config.steps + 1):
        values = trainer.step()
        if on_step is not None:
            report: dict[str, float] = {}
            if step % 20 == 0 or step == config.steps:
                report = {name: x.item() for name, x in values.items()}
                report["lr"] = config.lr_at(step - 1)
            on_step(step, report)
    return trainer.model.requires_grad_(False)

"""Table 12: methods with a bank at 0 shots, told apart by the texts of class names.

Without shots there is no support set that MOLE and LoRAHub could be fine-tuned on, and the paper
does not say what its own were. Here both learn from what LoRA Recycle learns from: tasks of the
synthetic pool, with its augmentation and the contrastive loss. The gate and the weights are then
those of all test tasks. That needs no data, and gives them more than a task of theirs would have.

E tasks, W ways, Q queries a class, n images, F features, G LoRAs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastrecycle.augment import shrink_table
from fastrecycle.baselines.base import AverageOf, Cost, Meter
from fastrecycle.baselines.linear import OPTIMIZERS
from fastrecycle.baselines.lorahub import LoRAHub, mix, searches
from fastrecycle.baselines.mole import MOLE
from fastrecycle.baselines.network import AdaptedNetwork
from fastrecycle.baselines.protocol import GRID, TaskPixels, decode_tasks
from fastrecycle.config import MetaConfig
from fastrecycle.eval import Result, embed, score_zero_shot
from fastrecycle.lora import LoRA, LoRABank
from fastrecycle.metatrain import EpisodeSampler, meta_loss
from fastrecycle.ops import Backend, augment
from fastrecycle.pool import SyntheticPool
from fastrecycle.text import TextTower, check_width
from fastrecycle.vit import ViT

POOL_TASKS = MetaConfig(shots=0, tasks=4, target="label")  # of the pool, for MOLE and LoRAHub


@dataclass(frozen=True, eq=False)
class PoolTuned:
    """A method that adapts the network, adapted to a synthetic pool."""

    method: AdaptedNetwork
    network: dict[str, Tensor]  # what it learnt, each (1, ...)
    cost: Cost  # of learning, once for all tasks

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Normalised images (n, 3, S, S) -> (n, F) float32."""
        return self.method._features(self.network, images[None])[0].float()


class PoolTasks:
    """0-shot tasks of a pool with the augmentation of meta-training, the same at each call.

    Args:
        vit: decides size, normalisation and device.
        pool: images of LoRAs whose heads are class texts.
        config: ways, queries, tasks, interpolation, flip and resolution.
        seed: of everything drawn.

    Raises:
        ValueError: see `EpisodeSampler`, or shots.

    """

    def __init__(self, vit: ViT, pool: SyntheticPool, config: MetaConfig, seed: int = 0):
        if config.shots != 0 or config.target != "label" or config.sparsity:
            raise ValueError(
                'tasks: expected 0 shots, target "label" and no sparsity, got'
                f" {config.shots}, {config.target!r} and {config.sparsity}"
            )
        self.sampler = EpisodeSampler(pool, config, seed)
        assert pool.text is not None  # the sampler has seen to it
        check_width(pool.text, vit.config.features)
        self.vit, self.config, self.seed = vit, config, seed
        device, side = vit.pos_embed.device, vit.config.image_size
        self.images, self.text, self.text_rows = (
            x.to(device) for x in (pool.images, pool.text, pool.text_rows)
        )
        sides = config.resolution
        self.shrink = shrink_table(side, *sides).to(device) if sides[1] else None
        truth = torch.eye(config.ways, device=device).repeat_interleave(config.queries, 0)
        self.target = truth.expand(config.tasks, -1, -1)  # (E, W Q, W)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (E W Q, 3, S, S), normalised, and class texts (E, W, F) of one step."""
        config, side = self.config, self.vit.config.image_size
        rows = torch.from_numpy(self.sampler.draw(step).rows).to(self.images.device)
        # the sampler's key, another stretch of its counter
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, 1]))
        per_task = rows[0].numel()
        flip = torch.from_numpy(rng.random(config.tasks) < config.flip)
        low, high = config.resolution
        small = torch.from_numpy(rng.integers(low, high + 1, config.tasks).clip(max=side))
        which = (small - min(low, side)).repeat_interleave(per_task).to(rows.device)
        images = augment(
            self.images, rows.flatten(), self.shrink, self.shrink,
            None if self.shrink is None else which,
            flip.repeat_interleave(per_task).to(rows.device),
            self.vit.config.mean, self.vit.config.std,
        )  # fmt: skip
        return images, self.text[self.text_rows[rows[:, :, 0]]]

    def loss(self, features: Tensor, text: Tensor) -> Tensor:
        """Mean contrastive loss from images to texts, a scalar, of features (E W Q, F)."""
        shape = (-1, self.config.ways, self.config.queries)
        return meta_loss(features.unflatten(0, shape).float(), self.target, self.config, text)[0]


def tune_mole(
    vit: ViT,
    bank: Sequence[LoRA],
    pool: SyntheticPool,
    config: MetaConfig = POOL_TASKS,
    *,
    optimizer: Literal["sgd", "adam"] = "sgd",
    lr: float = 0.01,
    steps: int = 50,
    seed: int = 0,
    precision: str = "fp32",
) -> PoolTuned:
    """MOLE's gates over the bank, trained on tasks of the pool, fresh ones each step.

    Args:
        vit: the image tower, on the device to use.
        bank: the LoRAs that the pool was inverted from.
        pool, config, seed: see `PoolTasks`.
        optimizer, lr, steps, precision: see `MOLE`.

    Raises:
        ValueError: see `MOLE.check` and `PoolTasks`.

    """
    mole = MOLE(vit, bank, optimizer, lr, steps, precision=precision)
    mole.check()
    tasks = PoolTasks(vit, pool, config, seed)
    with Meter(vit.pos_embed.device) as meter:
        network = mole._start(1)
        trained = [x.requires_grad_() for x in network.values()]
        descent = OPTIMIZERS[optimizer](trained, lr=lr)
        for step in range(steps):
            images, text = tasks.batch(step)
            loss = tasks.loss(mole._features(network, images[None])[0], text)
            # a backbone may have weights that its feature does not depend on
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
            for tensor, gradient in zip(trained, gradients, strict=True):
                tensor.grad = gradient
            descent.step()
    network = {name: x.detach() for name, x in network.items()}
    return PoolTuned(mole, network, meter.cost(sum(x.numel() for x in network.values())))


def search_lorahub(
    vit: ViT,
    bank: Sequence[LoRA],
    pool: SyntheticPool,
    config: MetaConfig = POOL_TASKS,
    *,
    of: AverageOf = "factors",
    steps: int = 40,
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int = 128,
) -> PoolTuned:
    """LoRAHub's weights of the bank, searched on the first tasks that the pool gives.

    The loss is the contrastive loss + l1 mean |w|, on the same images at each step of the search.

    Args:
        vit: the image tower, on the device to use.
        bank: the LoRAs that the pool was inverted from.
        pool, config, seed: see `PoolTasks`; the seed is also the search's.
        of, steps, precision: see `LoRAHub`.
        batch_size: images a forward pass.

    Raises:
        ImportError: nevergrad is absent.
        ValueError: see `LoRAHub.check` and `PoolTasks`.

    """
    hub = LoRAHub(vit, bank, of, steps=steps, seed=seed, precision=precision)
    hub.check()
    tasks = PoolTasks(vit, pool, config, seed)
    images, text = tasks.batch(0)
    with torch.no_grad(), Meter(vit.pos_embed.device) as meter, searches(1, len(bank), hub) as s:
        for _ in range(steps):
            weights = s.ask().to(images)
            network = mix(hub._bank(), weights, of)
            parts = [hub._features(network, x[None])[0] for x in images.split(batch_size)]
            loss = tasks.loss(torch.cat(parts), text)
            s.tell(loss + hub.l1 * weights.abs().mean(1))
        network = mix(hub._bank(), s.best().to(images), of)
    return PoolTuned(hub, network, meter.cost(len(bank)))


class ZeroShotRow(NamedTuple):
    """A row of Table 12."""

    result: Result
    tunes: bool  # whether the method is fine-tuned
    settings: dict[str, Any]  # chosen on validation tasks, or given
    cost: Cost | None  # of tuning, once for all tasks; None: nothing is tuned


def zero_shot_rows(
    vit: ViT,
    text: TextTower,
    dataset: Any,
    *,
    bank: Sequence[LoRA],
    pool: SyntheticPool,
    meta_lora: LoRA,
    validation: Any = None,
    grid: Mapping[str, Sequence[Any]] = GRID,
    config: MetaConfig = POOL_TASKS,
    of: AverageOf = "factors",
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    split: str = "test",
    seed: int = 0,
    data_root: str | Path | None = None,
    batch_size: int = 128,
    precision: str = "fp32",
    backend: Backend = "auto",
) -> dict[str, ZeroShotRow]:
    """Table 12: every method at 0 shots on the same frozen tasks, so that all results pair.

    Args:
        vit: the image tower, on the device to use.
        text: the text tower of the same model.
        dataset, split, data_root: see `fastrecycle.eval.evaluate`.
        bank: LoRAs of the image tower.
        pool: inverted from them under heads of class texts.
        meta_lora: meta-trained on that pool.
        validation: a data set whose "val" tasks choose MOLE's settings from `grid`, never test
            data; None: its defaults.
        grid: settings of `tune_mole`.
        config: the pool's tasks, see `PoolTasks`.
        of: of "LoRAs Avg" and LoRAHub: "factors" (the baselines') or "products".
        ways, queries, tasks, seed: shape, number and seed of the tasks.
        batch_size, precision, backend: see `fastrecycle.eval.evaluate`.

    Returns:
        {method: row} of the plain two-tower model, LoRAs Avg, MOLE, LoRAHub and LoRA Recycle.

    Raises:
        FileNotFoundError: no such data set; the text says what to put where.
        ImportError: nevergrad is absent.
        ValueError: parts of different models, classes without names, or too few of anything.

    """
    shape: dict[str, Any] = {"ways": ways, "queries": queries, "tasks": tasks, "seed": seed}
    own = LoRABank(bank).fit(vit.config)
    on = decode_tasks(vit, dataset, shots=(1,), split=split, data_root=data_root, **shape)[1]

    def plain(lora: LoRA | None) -> ZeroShotRow:
        how: dict[str, Any] = {"precision": precision, "backend": backend}
        features = _everywhere(
            on, lambda rows: embed(vit, lora, on.pixels, rows, batch_size=batch_size, **how)
        )
        classes = text.classes(on.pixels.class_names)
        check_width(classes.embeddings, vit.config.features)
        return ZeroShotRow(score_zero_shot(features, classes, on.tasks), False, {}, None)

    def tuned(found: PoolTuned, settings: dict[str, Any]) -> ZeroShotRow:
        return ZeroShotRow(score_tuned(found, text, on, batch_size), True, settings, found.cost)

    rows = {"Two-tower model": plain(None), "LoRAs Avg": plain(LoRA.average(own, of=of))}
    settings: dict[str, Any] = {}
    if validation is not None:
        settings = _choose_mole(
            vit, text, own, pool, config, grid, precision, batch_size,
            decode_tasks(vit, validation, shots=(1,), split="val", data_root=data_root, **shape)[1],
        )  # fmt: skip
    mole = tune_mole(vit, own, pool, config, seed=seed, precision=precision, **settings)
    chosen = {name: getattr(mole.method, name) for name in ("optimizer", "lr", "steps")}
    rows["MOLE"] = tuned(mole, chosen)
    hub = search_lorahub(
        vit, own, pool, config, of=of, seed=seed, precision=precision, batch_size=batch_size
    )
    rows["LoRAHub"] = tuned(hub, {"of": of})
    rows["LoRA Recycle"] = plain(meta_lora.fit(vit.config))
    return rows


def score_tuned(found: PoolTuned, text: TextTower, on: TaskPixels, batch_size: int = 128) -> Result:
    """Accuracy of a method tuned on a pool, at 0 shots.

    Args:
        found: the method.
        text: the text tower of the same model.
        on: 1-shot tasks, whose support is left out; see `decode_tasks`.
        batch_size: images a forward pass.

    """
    vit = found.method.vit

    def features(rows: np.ndarray) -> Tensor:
        parts = torch.from_numpy(rows).to(on.pixels.pixels.device).split(batch_size)
        pixels = (on.pixels.pixels[part].to(vit.pos_embed.device).float() / 255 for part in parts)
        return torch.cat([found.features(vit.normalise(x)) for x in pixels])

    classes = text.classes(on.pixels.class_names)
    return score_zero_shot(_everywhere(on, features), classes, on.tasks)


def _everywhere(on: TaskPixels, features_of: Callable[[np.ndarray], Tensor]) -> Tensor:
    """Features (N, F), zero where no task has the image among its queries."""
    used = np.unique(on.tasks.query)
    features = features_of(used)
    everywhere = features.new_zeros(len(on.pixels.labels), features.shape[1])
    everywhere[torch.from_numpy(used).to(features.device)] = features
    return everywhere


def _choose_mole(
    vit: ViT,
    text: TextTower,
    bank: Sequence[LoRA],
    pool: SyntheticPool,
    config: MetaConfig,
    grid: Mapping[str, Sequence[Any]],
    precision: str,
    batch_size: int,
    on: TaskPixels,
) -> dict[str, Any]:
    """The settings of `tune_mole` with the best accuracy on validation tasks."""
    best: tuple[float, dict[str, Any]] = (-1.0, {})
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        found = tune_mole(vit, bank, pool, config, precision=precision, **settings)
        accuracy = score_tuned(found, text, on, batch_size).accuracy
        if accuracy > best[0]:
            best = (accuracy, settings)
    return best[1]

"""Settings of each stage as frozen dataclasses; the command line is generated from them.

The comment above a field is its help text. Defaults follow the paper where it says something and
`docs/method.md` where it does not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["auto", "fp32", "bf16", "fp8"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_range(name: str, sides: tuple[int, int]) -> None:
    low, high = sides
    _require(
        (low == high == 0) or 1 <= low <= high,
        f"{name}: expected 1 <= low <= high pixels, or 0 0 for none, got {sides}",
    )


@dataclass(frozen=True)
class PretuneConfig:
    """A bank of LoRAs with heads from labelled data, each on its own few-way task."""

    # LoRAs to train.
    num: int = 100
    # Classes of each task.
    ways: int = 5
    # Rank of each LoRA; several are dealt out in turn, so "4 8" makes half of each (Table 9).
    rank: tuple[int, ...] = (4,)
    # LoRA alpha; unset means alpha = rank, a scale of 1.
    alpha: float | None = None
    # Products with a LoRA: q, k, v, proj, fc1, fc2.
    targets: tuple[str, ...] = ("q", "v")
    # Adam steps.
    steps: int = 80
    # Images a step and LoRA.
    batch_size: int = 50
    # Adam's learning rate.
    lr: float = 1e-3
    # Probability of a horizontal flip.
    flip: float = 0.5
    # LoRAs trained side by side in one batch.
    group: int = 10

    def __post_init__(self) -> None:
        for name in ("num", "steps", "batch_size", "group"):
            _require(getattr(self, name) >= 1, f"{name}: must be >= 1, got {getattr(self, name)}")
        _require(self.ways >= 2, f"ways: must be at least 2, got {self.ways}")
        _require(len(self.rank) > 0, "rank: expected at least one, got none")
        _require(min(self.rank) >= 1, f"rank: must be at least 1, got {self.rank}")


@dataclass(frozen=True)
class InversionConfig:
    """LoRA Inversion: images from LoRAs (Eq. 1, 2 and the pruning of Sec. 4.3)."""

    # Images synthesised for each class of each LoRA; a 5-way 1-shot task with 15 queries uses 16.
    images_per_class: int = 20
    # Optimiser steps on the pixels.
    iterations: int = 2000
    # Adam's learning rate on the pixels.
    lr: float = 0.25
    # Adam's betas.
    betas: tuple[float, float] = (0.5, 0.99)
    # Learning rate over the iterations: constant (the paper) or a cosine down to zero.
    schedule: Literal["constant", "cosine"] = "constant"
    # Weight of the naturalness prior R_BN (Eq. 1).
    alpha: float = 0.01
    # Extra factor on the first BatchNorm's term of R_BN.
    first_bn: float = 1.0
    # Weight of the cross-entropy; 0 leaves images of R_BN alone (a control).
    ce: float = 1.0
    # Weight of total variation.
    tv: float = 0.0
    # Weight of the mean squared pixel.
    l2: float = 0.0
    # Token pruning, the share of patches dropped in a block (0-based), for instance 6:0.75.
    prune: dict[int, float] = field(default_factory=dict)
    # Share of the iterations before pruning starts.
    prune_from: float = 0.25
    # Each iteration rolls a task's images by up to this share of the side.
    jitter: float = 0.125
    # Each iteration flips a task's images with this probability.
    flip: float = 0.5
    # Each iteration, the backbone (not the prior) sees a task's images shrunk to a side drawn from
    # this range, in pixels, and enlarged again, so that what makes their class does not hide in
    # fine texture. A side beyond the image's own leaves it as it is. "0 0" turns it off.
    resolution: tuple[int, int] = (0, 0)
    # LoRAs (of equally many classes) inverted together in one batch; results do not depend on it.
    # Unset: as many as the free memory of a CUDA device takes, elsewhere 4.
    group: int | None = None
    # Early stopping: a task is done once its mean loss over a window of iterations lies less than
    # this share below that of the window before, for instance 0.01. 0 stops none.
    plateau: float = 0.0
    # Iterations of such a window; tasks leave their group at the ends of windows alone.
    plateau_window: int = 100
    # Progressive pruning: shares of the patches that the backbone no longer sees, those with the
    # least CLS attention, growing; "0.5 0.75" with --drop-at "0.5 0.75".
    drop: tuple[float, ...] = ()
    # Shares of the iterations from which on each holds.
    drop_at: tuple[float, ...] = ()
    # Coarse-to-fine start: share of the iterations on smaller images, then enlarged.
    coarse: float = 0.0
    # Side of those images, as a share of the full side; rounded to whole patches.
    coarse_scale: float = 0.5
    # Warm start: the first so many LoRAs of the bank start from noise, and the others from their
    # images: of the same class where names tell, else of any. 0: all from noise.
    warm: int = 0
    # Iterations of those others.
    warm_iterations: int = 500
    # Iterations between checkpoints of the group under way.
    checkpoint_every: int = 200

    def __post_init__(self) -> None:
        positive = ("images_per_class", "iterations", "checkpoint_every", "plateau_window",
                    "warm_iterations")  # fmt: skip
        for name in (*positive, *(("group",) if self.group is not None else ())):
            _require(getattr(self, name) >= 1, f"{name}: must be >= 1, got {getattr(self, name)}")
        self._check_shortcuts()
        _require(self.lr > 0, f"lr: must be positive, got {self.lr}")
        for name in ("prune_from", "flip"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name}: must be in [0, 1], got {value}")
        _require(0 <= self.jitter <= 0.5, f"jitter: must be in [0, 0.5], got {self.jitter}")
        for name in ("alpha", "first_bn", "ce", "tv", "l2"):
            value = getattr(self, name)
            _require(value >= 0, f"{name}: must not be negative, got {value}")
        _require_range("resolution", self.resolution)

    def _check_shortcuts(self) -> None:
        _require(self.warm >= 0, f"warm: must not be negative, got {self.warm}")
        for name in ("plateau", "coarse"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}: must be in [0, 1), got {value}")
        _require(0 < self.coarse_scale <= 1, f"coarse_scale: must be in (0, 1], got"
                 f" {self.coarse_scale}")  # fmt: skip
        _require(
            len(self.drop) == len(self.drop_at),
            f"drop_at: one share of the iterations for each of drop {self.drop} expected, got"
            f" {self.drop_at}",
        )
        for name in ("drop", "drop_at"):
            shares = getattr(self, name)
            _require(
                all(0 < x < 1 for x in shares) and list(shares) == sorted(set(shares)),
                f"{name}: expected growing shares between 0 and 1, got {shares}",
            )
        _require(
            not self.drop or self.drop_at[0] >= self.coarse,
            f"drop_at: patches are dropped after the coarse start, from {self.coarse} on, got"
            f" {self.drop_at}",
        )
        _require(
            self.coarse == 0 or self.resolution == (0, 0),
            "coarse: does not go with resolution, which also makes images small; use one of them",
        )


@dataclass(frozen=True)
class MetaConfig:
    """Meta-training of the meta-LoRA on synthetic tasks (Eq. 3, 4)."""

    # Optimiser steps.
    steps: int = 2000
    # Classes of each task.
    ways: int = 5
    # Support images a class. 0 (Table 12): queries meet the class texts of a two-tower model in the
    # place of class means; the bank was then inverted under such heads (--text).
    shots: int = 1
    # Query images a class.
    queries: int = 15
    # Tasks in one step; their losses are averaged.
    tasks: int = 1
    # Probability that a task mixes classes of several LoRAs (cross-task interpolation, Eq. 4).
    interpolation: float = 0.5
    # Where several LoRAs show a class of such a task: its images come from one of them, drawn anew
    # for each task, or from all, so that a class does not stand for one LoRA's manner.
    holders: Literal["one", "all"] = "one"
    # Rank of the meta-LoRA.
    rank: int = 4
    # Its alpha; unset means alpha = rank, a scale of 1.
    alpha: float | None = None
    # Products with a LoRA: q, k, v, proj, fc1, fc2.
    targets: tuple[str, ...] = ("q", "v")
    # Where the meta-LoRA starts: from nothing (the paper; then use a rate near 3e-4), or from the
    # average of the bank's products B A, cut back to its rank, which already carries what all
    # their domains share.
    start: Literal["zero", "average"] = "average"
    # What learns (Table 8): all LoRA layers, the first or last N ("first:6"), or the "backbone".
    learn: str = "all"
    # Peak learning rate of Adam.
    lr: float = 1e-4
    # Schedule: the paper's cycles (25 steps up from 1 % of lr, 75 down a cosine), one cosine, none.
    schedule: Literal["cyclic", "cosine", "constant"] = "cyclic"
    # Distance of a query to a prototype (Eq. 3b); "squared" is the square of "euclidean".
    distance: Literal["euclidean", "squared", "cosine"] = "euclidean"
    # What a query of a task of one LoRA is to match: its teacher's distribution (Eq. 3a), or its
    # label, as in interpolated tasks.
    target: Literal["teacher", "label"] = "teacher"
    # Direction of the KL to the teacher (Eq. 3a).
    kl: Literal["teacher_student", "student_teacher"] = "teacher_student"
    # Temperature of the teacher's and the student's distribution in the KL.
    temperature: float = 1.0
    # Probability of a horizontal flip, for a task's images together.
    flip: float = 0.5
    # Resolution augmentation: a task's images shrink to a side drawn from this range, in pixels,
    # and grow back, so that the meta-LoRA cannot learn the texture of synthetic images. A side
    # beyond the image's own leaves it as it is. "0 0" turns it off.
    resolution: tuple[int, int] = (24, 96)
    # Smallest share of the side that a random crop of each image keeps; 1 crops nothing. Images
    # with masked patches are not cropped: their masks would no longer fit.
    crop: float = 1.0
    # Share of patches masked (Sec. 4.3), from the least important on.
    sparsity: float = 0.0
    # How that share is spent: the same on every image (the paper), or drawn for each image around
    # that mean, packed without padding.
    sparsity_per: Literal["batch", "image"] = "batch"
    # Share of a step's tasks that see whole images; the others mask so much more that `sparsity`
    # is the mean. A multiple of 1 / tasks. 0 masks in every task (the paper).
    whole: float = 0.0
    # Where `whole` > 0: resolution augmentation of the tasks that mask, in place of `resolution`.
    masked_resolution: tuple[int, int] = (0, 0)
    # Exponential moving average over the meta-LoRA's steps; 0 returns the last step's.
    ema: float = 0.0
    # Steps between checkpoints.
    checkpoint_every: int = 200
    # Steps between validations, where a validation data set is given.
    validate_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "queries", "tasks", "rank", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"{name}: must be >= 1, got {getattr(self, name)}")
        _require(self.shots >= 0, f"shots: must be >= 0, got {self.shots}")
        _require(self.ways >= 2, f"ways: must be at least 2, got {self.ways}")
        _require(self.lr > 0, f"lr: must be positive, got {self.lr}")
        _require(self.temperature > 0, f"temperature: must be positive, got {self.temperature}")
        for name in ("interpolation", "flip"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name}: must be in [0, 1], got {value}")
        for name in ("sparsity", "ema"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"{name}: must be in [0, 1), got {value}")
        _require(0 < self.crop <= 1, f"crop: must be in (0, 1], got {self.crop}")
        _require_range("resolution", self.resolution)
        _require_range("masked_resolution", self.masked_resolution)
        _require(
            0 <= self.whole < max(1e-9, 1 - self.sparsity) if self.sparsity else self.whole == 0,
            "whole: must be in [0, 1 - sparsity), and 0 without sparsity, got"
            f" whole {self.whole}, sparsity {self.sparsity}",
        )
        _require(
            abs(self.whole * self.tasks - round(self.whole * self.tasks)) < 1e-6,
            f"whole: must be a whole number of the {self.tasks} tasks of a step, got {self.whole}"
            f" ({self.whole * self.tasks:g} tasks); use a multiple of 1 / tasks",
        )
        _require(
            self.target in ("teacher", "label"),
            f'target: expected "teacher" or "label", got {self.target!r}',
        )
        self.learned_blocks(12)
        _require(
            self.ema == 0 or self.learn != "backbone",
            f"ema: averages the meta-LoRA; must be 0 where the backbone learns, got {self.ema}",
        )

    def learned_blocks(self, depth: int) -> tuple[int, ...]:
        """Blocks whose LoRA learns; none where the backbone itself learns.

        Raises:
            ValueError: `learn` is not "all", "backbone", "first:N" or "last:N".

        """
        if self.learn == "all":
            return tuple(range(depth))
        if self.learn == "backbone":
            return ()
        side, _, count = self.learn.partition(":")
        if side not in ("first", "last") or not count.isdigit() or int(count) < 1:
            raise ValueError(
                f'learn: expected "all", "backbone", "first:N" or "last:N", got {self.learn!r}'
            )
        chosen = min(int(count), depth)
        return tuple(range(chosen)) if side == "first" else tuple(range(depth - chosen, depth))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step (0-based).

        The paper's schedule cycles every 100 steps: up a line from lr / 100 to lr over 25 steps,
        then down a cosine over 75.
        """
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            warm = min(25, max(1, self.steps // 10))
            if step < warm:
                return self.lr * (step + 1) / warm
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))
        low, phase = self.lr / 100, step % 100
        if phase < 25:
            return low + (self.lr - low) * phase / 25
        return low + (self.lr - low) * 0.5 * (1 + math.cos(math.pi * (phase - 25) / 75))


@dataclass(frozen=True)
class EvalConfig:
    """Fine-tuning-free evaluation on few-shot tasks."""

    # fixed: every task has the same ways, shots and queries (the paper's). meta_dataset: they vary
    # as Meta-Dataset draws them, and --ways, --shots and --queries are not given.
    protocol: Literal["fixed", "meta_dataset"] = "fixed"
    # Classes of each task.
    ways: int = 5
    # Support images a class; several are evaluated one after the other. 0 takes the classes' texts
    # in the place of images (--text).
    shots: tuple[int, ...] = (1,)
    # Query images a class.
    queries: int = 15
    # Number of tasks.
    tasks: int = 600
    # Split of the data set: train, val or test.
    split: str = "test"
    # Seed of the task list.
    seed: int = 0
    # Distance of a query to a prototype (Eq. 3b).
    distance: Literal["euclidean", "squared", "cosine"] = "euclidean"
    # Prune test images too, as BLOCK:RATIO (another protocol than the paper's).
    prune: dict[int, float] = field(default_factory=dict)
    # Images a forward pass.
    batch_size: int = 128

    def __post_init__(self) -> None:
        _require(len(self.shots) > 0, "shots: expected at least one number, got none")
        _require(
            self.protocol == "fixed" or (self.ways, self.shots, self.queries) == (5, (1,), 15),
            "protocol: meta_dataset draws ways, shots and queries anew for each task; leave out"
            " --ways, --shots and --queries",
        )
        _require(self.batch_size >= 1, f"batch_size: must be >= 1, got {self.batch_size}")


PAPER_INVERSION = InversionConfig(images_per_class=20, iterations=2000, prune={11: 0.75})
PAPER_META = MetaConfig(steps=60_000, start="zero", lr=1e-3, resolution=(0, 0))
PRESETS: dict[str, tuple[InversionConfig, MetaConfig]] = {
    "default": (InversionConfig(), MetaConfig()),
    "paper": (PAPER_INVERSION, PAPER_META),
    "quick": (
        InversionConfig(images_per_class=10, iterations=300),
        MetaConfig(steps=1000, queries=9),
    ),
}

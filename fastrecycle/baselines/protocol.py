"""The same frozen tasks for every baseline, and settings chosen on validation tasks only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from torch import Tensor

from fastrecycle.baselines.base import FrozenFeatures
from fastrecycle.baselines.network import AdaptedNetwork
from fastrecycle.data import Episodes, episodes, load_dataset
from fastrecycle.eval import Pixels, Progress, Result, embed_episodes, score_predictions
from fastrecycle.vit import ViT

Method = FrozenFeatures | AdaptedNetwork

# App. D's rates and Table 1's numbers of steps
GRID: dict[str, tuple[Any, ...]] = {"lr": (0.1, 0.01, 0.001), "steps": (5, 50)}


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """A frozen task list with the features that a method sees."""

    features: Tensor  # (N, F), zero where no task uses an image
    tasks: Episodes
    split: str  # where they are from: "train", "val" or "test"


@dataclass(frozen=True, eq=False)
class TaskPixels:
    """A frozen task list with the images that a method which adapts the network sees."""

    pixels: Pixels  # black where no task uses an image
    tasks: Episodes
    split: str  # where they are from: "train", "val" or "test"


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose` found."""

    method: Method  # not fitted, with the best settings
    settings: dict[str, Any]
    results: tuple[tuple[dict[str, Any], Result], ...]  # of every point of the grid


def embed_tasks(
    method: FrozenFeatures,
    dataset: Any,
    *,
    shots: Sequence[int] = (1, 5),
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    split: str = "test",
    seed: int = 0,
    data_root: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[int, TaskFeatures]:
    """Embed the images of frozen tasks once, for all shots: {shots: TaskFeatures}.

    The task lists are those of `fastrecycle.eval.evaluate_shots`. Methods with the same backbone
    and average of LoRAs have the same features, so one call serves them all.

    Args:
        method: of frozen features; decides backbone, LoRAs, precision and size of batches.
        dataset, split, data_root: see `fastrecycle.eval.evaluate`; of what is decoded already,
            `split` must still say what it is.
        shots, ways, queries, tasks, seed: shape, number and seed of the tasks.
        progress: called with (images embedded, images in all).

    Raises:
        FileNotFoundError: no such data set; the text says what to put where.
        ValueError: LoRAs that do not fit, or fewer classes or images than a task needs.

    """
    source = dataset if isinstance(dataset, Pixels) else load_dataset(dataset, split, data_root)
    features, drawn = embed_episodes(
        method.vit, method.lora(), source, shots=shots, ways=ways, queries=queries, tasks=tasks,
        seed=seed, batch_size=method.batch_size, precision=method.precision,
        backend=method.backend, progress=progress,
    )  # fmt: skip
    return {count: TaskFeatures(features, lists, split) for count, lists in drawn.items()}


def decode_tasks(
    vit: ViT,
    dataset: Any,
    *,
    shots: Sequence[int] = (1, 5),
    ways: int = 5,
    queries: int = 15,
    tasks: int = 600,
    split: str = "test",
    seed: int = 0,
    data_root: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[int, TaskPixels]:
    """Decode the images of frozen tasks once, for all shots: {shots: TaskPixels}.

    The counterpart of `embed_tasks` for methods that adapt the network, with the same task lists.

    Args:
        vit: decides the size of images.
        dataset, shots, ways, queries, tasks, split, seed, data_root: see `embed_tasks`.
        progress: called with (images decoded, images in all).

    Raises:
        FileNotFoundError: no such data set; the text says what to put where.
        ValueError: fewer classes or images than a task needs.

    """
    source = dataset if isinstance(dataset, Pixels) else load_dataset(dataset, split, data_root)
    drawn = {
        count: episodes(
            source.labels, ways, count, queries, tasks, seed, class_names=source.class_names
        )
        for count in shots
    }
    if isinstance(source, Pixels):
        pixels = source
    else:
        used = np.unique(np.concatenate([lists.images for lists in drawn.values()]))
        side = vit.config.image_size
        # memory of images that no task uses is never touched, so the system never hands it out
        everywhere = torch.zeros(len(source.labels), 3, side, side, dtype=torch.uint8)
        done = 0
        for batch in source.images(used, vit.resize):
            everywhere[torch.from_numpy(used[done : done + len(batch)])] = batch
            done += len(batch)
            if progress is not None:
                progress(done, len(used))
        pixels = Pixels(everywhere, source.labels, source.class_names, source.name)
    return {count: TaskPixels(pixels, lists, split) for count, lists in drawn.items()}


def score(
    method: Method,
    on: TaskFeatures | TaskPixels,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Result:
    """Accuracy of a method on tasks; its `cost` is then that of a task.

    Args:
        method: of frozen features, which must be those of `on`; or one that adapts the network.
        on: see `embed_tasks` and `decode_tasks`.
        batch: tasks at once. None: for frozen features all on a GPU, as many as a cache holds on
            the CPU; else see `AdaptedNetwork.tasks`.
        progress: called with (tasks done, tasks in all) where the network is adapted.

    Raises:
        TypeError: features for a method that needs images, or the other way round.

    """
    if isinstance(method, AdaptedNetwork) and isinstance(on, TaskPixels):
        guess = method.tasks(on.pixels, on.tasks, batch, progress).numpy()
        return Result.of(100 * (guess == on.tasks.query_ways).mean(1))
    if isinstance(method, FrozenFeatures) and isinstance(on, TaskFeatures):
        ways = on.tasks.ways
        return score_predictions(
            lambda support, query: method.tasks(support, ways, query), on.features, on.tasks, batch
        )
    needed = "decode_tasks" if isinstance(method, AdaptedNetwork) else "embed_tasks"
    raise TypeError(
        f"score: {type(method).__name__} takes what {needed} returns, got {type(on).__name__}"
    )


def choose(
    method: Method,
    validation: TaskFeatures | TaskPixels,
    grid: Mapping[str, Sequence[Any]] | None = None,
    batch: int | None = None,
    progress: Progress | None = None,
) -> Choice:
    """The settings of a method with the best accuracy on validation tasks, the same for all tasks.

    Args:
        method: left as it is.
        validation: see `embed_tasks` and `decode_tasks`, of another split than "test".
        grid: values of each parameter; None: learning rates .1, .01, .001 and 5 or 50 steps. Of
            equally good points the first one wins, the last parameter changing fastest.
        batch: see `score`.
        progress: called with (points of the grid done, points in all).

    Raises:
        TypeError: see `score`.
        ValueError: test tasks, an empty grid, or a parameter that the method does not have.

    """
    if validation.split == "test":
        raise ValueError('choose: expected tasks of a validation split, got the split "test"')
    grid = GRID if grid is None else grid
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    unknown = grid.keys() - method.get_params(deep=False).keys()
    fixed, what = {"vit"}, "backbone"
    if isinstance(method, FrozenFeatures):  # of which another bank would need others
        fixed, what = {"vit", "bank", "of", "batch_size", "precision", "backend"}, "features"
    unknown |= grid.keys() & fixed
    if not grid or not points or unknown:
        raise ValueError(
            f"grid: expected values of parameters of {type(method).__name__} that leave the {what}"
            f" as they are, got {dict(grid)}"
        )
    results = []
    for settings in points:
        point = clone(method).set_params(**settings)
        results.append((settings, score(point, validation, batch)))
        if progress is not None:
            progress(len(results), len(points))
    best, _ = max(results, key=lambda each: each[1].accuracy)
    return Choice(clone(method).set_params(**best), best, tuple(results))


def evaluate_baseline(
    method: Method,
    dataset: Any,
    *,
    shots: int = 1,
    batch: int | None = None,
    progress: Progress | None = None,
    **shape: Any,
) -> Result:
    """Accuracy of a baseline on the tasks of `fastrecycle.eval.evaluate`, so that results pair.

    `evaluate(vit, meta_lora, dataset).minus(evaluate_baseline(method, dataset))` has the interval
    of the difference. Afterwards `method.cost` is that of a task, from features on or, where the
    network is adapted, from decoded images on.

    Args:
        method: with backbone and bank, its settings chosen before (see `choose`).
        dataset: see `embed_tasks`.
        shots: support images a class.
        batch: tasks at once; see `score`.
        progress: called with (images embedded, images in all) or, where the network is adapted,
            with (tasks done, tasks in all).
        shape: further named arguments of `embed_tasks`: ways, queries, tasks, split, seed,
            data_root.

    Raises:
        FileNotFoundError, ValueError: see `embed_tasks`.

    """
    if isinstance(method, AdaptedNetwork):
        decoded = decode_tasks(method.vit, dataset, shots=(shots,), **shape)[shots]
        return score(method, decoded, batch, progress)
    embedded = embed_tasks(method, dataset, shots=(shots,), progress=progress, **shape)[shots]
    return score(method, embedded, batch)

"""The same frozen tasks for every baseline, and settings chosen on validation tasks only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.base import clone
from torch import Tensor

from fastrecycle.baselines.base import FrozenFeatures
from fastrecycle.data import Episodes, load_dataset
from fastrecycle.eval import Pixels, Progress, Result, embed_episodes, score_predictions

# App. D's rates and Table 1's numbers of steps
GRID: dict[str, tuple[Any, ...]] = {"lr": (0.1, 0.01, 0.001), "steps": (5, 50)}


@dataclass(frozen=True, eq=False)
class TaskFeatures:
    """A frozen task list with the features that a method sees."""

    features: Tensor  # (N, F), zero where no task uses an image
    tasks: Episodes
    split: str  # where they are from: "train", "val" or "test"


@dataclass(frozen=True, eq=False)
class Choice:
    """What `choose` found."""

    method: FrozenFeatures  # not fitted, with the best settings
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
        method: decides backbone, LoRAs, precision and size of batches.
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


def score(method: FrozenFeatures, on: TaskFeatures, batch: int | None = None) -> Result:
    """Accuracy of a method on embedded tasks; its `cost` is then that of the last batch's tasks.

    Args:
        method: its features must be those of `on`.
        on: see `embed_tasks`.
        batch: tasks at once; None: all on a GPU, as many as a cache holds on the CPU.

    """
    ways = on.tasks.ways
    return score_predictions(
        lambda support, query: method.tasks(support, ways, query), on.features, on.tasks, batch
    )


def choose(
    method: FrozenFeatures,
    validation: TaskFeatures,
    grid: Mapping[str, Sequence[Any]] | None = None,
) -> Choice:
    """The settings of a method with the best accuracy on validation tasks, the same for all tasks.

    Args:
        method: left as it is.
        validation: see `embed_tasks`, of another split than "test".
        grid: values of each parameter; None: learning rates .1, .01, .001 and 5 or 50 steps. Of
            equally good points the first one wins, the last parameter changing fastest.

    Raises:
        ValueError: test tasks, an empty grid, or a parameter that the method does not have.

    """
    if validation.split == "test":
        raise ValueError('choose: expected tasks of a validation split, got the split "test"')
    grid = GRID if grid is None else grid
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    unknown = grid.keys() - method.get_params(deep=False).keys()
    # another backbone or bank would need other features
    unknown |= grid.keys() & {"vit", "bank", "of", "batch_size", "precision", "backend"}
    if not grid or not points or unknown:
        raise ValueError(
            f"grid: expected values of parameters of {type(method).__name__} that leave the"
            f" features as they are, got {dict(grid)}"
        )
    results = []
    for settings in points:
        results.append((settings, score(clone(method).set_params(**settings), validation)))
    best, _ = max(results, key=lambda each: each[1].accuracy)
    return Choice(clone(method).set_params(**best), best, tuple(results))


def evaluate_baseline(
    method: FrozenFeatures, dataset: Any, *, shots: int = 1, batch: int | None = None, **shape: Any
) -> Result:
    """Accuracy of a baseline on the tasks of `fastrecycle.eval.evaluate`, so that results pair.

    `evaluate(vit, meta_lora, dataset).minus(evaluate_baseline(method, dataset))` has the interval
    of the difference. Afterwards `method.cost` is that of a task, from features on.

    Args:
        method: with backbone and bank, its settings chosen before (see `choose`).
        dataset: see `embed_tasks`.
        shots: support images a class.
        batch: tasks at once; see `score`.
        shape: further named arguments of `embed_tasks`: ways, queries, tasks, split, seed,
            data_root, progress.

    Raises:
        FileNotFoundError, ValueError: see `embed_tasks`.

    """
    return score(method, embed_tasks(method, dataset, shots=(shots,), **shape)[shots], batch)

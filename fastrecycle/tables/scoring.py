"""Methods on frozen tasks: settings chosen on validation tasks, accuracy and cost on test tasks."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from sklearn.base import clone

from fastrecycle.baselines import (
    BASELINES,
    AdaptedNetwork,
    NearestCentre,
    TaskFeatures,
    TaskPixels,
    choose,
    decode_tasks,
    embed_tasks,
    make_baseline,
    score,
)
from fastrecycle.baselines.base import FrozenFeatures, Meter
from fastrecycle.baselines.protocol import Method as Fitted
from fastrecycle.eval import Result
from fastrecycle.lora import LoRABank
from fastrecycle.tables.recipes import RECYCLE, Caml, Choice, Method, Score, Tasks
from fastrecycle.tables.stages import Stages
from fastrecycle.vit import ViT


def scored(stages: Stages, recipe: Score) -> dict[str, Any]:
    """The record of a score: accuracy, ci95, per_task, chosen settings, cost of a task."""

    def make() -> dict[str, Any]:
        method = built(stages, recipe.method)
        chosen: dict[str, Any] = {}
        if recipe.choice is not None:
            chosen = choice(stages, recipe.choice)["settings"]
            method = clone(method).set_params(**chosen)
        on = tasks(stages, method, recipe.on, recipe.method.backbone)
        result = score(method, on)
        cost = asdict(method.cost)
        # what `score` timed of frozen features begins behind them
        if isinstance(method, FrozenFeatures) and recipe.on.split == "test":
            cost = one_task(stages, method, recipe)
        return {
            "accuracy": result.accuracy,
            "ci95": result.ci95,
            "per_task": result.per_task.tolist(),
            "chosen": chosen,
            "cost": cost,
        }

    if recipe.choice is not None:  # its time is its own
        choice(stages, recipe.choice)
    return stages.recorded(recipe, make)


def choice(stages: Stages, recipe: Choice) -> dict[str, Any]:
    """The record of a choice: the settings with the best mean over the validation sets."""
    grid = dict(recipe.method.grid)
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]

    def make() -> dict[str, Any]:
        method = built(stages, recipe.method)
        per_set = [
            choose(method, tasks(stages, method, on, recipe.method.backbone), grid).results
            for on in recipe.on
        ]
        means = [float(np.mean([found[i][1].accuracy for found in per_set]))
                 for i in range(len(points))]  # fmt: skip
        best = int(np.argmax(means))
        return {
            "settings": points[best],
            "points": [{**p, "accuracy": m} for p, m in zip(points, means, strict=True)],
        }

    found = stages.recorded(recipe, make)
    if found["settings"] not in points:
        raise ValueError(
            f"{stages.store.root}/done/{stages.key(recipe)}.json: settings that were not to be"
            f" chosen from, {found['settings']}; remove it, and it is made again"
        )
    return found


def built(stages: Stages, method: Method) -> Fitted:
    """A method with its bank and what the pool trained for it."""
    world = stages.world
    vit, precision = world.vit(method.backbone), world.arithmetic
    if method.kind == RECYCLE:
        assert method.trained is not None
        trained = stages.trained(method.trained)
        if isinstance(trained, ViT):
            return NearestCentre(trained, precision=precision)
        return NearestCentre(vit, LoRABank([trained]), of="products", precision=precision)
    arguments: dict[str, Any] = {"precision": precision, **dict(method.settings)}
    bank = None if method.bank is None else stages.bank(method.bank)
    if method.trained is not None:
        arguments["model"] = stages.trained(method.trained)
    if isinstance(method.trained, Caml) or BASELINES[method.kind].model is None:
        return make_baseline(method.kind, vit, bank, **arguments)
    return make_baseline(method.kind, vit, **arguments)


def tasks(stages: Stages, method: Fitted, on: Tasks, label: str) -> TaskFeatures | TaskPixels:
    """The frozen tasks as a method sees them."""
    pixels = stages.world.pixels(on.dataset, on.split, label)
    shape = {
        "shots": (on.shots,), "ways": on.ways, "queries": on.queries, "tasks": on.count,
        "split": on.split, "seed": stages.world.seed,
    }  # fmt: skip
    if isinstance(method, AdaptedNetwork):
        return decode_tasks(method.vit, pixels, **shape)[on.shots]  # type: ignore[arg-type]
    return embed_tasks(method, pixels, **shape)[on.shots]  # type: ignore[arg-type]


def one_task(stages: Stages, method: FrozenFeatures, recipe: Score) -> dict[str, Any]:
    """Cost of one task from decoded images to predictions, by itself, at the second time."""
    one = replace(recipe.on, count=1)
    pixels = stages.world.pixels(one.dataset, one.split, recipe.method.backbone)
    drawn = decode_tasks(
        method.vit, pixels, shots=(one.shots,), ways=one.ways, queries=one.queries, tasks=1,
        split=one.split, seed=stages.world.seed,
    )[one.shots].tasks  # fmt: skip

    def images(rows: np.ndarray) -> Any:
        index = torch.from_numpy(rows[0]).to(pixels.pixels.device)
        return method.vit.normalise(pixels.pixels[index].to(stages.world.where).float() / 255)

    support, query = images(drawn.support), images(drawn.query)
    for _ in range(2):  # the first time builds and records
        with Meter(stages.world.where) as meter:
            method.fit(support, drawn.support_ways)
            method.predict(query)
    width = method.vit.config.features
    return asdict(meter.cost(method.parameters(one.ways, width)))


def result(record: dict[str, Any]) -> Result:
    """The accuracy in a score's record."""
    return Result.of(np.asarray(record["per_task"], dtype=np.float64))

"""Records and plans of a store as they were written, or one error that names the file."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.files import read_json

KEY = re.compile(r"(bank|pool|meta|caml|choice|score)-[0-9a-f]{20}")


class Wrong(Exception):
    """Where a value is not what it must be."""


def read_record(path: Path) -> dict[str, Any]:
    """What a finished stage left.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is damaged.

    """
    stage = path.name.partition("-")[0]
    return _read(path, lambda record: _check_record(record, stage), f"the record of a {stage}")


def read_plan(path: Path) -> dict[str, Any]:
    """The plan of a table.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it is damaged.

    """
    return _read(path, _check_plan, "the plan of a table")


def _read(path: Path, check: Callable[[Any], None], what: str) -> dict[str, Any]:
    content = read_json(path)
    try:
        check(content)
    except Wrong as error:
        raise ValueError(
            f"{path}: expected {what}, {error}; remove it, and run the table again"
        ) from None
    return content


def _check_record(record: Any, stage: str) -> None:
    _table(record, "it")
    recipe = _table(record.get("recipe"), "recipe")
    if recipe.get("stage") != stage:
        raise Wrong(f"recipe.stage must be {stage!r}, got {recipe.get('stage')!r:.40}")
    _number(record.get("seconds"), "seconds", least=0)
    _number(record.get("work"), "work", least=0)
    if not isinstance(record.get("like"), str | None):
        raise Wrong(f"like must be text or null, got {record['like']!r:.40}")
    versions = _table(record.get("versions"), "versions")
    for name in ("torch", "platform", *(["gpu"] if "gpu" in versions else [])):
        _text(versions.get(name), f"versions.{name}")
    if stage == "choice":
        _table(record.get("settings"), "settings")
    elif stage == "score":
        _check_score(record)


def _check_score(record: dict[str, Any]) -> None:
    per_task = record.get("per_task")
    if not isinstance(per_task, list) or not per_task:
        raise Wrong(f"per_task must be a list of accuracies, got {per_task!r:.40}")
    for accuracy in per_task:
        _number(accuracy, "per_task", least=0, most=100)
    accuracy = _number(record.get("accuracy"), "accuracy")
    if not math.isclose(accuracy, found := float(np.mean(per_task)), rel_tol=1e-9, abs_tol=1e-9):
        raise Wrong(f"accuracy must be the mean of per_task, {found:g}, got {accuracy:g}")
    if not isinstance(record.get("ci95"), float):  # NaN of a single task
        raise Wrong(f"ci95 must be a number, got {record.get('ci95')!r:.40}")
    for name, value in _table(record.get("chosen"), "chosen").items():
        _number(value, f"chosen.{name}")
    cost = _table(record.get("cost"), "cost")
    _number(cost.get("seconds"), "cost.seconds", least=0)
    _number(cost.get("parameters"), "cost.parameters", least=0)
    if cost.get("peak_memory_bytes", 0) is not None:
        _number(cost.get("peak_memory_bytes"), "cost.peak_memory_bytes", least=0)


def _check_plan(plan: Any) -> None:
    _table(plan, "it")
    for name in ("table", "scale", "command", "date"):
        _text(plan.get(name), name)
    if type(plan.get("seed")) is not int:
        raise Wrong(f"seed must be an integer, got {plan.get('seed')!r:.40}")
    setting = _table(plan.get("setting"), "setting")
    for name in ("precision", "backend"):
        _text(setting.get(name), f"setting.{name}")
    _check_settings(_table(plan.get("settings"), "settings"))
    told = {"prior": plan.get("prior"), **_table(plan.get("backbones"), "backbones")}
    for name, value in told.items():
        _text(_table(value, name).get("source"), f"{name}.source")
    for name, reason in _table(plan.get("absent"), "absent").items():
        _text(reason, f"absent.{name}")
    datasets = set()
    for domain in _tables(plan.get("domains"), "domains"):
        datasets.add(_text(domain.get("dataset"), "domains.dataset"))
        sources = domain.get("sources")
        if not isinstance(sources, list):
            raise Wrong(f"domains.sources must be a list, got {sources!r:.40}")
        for source in sources:
            _text(source, "domains.sources")
    labels = set()
    for row in _tables(plan.get("rows"), "rows"):
        labels.add(_text(row.get("label"), "rows.label"))
        _text(row.get("kind"), "rows.kind")
    for cell in _tables(plan.get("cells"), "cells"):
        _check_cell(cell, labels, datasets)


def _check_cell(cell: dict[str, Any], labels: set[str], datasets: set[str]) -> None:
    for name, known in (("row", labels), ("dataset", datasets)):
        if _text(cell.get(name), f"cells.{name}") not in known:
            raise Wrong(f"cells.{name} {cell[name]!r:.40} is none of its {name}s")
    if type(cell.get("shots")) is not int:
        raise Wrong(f"cells.shots must be an integer, got {cell.get('shots')!r:.40}")
    key = cell.get("key", "score-" + "0" * 20)
    if not isinstance(key, str) or not KEY.fullmatch(key) or not key.startswith("score-"):
        raise Wrong(f"cells.key must be score- and 20 hex digits, got {key!r:.40}")
    if "key" not in cell or "chosen" in cell:
        name = "left" if "key" not in cell else "chosen"
        _text(cell.get(name), f"cells.{name}")


def _check_settings(settings: dict[str, Any]) -> None:
    """What a page tells of the scale."""
    for where, names in (
        ("", ("tasks", "queries", "validation_tasks")),
        ("pretune", ("num", "ways")),
        ("inversion", ("images_per_class", "iterations")),
        ("meta", ("steps", "tasks", "lr")),
    ):
        table = _table(settings.get(where), f"settings.{where}") if where else settings
        for name in names:
            _number(table.get(name), f"settings.{where}.{name}".replace("..", "."), least=0)
    _text(settings["meta"].get("start"), "settings.meta.start")


def _table(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Wrong(f"{name} must be a table, got {value!r:.40}")
    return value


def _tables(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Wrong(f"{name} must be a list, got {value!r:.40}")
    return [_table(x, f"each of {name}") for x in value]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Wrong(f"{name} must be text, got {value!r:.40}")
    return value


def _number(value: Any, name: str, least: float = -1e300, most: float = 1e300) -> float:
    # `not` of the whole, which NaN passes no way
    if type(value) not in (int, float) or not least <= value <= most:
        raise Wrong(f"{name} must be a number in [{least:g}, {most:g}], got {value!r:.40}")
    return value

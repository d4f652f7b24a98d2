"""Tables of a run: metrics, evaluations with intervals, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.eval import Result
from fastrecycle.files import read_json

Metrics = dict[str, dict[str, list[tuple[float, float]]]]


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns, the first to the left and the others to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "  ".join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *map(line, rows)])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def metric_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl in the file's order; one that was cut short is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and {"stage", "step"} <= line.keys():
            lines.append(line)
    return lines


def read_metrics(path: Path) -> Metrics:
    """{stage: {value's name: [(step, value), ...]}} of a metrics.jsonl.

    Where a resumed run wrote a step twice, the last line counts; a line cut short is left out.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for line in metric_lines(path):
        for name, value in line.items():
            if name not in ("stage", "step", "time") and isinstance(value, int | float):
                found.setdefault(line["stage"], {}).setdefault(name, {})[line["step"]] = value
    return {
        stage: {name: sorted(points.items()) for name, points in values.items()}
        for stage, values in found.items()
    }


def last_values(metrics: Metrics) -> list[list[str]]:
    """A row for each value: stage, name, step, the last value."""
    return [
        [stage, name, f"{points[-1][0]:g}", f"{points[-1][1]:.4g}"]
        for stage, values in metrics.items()
        for name, points in values.items()
    ]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Accuracy of one LoRA on one list of tasks, in percent, as a JSON file of the run has it."""

    file: str
    dataset: str
    row: str  # what was evaluated
    shots: int | None  # None: varying
    result: Result
    tasks: tuple[Any, ...]  # what decides the task list; equal ones are paired

    @property
    def plain(self) -> bool:
        """Whether this is nearest class mean without a LoRA."""
        return self.row in ("none", "NN")


_TASKS = ("protocol", "split", "ways", "queries", "tasks", "seed", "distance")


def read_evaluations(run: Path) -> list[Evaluation]:
    """What `fastrecycle eval --json` and the demo wrote into a run's folder.

    Raises:
        ValueError: a JSON file is damaged.

    """
    found = []
    for file in sorted(run.glob("*.json")):
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("results"), list):
            continue
        settings = content.get("settings", {})
        for result in content["results"]:
            dataset = str(result.get("dataset", settings.get("dataset", "")))
            listed = tuple(json.dumps(settings.get(name)) for name in _TASKS)
            # the demo's rows share their tasks with each other alone
            own = (file.name,) if "row" in result else listed
            found.append(
                Evaluation(
                    file=file.name,
                    dataset=dataset,
                    row=str(result.get("row", settings.get("lora", ""))),
                    shots=result["shots"],
                    result=Result.of(np.asarray(result["per_task"], dtype=np.float64)),
                    tasks=(dataset, result["shots"], len(result["per_task"]), *own),
                )
            )
    return found


EVALUATION_HEAD = ["file", "data set", "LoRA", "shots", "accuracy (%)", "over NN, paired", "tasks"]


def evaluation_rows(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """A row for each, under `EVALUATION_HEAD`; all with their 95 % intervals."""
    plain = {e.tasks: e.result for e in evaluations if e.plain}
    rows = []
    for e in evaluations:
        over = ""
        if e.tasks in plain and not e.plain:
            gain = e.result.minus(plain[e.tasks])
            over = f"{gain.accuracy:+.2f} ± {gain.ci95:.2f}"
        accuracy = f"{e.result.accuracy:.2f} ± {e.result.ci95:.2f}"
        shots = "varying" if e.shots is None else str(e.shots)
        rows.append([e.file, e.dataset, e.row, shots, accuracy, over, str(len(e.result.per_task))])
    return rows


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted keys and values of nested tables, as text."""
    if isinstance(value, dict) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, json.dumps(value) if not isinstance(value, str) else value)]

"""Tables of a run: metrics, evaluations with intervals, settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.eval import Result
from fastrecycle.files import parse_json, read_json

_STAGES, _CURVES = 8, 24  # each is a picture

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
    """Lines of a metrics.jsonl in the file's order; one that was cut short is left out.

    Raises:
        ValueError: not UTF-8, or a line with a stage or number of another type.

    """
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected lines of JSON, got {error}") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = parse_json(text, "")
        except ValueError:
            continue
        if isinstance(line, dict) and {"stage", "step"} <= line.keys():
            wrong = _line_problem(line)
            if wrong:
                raise ValueError(f"{path} line {number}: {wrong}; remove the line")
            lines.append(line)
    return lines


def _line_problem(line: dict[str, Any]) -> str | None:
    """What is wrong with a line of metrics, where something is."""
    if not isinstance(line["stage"], str):
        return f"stage must be text, got {line['stage']!r:.40}"
    for name in ("step", "time"):
        if not is_number(line.get(name, 0.0)):
            return f"{name} must be a number, got {line[name]!r:.40}"
    for name, value in line.items():  # loss may be NaN or infinite; an integer may be of any length
        if isinstance(value, int) and not is_number(value):
            return f"{name} must be a number below 1e30, got one of {len(str(value))} digits"
    return None


def is_number(value: Any, least: float = -1e30, most: float = 1e30) -> bool:
    """Whether a value of JSON is a finite number that a page can show."""
    return type(value) in (int, float) and least <= value <= most


def read_metrics(path: Path) -> Metrics:
    """{stage: {value's name: [(step, value), ...]}} of a metrics.jsonl.

    Where a resumed run wrote a step twice, the last line counts; a line cut short is left out.

    Raises:
        ValueError: see `metric_lines`, or more curves than a page can show.

    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for line in metric_lines(path):
        for name, value in line.items():
            if name not in ("stage", "step", "time") and type(value) in (int, float):
                found.setdefault(line["stage"], {}).setdefault(name, {})[line["step"]] = value
    for stage, values in found.items():
        if len(found) > _STAGES or len(values) > _CURVES:
            raise ValueError(
                f"{path}: expected at most {_STAGES} stages with {_CURVES} values each, got"
                f" {len(found)} stages and {len(values)} values of {stage!r:.40}; it is damaged or"
                " another program's"
            )
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
            wrong = _result_problem(settings, result)
            if wrong:
                raise ValueError(
                    f"{file}: expected what `fastrecycle eval --json` writes, {wrong}; remove it,"
                    " and evaluate again"
                )
            found.append(_evaluation(file.name, settings, result))
    return found


def _result_problem(settings: Any, result: Any) -> str | None:
    """What is wrong with one result of an evaluation, where something is."""
    for name, value in (("settings", settings), ("each of results", result)):
        if not isinstance(value, dict):
            return f"{name} must be an object, got {value!r:.40}"
    if not isinstance(result.get("shots", ""), int | None):
        return f"shots must be an integer or null, got {result.get('shots', 'none')!r:.40}"
    per_task = result.get("per_task")
    if not isinstance(per_task, list) or not per_task:
        return f"per_task must be a list of accuracies, got {per_task!r:.40}"
    strange = [x for x in per_task if not is_number(x, 0, 100)]
    return f"per_task must be in [0, 100], got {strange[0]!r:.40}" if strange else None


def _evaluation(file: str, settings: dict[str, Any], result: dict[str, Any]) -> Evaluation:
    dataset = str(result.get("dataset", settings.get("dataset", "")))
    listed = tuple(json.dumps(settings.get(name)) for name in _TASKS)
    # the demo's rows share their tasks with each other alone
    own = (file,) if "row" in result else listed
    return Evaluation(
        file=file,
        dataset=dataset,
        row=str(result.get("row", settings.get("lora", ""))),
        shots=result["shots"],
        result=Result.of(np.asarray(result["per_task"], dtype=np.float64)),
        tasks=(dataset, result["shots"], len(result["per_task"]), *own),
    )


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
    """Dotted keys and values of nested tables, as text; JSON beyond twenty levels."""
    if isinstance(value, dict) and value and prefix.count(".") < 20:
        return [
            pair
            for key, inner in value.items()
            for pair in flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, json.dumps(value) if not isinstance(value, str) else value)]

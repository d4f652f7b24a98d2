"""A run's folder as pictures and tables: report.md, curves.png, synthetic.png."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrecycle.files import atomic_write, read_json
from fastrecycle.pool import SyntheticPool
from fastrecycle.pruning import masked_images


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


def read_metrics(path: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{stage: {value's name: [(step, value), ...]}} of a metrics.jsonl.

    Where a resumed run wrote a step twice, the last line counts; a line cut short is left out.
    """
    found: dict[str, dict[str, dict[float, float]]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        for name, value in line.items():
            if name not in ("stage", "step", "time") and isinstance(value, int | float):
                found.setdefault(line["stage"], {}).setdefault(name, {})[line["step"]] = value
    return {
        stage: {name: sorted(points.items()) for name, points in values.items()}
        for stage, values in found.items()
    }


def plot_metrics(
    metrics: dict[str, dict[str, list[tuple[float, float]]]], path: str | Path
) -> None:
    """One row of small plots a stage, written as PNG."""
    from matplotlib.figure import Figure

    columns = max(len(values) for values in metrics.values())
    figure = Figure(figsize=(3.2 * columns, 2.6 * len(metrics)), layout="constrained")
    grid = figure.subplots(len(metrics), columns, squeeze=False)
    for row, (stage, values) in zip(grid, metrics.items(), strict=True):
        for axes in row[len(values) :]:
            axes.set_axis_off()
        for axes, (name, points) in zip(row, values.items()):
            axes.plot(*zip(*points), marker="." if len(points) < 3 else None)
            axes.set_title(f"{stage}: {name}", fontsize=9)
            axes.set_xlabel("step", fontsize=8)
            axes.tick_params(labelsize=7)
    write_figure(figure, path)


def plot_pool(pool: SyntheticPool, path: str | Path, *, loras: int = 6, classes: int = 5) -> float:
    """Synthetic images beside the same with their masked patches grey, a row a LoRA, as PNG.

    Returns:
        The share of patches shown: what pruning left, or a quarter where nothing was pruned.

    """
    from matplotlib.figure import Figure

    share = pool.survivors / pool.patches if pool.survivors < pool.patches else 0.25
    kept = pool.keep(1 - share)
    grid = math.isqrt(pool.patches)
    rows = min(loras, len(pool.parts))
    columns = min(classes, max(int(p.labels.max()) + 1 for p in pool.parts))
    figure = Figure(figsize=(2.3 * columns, 1.45 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for task, line in enumerate(axes):
        names = pool.parts[task].class_names
        for label, cell in enumerate(line):
            cell.set_axis_off()
            found = ((pool.tasks == task) & (pool.labels == label)).nonzero()[:1, 0]
            if not len(found):
                continue
            image = pool.images[found].float() / 255
            masked = masked_images(image, kept[found], image.shape[-1] // grid, fill=0.5)
            cell.imshow(_beside(image[0], masked[0]), interpolation="nearest")
            cell.set_title(names[label] if names else f"class {label}", fontsize=7, pad=2)
    write_figure(figure, path)
    return share


def _beside(left: Tensor, right: Tensor) -> Any:
    """Two (3, S, S) images and a white gap as one (S, 2 S + gap, 3) array."""
    gap = left.new_ones(3, left.shape[1], max(1, left.shape[1] // 16))
    return torch.cat((left, gap, right), dim=2).permute(1, 2, 0).numpy()


def write_figure(figure: Any, path: str | Path) -> None:
    """A matplotlib figure as PNG, atomically."""
    atomic_write(path, lambda stream: figure.savefig(stream, format="png", dpi=130))


def write_report(run: str | Path) -> list[Path]:
    """Write report.md and its pictures into a run's folder; returns what was written.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a run writes.
        ValueError: a file of it is damaged.

    """
    run = Path(run)
    manifests = [p for p in (run / "run.json", *sorted(run.glob("*/run.json"))) if p.is_file()]
    if not manifests:
        what = "no run.json in it" if run.is_dir() else "no such folder"
        raise FileNotFoundError(f"{run}: {what}; expected the --out folder of a run")
    written: list[Path] = []
    parts = [f"# {run.resolve().name}"]
    metrics = {
        stage: values
        for file in (run / "metrics.jsonl", *sorted(run.glob("*/metrics.jsonl")))
        if file.is_file()
        for stage, values in read_metrics(file).items()
    }
    if metrics:
        plot_metrics(metrics, run / "curves.png")
        written.append(run / "curves.png")
        parts.append("## Curves\n\n![loss and accuracy](curves.png)\n\n" + _last_values(metrics))
    for folder in (run, run / "pool"):
        if any(folder.glob("task-*.safetensors")):
            pool = SyntheticPool.load(folder)
            share = plot_pool(pool, run / "synthetic.png")
            written.append(run / "synthetic.png")
            parts.append(
                f"## Synthetic images\n\n{len(pool)} images of {len(pool.parts)} LoRAs and"
                f" {len(pool.class_names)} classes. Right of each image: its {share:.0%} most"
                " important patches.\n\n![synthetic images](synthetic.png)"
            )
            break
    evaluations = _evaluations(run)
    if evaluations:
        head = ["file", "data set", "LoRA", "shots", "accuracy (%)", "tasks"]
        parts.append("## Accuracy\n\n" + markdown_table(head, evaluations))
    for file in manifests:
        rows = [[f"`{name}`", f"`{value}`"] for name, value in _flat(read_json(file))]
        where = file.relative_to(run).as_posix()
        parts.append(f"## {where}\n\n" + markdown_table(["key", "value"], rows))
    atomic_write(run / "report.md", "\n\n".join(parts) + "\n")
    return [run / "report.md", *written]


def _last_values(metrics: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    rows = [
        [stage, name, f"{points[-1][0]:g}", f"{points[-1][1]:.4g}"]
        for stage, values in metrics.items()
        for name, points in values.items()
    ]
    return markdown_table(["stage", "value", "step", "last"], rows)


def _evaluations(run: Path) -> list[list[str]]:
    """A row for each result in the JSON files that `fastrecycle eval` wrote into the folder."""
    rows = []
    for file in sorted(run.glob("*.json")):
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("results"), list):
            continue
        for result in content["results"]:
            settings = content.get("settings", {})
            rows.append(
                [
                    file.name,
                    str(result.get("dataset", settings.get("dataset", ""))),
                    str(result.get("row", settings.get("lora", ""))),
                    "varying" if result["shots"] is None else str(result["shots"]),
                    f"{result['accuracy']:.2f} ± {result['ci95']:.2f}",
                    str(len(result["per_task"])),
                ]
            )
    return rows


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    return [(prefix, json.dumps(value) if not isinstance(value, str) else value)]

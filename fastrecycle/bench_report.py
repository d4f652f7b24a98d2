"""Records of the benchmarks as tables and plots: `fastrecycle report benchmarks | table4 | table5`.

A record is NAME.json, a list of runs {"machine": {...}, "rows": [{...}, ...]}, the latest last.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrecycle.files import atomic_write, read_json
from fastrecycle.report import markdown_table, write_figure

TITLES = {
    "steps_inversion": "Inversion, batch 25 (Table 4)",
    "steps_meta": "Meta-training, batch 100 (Table 5)",
    "adaptation": "Adapting to one task (Table 1)",
    "curves": "Cost of a step",
}
TABLES = {"table4": "steps_inversion", "table5": "steps_meta"}

Row = dict[str, Any]
Record = dict[str, Any]


def read_record(path: Path) -> list[Record]:
    """The runs of one benchmark, the latest last.

    Raises:
        ValueError: not a record.

    """
    runs = read_json(path)
    good = isinstance(runs, list) and all(
        isinstance(run, dict)
        and isinstance(run.get("machine"), dict)
        and isinstance(run.get("rows"), list)
        and all(isinstance(row, dict) and _plain(row) for row in run["rows"])
        for run in runs
    )
    if not good or not runs:
        raise ValueError(
            f"{path}: expected a benchmark's record, a list of runs with machine and rows; write"
            " one with --record"
        )
    return runs


def _plain(row: Row) -> bool:
    """Whether setting and variant are texts or numbers."""
    return all(isinstance(row.get(k), str | int | float | None) for k in ("setting", "variant"))


def latest(runs: Sequence[Record]) -> list[Record]:
    """The last run on each kind of device, in order.

    Runs of one machine, versions and commit are parts of one: a later row of the same setting and
    variant takes the place of an earlier one.
    """
    same = lambda run: {k: v for k, v in run["machine"].items() if k != "time"}  # noqa: E731
    by_device: dict[str, Record] = {}
    for run in runs:
        device = str(run["machine"].get("device"))
        before = by_device.get(device)
        if before is None or same(before) != same(run):
            by_device[device] = run
            continue
        again = {(row.get("setting"), row.get("variant")) for row in run["rows"]} - {(None, None)}
        kept = [r for r in before["rows"] if (r.get("setting"), r.get("variant")) not in again]
        by_device[device] = {**run, "rows": kept + run["rows"]}
    return list(by_device.values())


def about(run: Record) -> str:
    """Device and versions, in a line."""
    return ", ".join(v if k == "device" else f"{k} {v}" for k, v in run["machine"].items())


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plain_table(rows: Sequence[Row]) -> str:
    """Rows as they were recorded."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown_table(columns, [[_text(row.get(c, "")) for c in columns] for row in rows])


def step_table(rows: Sequence[Row], accuracy: dict[str, list[str]] | None = None) -> str:
    """One line a setting: each variant's speed and memory side by side, ratios, the floor.

    Args:
        rows: of bench_steps.
        accuracy: further cells of a setting (5w1s, 5w5s); shown where given.

    """
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    cells = {(row["setting"], row["variant"]): row for row in rows}
    head = ["setting", "GFLOPs", *(f"{v}, it/s" for v in variants)]
    head += ["ours / reference", "ours / compile", "share of the floor", "GiB", "of the reference"]
    head += ["the paper, it/s"] + (["5w1s", "5w5s"] if accuracy is not None else [])
    lines = []
    for setting in settings:
        found = {v: cells[setting, v] for v in variants if (setting, v) in cells}
        ours = found.get("ours", {})
        first = next(iter(found.values()))
        line = [setting, _text(first["GFLOPs"])]
        line += [_text(found[v]["it/s"]) if v in found else "" for v in variants]
        for name in ("x reference", "x compile"):
            line.append(f"{ours[name]:.2f}x" if name in ours else "")
        line.append(f"{ours['of floor']:.0%}" if "of floor" in ours else "")
        line.append(_text(ours.get("GiB", "")))
        reference = found.get("reference", {}).get("GiB")
        line.append(f"{ours['GiB'] / reference:.2f}" if ours and reference else "")
        line.append(_text(first.get("paper it/s", "")))
        if accuracy is not None:
            line += accuracy.get(setting, ["not run", "not run"])
        lines.append(line)
    return markdown_table(head, lines)


def plot_steps(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of iterations a second, the floor as a line over each setting; written as PNG."""
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(row["variant"] for row in rows))
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure = Figure(figsize=(1.8 + 1.6 * len(settings), 3.4), layout="constrained")
    axes = figure.add_subplot()
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        mine = {row["setting"]: row for row in rows if row["variant"] == variant}
        places = [s + (i - (len(variants) - 1) / 2) * width for s in range(len(settings))]
        heights = [mine[s]["it/s"] if s in mine else 0.0 for s in settings]
        axes.bar(places, heights, width, label=variant)
    for s, setting in enumerate(settings):
        floor = next(row.get("floor_ms") for row in rows if row["setting"] == setting)
        if floor:
            axes.hlines(1000 / floor, s - 0.42, s + 0.42, color="black", linestyles="dotted")
    axes.set_xticks(range(len(settings)), settings)
    axes.set_ylabel("iterations a second")
    axes.set_title(f"{title}; dotted: the floor", fontsize=10)
    figure.legend(fontsize=7, loc="outside right upper")
    write_figure(figure, path)


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Milliseconds and GiB against what varies, a column of plots a curve; written as PNG."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure = Figure(figsize=(3.2 * len(names), 5), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False, sharex="col")
    for column, name in enumerate(names):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            mine = [row for row in rows if (row["curve"], row["variant"]) == (name, variant)]
            for line, unit in enumerate(("ms", "GiB")):
                axes[line][column].plot(
                    [row["x"] for row in mine], [row[unit] for row in mine], "o-", label=variant
                )
        axes[0][column].set_title(name, fontsize=8)
        for line, unit in enumerate(("ms", "GiB")):
            axes[line][column].set_ylabel(unit)
            axes[line][column].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=7)
    write_figure(figure, path)


def _records(results: Path) -> dict[str, list[Record]]:
    files = sorted(results.glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{results}: no records; make some with `python benchmarks/bench_steps.py meta"
            " --record`, or point --results at them"
        )
    records = {file.stem: read_record(file) for file in files}
    return {name: records[name] for name in sorted(records, key=lambda n: (n not in TITLES, n))}


def write_benchmarks(results: Path, out: Path) -> list[Path]:
    """Write benchmarks.md and its plots; returns what was written.

    Args:
        results: folder of the records.
        out: folder to write to.

    Raises:
        FileNotFoundError: no records.
        ValueError: a damaged record.

    """
    written, parts = [], ["# Benchmarks"]
    for name, runs in _records(results).items():
        title = TITLES.get(name, name.replace("_", " "))
        parts.append(f"## {title}")
        for i, run in enumerate(latest(runs)):
            steps = name in TABLES.values()
            table = step_table(run["rows"]) if steps else plain_table(run["rows"])
            parts += [about(run), table]
            if steps or name == "curves":
                picture = out / (f"{name}.png" if i == 0 else f"{name}_{i}.png")
                out.mkdir(parents=True, exist_ok=True)
                if steps:
                    plot_steps(run["rows"], title, picture)
                else:
                    plot_curves(run["rows"], picture)
                written.append(picture)
                parts.append(f"![{title}]({picture.name})")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "benchmarks.md", "\n\n".join(parts) + "\n")
    return [out / "benchmarks.md", *written]


# ------------------------------------------------------------------ with accuracy


def _setting(which: str, manifest: Any) -> str | None:
    """The row of the table that a run's configuration belongs to."""
    config: dict[str, Any] = manifest.get("config", {}) if isinstance(manifest, dict) else {}
    if which == "table5":
        meta = config.get("meta", config)
        return str(float(meta["sparsity"])) if "sparsity" in meta else None
    inversion = config.get("inversion", config)
    prune = inversion.get("prune")
    return None if prune is None else str({int(k): float(v) for k, v in prune.items()})


def accuracies(which: str, runs: Sequence[Path], dataset: str) -> dict[str, list[str]]:
    """{setting: [1-shot, 5-shot]} from runs' folders, each with its evaluations in JSON beside it.

    Raises:
        FileNotFoundError: a folder without run.json, or without an evaluation on the data set.
        ValueError: a run whose configuration is no row of the table.

    """
    found: dict[str, list[str]] = {}
    for run in runs:
        if not (run / "run.json").is_file():
            raise FileNotFoundError(f"{run}: no run.json in it; expected the --out of a run")
        setting = _setting(which, read_json(run / "run.json"))
        if setting is None:
            raise ValueError(f"{run / 'run.json'}: its configuration is no row of {which}")
        cells: dict[int, str] = {}
        for file in sorted(run.glob("*.json")):
            content = read_json(file)
            results = content.get("results") if isinstance(content, dict) else None
            for result in results if isinstance(results, list) else []:
                known = result.get("dataset", content.get("settings", {}).get("dataset"))
                if known == dataset and result["shots"] is not None:
                    cells[int(result["shots"])] = f"{result['accuracy']:.2f} ± {result['ci95']:.2f}"
        if not cells:
            raise FileNotFoundError(
                f"{run}: no evaluation on {dataset}; make one with `fastrecycle eval --dataset"
                f" {dataset} --lora {run / 'meta_lora'} --shots 1 5 --json {run / 'eval.json'}`"
            )
        found[setting] = [cells.get(1, "not run"), cells.get(5, "not run")]
    return found


def write_table(
    which: str, results: Path, runs: Sequence[Path], out: Path, dataset: str = "cifar_fs"
) -> list[Path]:
    """Write table4.md or table5.md: speed, memory and accuracy of each setting.

    Args:
        which: "table4" (pruned inversion) or "table5" (sparse meta-training).
        results: folder of the benchmarks' records.
        runs: folders of runs, one for each setting that is to have accuracies.
        out: folder to write to.
        dataset: whose evaluations to take.

    Raises:
        FileNotFoundError, ValueError: see `read_record` and `accuracies`.

    """
    name = TABLES[which]
    path = results / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such record; make it with `python benchmarks/bench_steps.py"
            f" {name.split('_')[1]} --record`"
        )
    cells = accuracies(which, runs, dataset)
    parts = [f"# {TITLES[name]}"]
    for run in latest(read_record(path)):
        parts += [about(run), step_table(run["rows"], cells)]
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / f"{which}.md", "\n\n".join(parts) + "\n")
    return [out / f"{which}.md"]

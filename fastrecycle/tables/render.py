"""A table as Markdown, CSV and LaTeX, from its plan and the records of its scores alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastrecycle.baselines import BASELINES
from fastrecycle.bench_report import about, latest, plain_table, read_record, step_table
from fastrecycle.eval import Result
from fastrecycle.report import markdown_table
from fastrecycle.tables.layout import BEST, MEAN, Published, Table, published
from fastrecycle.tables.scoring import result
from fastrecycle.tables.verdicts import signed, verdict

PAPER = "LoRA Recycle, CVPR 2025"


@dataclass(frozen=True, eq=False)
class Filled:
    """A table with what its plan found."""

    table: Table
    plan: Mapping[str, Any]
    records: Mapping[str, Any]  # of scores, by key

    @property
    def paper(self) -> Published | None:
        """The paper's figures, where it has this table."""
        return published().get(self.table.name)

    @property
    def title(self) -> str:
        """What stands above it."""
        if self.table.mine or self.paper is None:
            return self.table.mine or self.table.name
        return f"Table {self.table.name.removeprefix('table')}: {self.paper.title}"

    @property
    def datasets(self) -> list[str]:
        """Those with scores, in order, and the mean."""
        names = [domain["dataset"] for domain in self.plan["domains"]]
        return [*names, MEAN] if self.table.mean and len(names) > 1 else names

    @property
    def labels(self) -> list[str]:
        """Of all rows."""
        return [row["label"] for row in self.plan["rows"]]

    @cached_property
    def _cells(self) -> dict[tuple[str, str, int], Any]:
        return {(c["row"], c["dataset"], c["shots"]): c for c in self.plan["cells"]}

    def cell(self, row: str, dataset: str, shots: int) -> Any:
        """What the plan says of a cell."""
        return self._cells.get((row, dataset, shots), {})

    def record(self, row: str, dataset: str, shots: int) -> Any | None:
        """The record of a cell's score; None where it is missing."""
        return self.records.get(self.cell(row, dataset, shots).get("key"))

    def score(self, row: str, dataset: str, shots: int) -> Result | None:
        """Accuracy of a row in a column; None where it is missing."""
        if dataset != MEAN:
            found = self.record(row, dataset, shots)
            return None if found is None else result(found)
        parts = [self.score(row, d["dataset"], shots) for d in self.plan["domains"]]
        known = [part.per_task for part in parts if part is not None]
        return Result.of(np.mean(known, axis=0)) if len(known) == len(parts) else None

    def figure(self, row: str, dataset: str, shots: int) -> float | None:
        """The paper's accuracy in percent."""
        for name in self.table.figures or (self.table.name,):
            paper = published().get(name)
            found = None if paper is None else paper.figure(row, dataset, shots)
            if found is not None:
                return found
        return None

    def ahead(self, row: str, dataset: str, shots: int) -> Result | None:
        """The reference row minus this one, paired."""
        if self.table.reference in (None, row):
            return None
        reference = self.score(str(self.table.reference), dataset, shots)
        own = self.score(row, dataset, shots)
        return None if reference is None or own is None else reference.minus(own)


def kind_text(kind: str) -> str:
    """Whether a method tunes on a task."""
    return "yes" if kind in BASELINES and BASELINES[kind].tunes else "no"


def _accuracy(found: Result | None, bold: bool) -> str:
    if found is None:
        return "not run"
    text = f"{found.accuracy:.2f} ± {found.ci95:.2f}"
    return f"**{text}**" if bold else text


def _settings(cell: Mapping[str, Any], record: Any | None) -> str:
    if cell.get("chosen"):
        return str(cell["chosen"])
    chosen = {} if record is None else record["chosen"]
    return ", ".join(f"{name} {value:g}" for name, value in chosen.items())


def _cost(record: Any | None) -> list[str]:
    if record is None:
        return ["", "", ""]
    cost = record["cost"]
    peak = cost["peak_memory_bytes"]
    memory = "" if peak is None else f"{peak / 2**30:.2f}"
    return [f"{cost['seconds']:.3g}", memory, f"{cost['parameters']:,}"]


def domain_table(filled: Filled, dataset: str) -> str:
    """One data set: a line a method."""
    shots, reference = filled.table.shots, filled.table.reference
    head = ["method", "tunes"]
    for count in shots:
        head += [f"{count}-shot, ours", "the paper"]
        head += [f"{reference} minus this"] if reference else []
    costs = dataset != MEAN
    head += ["s a task", "GiB", "trained numbers", "chosen on validation tasks"] if costs else []
    scores = {
        (row, count): filled.score(row, dataset, count) for row in filled.labels for count in shots
    }
    most = {
        count: max((s.accuracy for (_, c), s in scores.items() if c == count and s), default=0)
        for count in shots
    }
    lines = []
    for row in filled.plan["rows"]:
        label, line = row["label"], [row["label"], kind_text(row["kind"])]
        for count in shots:
            own = scores[label, count]
            line.append(_accuracy(own, own is not None and own.accuracy == most[count]))
            figure = filled.figure(label, dataset, count)
            line.append("" if figure is None else f"{figure:.2f}")
            if reference:
                difference = filled.ahead(label, dataset, count)
                line.append("" if difference is None else signed(difference))
        if costs:
            line += _cost(filled.record(label, dataset, shots[0]))
            found = {
                count: _settings(filled.cell(label, dataset, count),
                                 filled.record(label, dataset, count))
                for count in shots
            }  # fmt: skip
            line.append("; ".join(f"{c}-shot: {text}" for c, text in found.items() if text))
        lines.append(line)
    return markdown_table(head, [[cell.replace("|", "\\|") for cell in line] for line in lines])


def verdicts(filled: Filled) -> list[str]:
    """A sentence for each claim and column."""
    lines = []
    for claim in filled.table.claims:
        for dataset in filled.datasets:
            for shots in (s for s in claim.shots if s in filled.table.shots):
                wanted = dict.fromkeys((claim.left, *claim.right))
                scores = {label: filled.score(label, dataset, shots) for label in wanted}
                found = verdict(claim, scores, dataset, shots, filled.paper)
                where = f"{claim.text}. {dataset}, {shots}-shot"
                if found is None:
                    lines.append(f"- **Not measured**: {where}.")
                else:
                    lines.append(f"- **{'True' if found[0] else 'False'}**: {where}: {found[1]}.")
    return lines


def facts(filled: Filled) -> list[list[str]]:
    """Backbone, prior, bank, tasks, hardware: what a figure is worth nothing without."""
    plan = filled.plan
    scale = plan["settings"]

    def told(given: Mapping[str, Any]) -> str:
        digest = str(given.get("sha256", ""))[:12]
        source = str(given["source"])
        name = Path(source).name if Path(source).suffix else source  # of a file without its folder
        beside = "".join(f", {k} {v}" for k, v in given.items() if k not in ("source", "sha256"))
        return f"`{name}` (SHA-256 {digest}...){beside}" if digest != "none" else source

    banks = "; ".join(f"{d['dataset']}: {', '.join(d['sources'])}" for d in plan["domains"])
    used = [r for c in plan["cells"] if (r := filled.records.get(c.get("key"))) is not None]
    machines = sorted({r["versions"].get("gpu", r["versions"]["platform"]) for r in used})
    versions = sorted({f"torch {r['versions']['torch']}" for r in used})
    rows = [[f"backbone {label}", told(given)] for label, given in plan["backbones"].items()]
    return [
        *rows,
        ["prior", told(plan["prior"])],
        ["bank", f"{scale['pretune']['num']} LoRAs of {scale['pretune']['ways']}-way tasks unless a"
         f" row says otherwise, from the training classes of ({banks})"],
        ["tasks", f"{scale['tasks']} of {filled.table.ways} ways and {scale['queries']} queries a"
         f" class, drawn with seed {plan['seed']}; ± is the 95 % interval over tasks"],
        ["chosen", f"on {scale['validation_tasks']} tasks of each validation split of the bank's"
         " sources"],
        ["seed", str(plan["seed"])],
        ["scale", f"`{plan['scale']}`: " + _short(scale)],
        ["arithmetic", f"{plan['setting']['precision']}, backend {plan['setting']['backend']}"],
        ["hardware", ", ".join(machines) or "nothing run yet"],
        ["versions", ", ".join(versions)],
        ["command", f"`{plan['command']}`"],
        ["date", plan["date"]],
    ]  # fmt: skip


def _short(scale: Mapping[str, Any]) -> str:
    inversion, meta = scale["inversion"], scale["meta"]
    return (
        f"{inversion['images_per_class']} images a class, {inversion['iterations']} iterations;"
        f" {meta['steps']} meta steps of {meta['tasks']} tasks from {meta['start']} at rate"
        f" {meta['lr']:g}"
    )


def markdown(filled: Filled, results: Path | None = None, picture: str | None = None) -> str:
    """The whole page.

    Args:
        filled: the table.
        results: folder of the benchmarks' records, for the costs of Tables 1, 4 and 5.
        picture: name of a plot beside the page.

    """
    plan, table = filled.plan, filled.table
    page = [f"# {filled.title}"]
    if plan["scale"] == "smoke":
        page.append("**Toy networks and images: this page shows the layout, its figures nothing.**")
    page.append(
        f'Accuracy in percent. "The paper" is {PAPER}, with its own backbone, bank and data;'
        " ours is what stands below, so compare differences, not levels."
    )
    if table.note:
        page.append(table.note)
    if picture:
        page.append(f"![{filled.title}]({picture})")
    for domain in plan["domains"]:
        name, sources = domain["dataset"], ", ".join(domain["sources"])
        kind = "in-domain" if domain["sources"] == [name] else "cross-domain"
        page += [f"## {name} ({kind}; LoRAs from {sources})", domain_table(filled, name)]
    if MEAN in filled.datasets:
        page += ["## Mean over these sets", domain_table(filled, MEAN)]
    page.append(
        "Cost: seconds of one task's adaptation and queries from decoded images on; for methods"
        " that adapt the network, of many tasks side by side, divided by their number. \"Tunes\":"
        " trains on the task's support set."
    )  # fmt: skip
    if table.costs is not None:
        page += benchmark_costs(filled, results)
    if table.claims:
        page += ["## What was to be shown", "\n".join(verdicts(filled))]
    if plan["absent"]:
        lines = [f"- {reason}" for reason in plan["absent"].values()]
        page += ["## Absent data sets", "\n".join(lines)]
    left = list(dict.fromkeys(c["left"] for c in plan["cells"] if c.get("left")))
    if left:
        page += ["## Not run yet", "\n".join(f"- {reason}" for reason in left)]
    page += ["## Settings", markdown_table(["", ""], facts(filled))]
    return "\n\n".join(page) + "\n"


def benchmark_costs(filled: Filled, results: Path | None) -> list[str]:
    """Speed and memory from the benchmarks' record, beside the accuracies above."""
    name = str(filled.table.costs)
    path = None if results is None else results / f"{name}.json"
    parts = ["## Cost, from the benchmarks"]
    if path is None or not path.is_file():
        script = "bench_adaptation.py" if name == "adaptation" else "bench_steps.py"
        stage = "" if name == "adaptation" else f" {name.split('_')[1]}"
        parts.append(f"No record; make it with `python benchmarks/{script}{stage} --record`.")
    else:
        for run in latest(read_record(path)):
            rows = run["rows"]
            table = plain_table(rows) if name == "adaptation" else (
                step_table(rows, _benchmark_accuracies(filled)))  # fmt: skip
            parts += [about(run), table]
    if filled.paper is not None and filled.paper.costs:
        head = {"adaptation": ["tasks/s", "GB"]}.get(name, ["it/s", "GFLOPs", "GB"])
        lines = [[row, *(f"{x:g}" for x in xs)] for row, xs in filled.paper.costs.items()]
        parts += ["The paper's:", markdown_table(["", *head], lines)]
    return parts


def _benchmark_accuracies(filled: Filled) -> dict[str, list[str]]:
    """{setting of bench_steps: [1-shot, 5-shot]} on the first data set that is there."""
    found: dict[str, list[str]] = {}
    if not filled.plan["domains"]:
        return found
    dataset = filled.plan["domains"][0]["dataset"]
    for row in filled.plan["rows"]:
        label = row["label"]
        if filled.table.name == "table4":
            setting = "{}" if label == "{0: 0.0}" else label
        elif row["kind"] == BEST:
            continue
        else:
            share = label.partition(", ")[2].removesuffix(" %")
            setting = str(float(share) / 100 if share else 0.0)
        found[setting] = [_accuracy(filled.score(label, dataset, s), False) for s in (1, 5)]
    return found


CSV_HEAD = (
    "table", "row", "dataset", "shots", "ours", "ci95", "paper", "reference_minus_this",
    "reference_minus_this_ci95", "seconds_a_task", "peak_memory_bytes", "trained_numbers",
    "chosen", "tasks", "score", "status",
)  # fmt: skip


def csv_lines(filled: Filled) -> str:
    """One line a cell; absent data sets have theirs too."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_HEAD)
    absent = filled.plan["absent"]
    for dataset in [*filled.datasets, *absent]:
        for row in filled.labels:
            for shots in filled.table.shots:
                writer.writerow(_csv_cell(filled, row, dataset, shots, absent.get(dataset)))
    return stream.getvalue()


def _csv_cell(filled: Filled, row: str, dataset: str, shots: int, reason: str | None) -> list[Any]:
    own = None if reason else filled.score(row, dataset, shots)
    figure = filled.figure(row, dataset, shots)
    difference = None if reason else filled.ahead(row, dataset, shots)
    cell = filled.cell(row, dataset, shots)
    record = filled.record(row, dataset, shots) if own is not None and dataset != MEAN else None
    cost = {} if record is None else record["cost"]

    def numbers(found: Result | None) -> list[str]:
        return ["", ""] if found is None else [f"{found.accuracy:.4f}", f"{found.ci95:.4f}"]

    return [
        filled.table.name, row, dataset, shots,
        *numbers(own), "" if figure is None else f"{figure:.2f}", *numbers(difference),
        cost.get("seconds", ""), cost.get("peak_memory_bytes") or "", cost.get("parameters", ""),
        _settings(cell, record), "" if own is None else len(own.per_task), cell.get("key") or "",
        f"absent: {reason}" if reason else "done" if own is not None else "not run",
    ]  # fmt: skip


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    ">": r"$>$", "<": r"$<$", "±": r"$\pm$",
}  # fmt: skip


def tex(text: str) -> str:
    """Plain text for LaTeX."""
    return "".join(_TEX.get(letter, letter) for letter in text)


def latex(filled: Filled) -> str:
    """A `table` with booktabs rules: ours, and the paper's figure in brackets."""
    shots = filled.table.shots
    columns = [(dataset, count) for dataset in filled.datasets for count in shots]
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        rf"\caption{{{tex(filled.title)}. Ours with another backbone than the paper's, whose"
        r" figures are in brackets; 95\,\% intervals.}",
        rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
        r"\toprule",
    ]
    lines.append(_tex_line("method", [f"{tex(d)}, {count}-shot" for d, count in columns]))
    lines.append(r"\midrule")
    for row in filled.labels:
        cells = []
        for dataset, count in columns:
            own, figure = filled.score(row, dataset, count), filled.figure(row, dataset, count)
            text = "--" if own is None else rf"{own.accuracy:.2f} $\pm$ {own.ci95:.2f}"
            cells.append(text if figure is None else f"{text} ({figure:.2f})")
        lines.append(_tex_line(tex(row), cells))
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _tex_line(first: str, cells: Sequence[str]) -> str:
    return " & ".join([first, *cells]) + r" \\"

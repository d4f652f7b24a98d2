"""App. E as a picture: what a data set gains against how far plain NN is from 100 %."""

from __future__ import annotations

from pathlib import Path

from fastrecycle.report import write_figure
from fastrecycle.tables.catalogue import BEST_SPARSITY, RECYCLES
from fastrecycle.tables.layout import published
from fastrecycle.tables.render import Filled

MARKERS = {1: "o", 5: "s"}


def plot_gains(filled: Filled, path: str | Path) -> None:
    """Paired gains of the best sparsity over NN, written as PNG; the paper's points are grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in ("table2", "table3"):
        paper = published()[name]
        for column in paper.columns:
            dataset, _, shots = column.partition("/")
            count = int(shots)
            theirs = paper.figure("NN", dataset, count)
            ours = [paper.figure(row, dataset, count) for row in RECYCLES]
            if theirs is not None:
                most = max(x for x in ours if x is not None)
                axes.plot(100 - theirs, most - theirs, MARKERS[count], color="0.75", zorder=1)
    for domain in filled.plan["domains"]:
        dataset, within = domain["dataset"], domain["sources"] == [domain["dataset"]]
        for count in filled.table.shots:
            plain = filled.score("NN", dataset, count)
            best = filled.score(BEST_SPARSITY, dataset, count)
            if plain is None or best is None:
                continue
            gain = best.minus(plain)
            axes.errorbar(
                100 - plain.accuracy, gain.accuracy, gain.ci95, fmt=MARKERS[count], zorder=2,
                color="C0" if within else "C1",
            )  # fmt: skip
            axes.annotate(f" {dataset}, {count}-shot", (100 - plain.accuracy, gain.accuracy),
                          fontsize=7)  # fmt: skip
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xlabel("100 % minus plain NN (points)")
    axes.set_ylabel("LoRA Recycle, best sparsity, minus NN (points)")
    axes.set_title("blue in-domain, orange cross-domain, grey the paper; o 1-shot, square 5-shot",
                   fontsize=8)  # fmt: skip
    write_figure(figure, path)

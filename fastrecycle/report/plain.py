"""A run as report.md, with curves.png, synthetic.png and gallery.png beside it."""

from __future__ import annotations

from pathlib import Path

from fastrecycle.files import atomic_write
from fastrecycle.report.contents import RunContents, read_run
from fastrecycle.report.figures import plot_gallery, plot_metrics, plot_pool
from fastrecycle.report.tables import (
    EVALUATION_HEAD,
    evaluation_rows,
    flat,
    last_values,
    markdown_table,
)


def write_report(run: str | Path | RunContents) -> list[Path]:
    """Write report.md and its pictures into a run's folder; returns what was written.

    Raises:
        FileNotFoundError: no such folder, or nothing in it that a run writes.
        ValueError: a file of it is damaged.

    """
    contents = run if isinstance(run, RunContents) else read_run(run)
    folder, pool = contents.folder, contents.pool
    written: list[Path] = []
    parts = [f"# {contents.name}"]
    if contents.metrics:
        plot_metrics(contents.metrics, folder / "curves.png")
        written.append(folder / "curves.png")
        table = markdown_table(["stage", "value", "step", "last"], last_values(contents.metrics))
        parts.append("## Curves\n\n![loss and accuracy](curves.png)\n\n" + table)
    if pool is not None:
        share = plot_pool(pool, folder / "synthetic.png")
        plot_gallery(pool, folder / "gallery.png")
        written += [folder / "synthetic.png", folder / "gallery.png"]
        parts.append(
            f"## Synthetic images\n\n{len(pool)} images of {len(pool.parts)} LoRAs and"
            f" {len(pool.class_names)} classes. Right of each image: its {share:.0%} most"
            " important patches.\n\n![synthetic images](synthetic.png)"
        )
    if contents.evaluations:
        rows = evaluation_rows(contents.evaluations)
        parts.append("## Accuracy\n\n" + markdown_table(EVALUATION_HEAD, rows))
    for where, manifest in contents.manifests.items():
        rows = [[f"`{name}`", f"`{value}`"] for name, value in flat(manifest)]
        parts.append(f"## {where}\n\n" + markdown_table(["key", "value"], rows))
    atomic_write(folder / "report.md", "\n\n".join(parts) + "\n")
    return [folder / "report.md", *written]
